"""Runs under `data.verdicts`: what a person found wrong trains no tower, what is right stays, and a run keeps to it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from efficientclip.data.store import Store
from efficientclip.training.run_folder import run_identity
from tests import tiny
from tests.training.launch import run

OBSERVED = Path(__file__).parent.parent / "evaluation" / "observed.py"
WRONG, RIGHT = range(3, 240, 8), range(0, 240, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("by-hand")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    pairs = Store(path / "store").pairs().to_pylist()
    told = {row: "right" for row in RIGHT} | {row: "wrong" for row in WRONG}
    lines = [f"{row},{pairs[row]['key']},{pairs[row]['caption']},{verdict}" for row, verdict in told.items()]
    (path / "verdicts.csv").write_text("\n".join(["row,key,caption,verdict", *lines, "7,gone,猫,wrong", ""]))
    return path


def config(folder: Path, name: str, **changes: Any) -> str:
    settings = {"data__verdicts": str(folder / "verdicts.csv"), "confidence__warmup_epochs": 0, "data__validation": {}}
    file = tiny.config(folder, run=str(folder / name), **(settings | changes))
    return str(file.rename(folder / f"{name}.yaml"))


def test_a_run_obeys_and_keeps_to_what_it_was_told(folder: Path) -> None:
    given = config(
        folder, "run", confidence__selection="schedule", confidence__drop_share=0.4, confidence__reaudition_share=0.2,
        training__pair_visits=960,
    )  # fmt: skip
    output = run(1, given, script=OBSERVED, OBSERVED=str(folder / "observed"))
    right, wrong = len({*RIGHT} - {*WRONG}), len(WRONG)
    told = f"obeys {folder / 'verdicts.csv'}: {right} pairs right, {wrong} wrong, by {right + wrong + 1} verdicts"
    assert f"{folder / 'run'}: {told}; 1 of the verdicts match no pair of the store" in output
    observed: list[Any] = []
    with (folder / "observed").open("rb") as file:
        while file.peek(1):
            observed.append(pickle.load(file))
    rows = np.concatenate([rows for _, rows, _, _ in observed])
    assert set(rows.tolist()) == set(range(240)) - set(WRONG)
    assert not all(counted.all() for _, _, _, counted in observed), "nothing was dropped and re-auditioned"
    table = pq.read_table(folder / "run" / "confidence.parquet")
    kept = table["kept"].to_numpy()
    assert not kept[[*WRONG]].any() and kept[[row for row in RIGHT if row not in WRONG]].all() and kept.sum() < 150
    for epoch in sorted((folder / "run" / "history").iterdir()):
        kept = np.load(epoch)["kept"]
        assert not kept[[*WRONG]].any() and kept[[row for row in RIGHT if row not in WRONG]].all()
    identity = run_identity(folder / "run")
    assert identity is not None and (identity["verdicts"]["right"], identity["verdicts"]["wrong"]) == (right, wrong)
    # Another place and order are the same; another verdict, or none, is another run.
    header, *lines = (folder / "verdicts.csv").read_text().splitlines()
    moved = folder / "moved.csv"
    moved.write_text("\n".join([header, *reversed(lines)]))
    assert "resuming" in run(1, given, f"data.verdicts={moved}")
    moved.write_text("\n".join([header, *lines[1:]]))
    for other in (moved, "null"):
        output = run(1, given, f"data.verdicts={other}", code=2)
        assert "was trained on other data than this config names (verdicts differ from its identity.json)" in output


def test_the_towers_of_a_cross_fit_train_on_none_that_is_wrong(folder: Path) -> None:
    changes = {"confidence__cross_fit": str(folder / "judged"), "confidence__cross_fit_share": 1.6}
    file = config(folder, "judge", confidence__selection="calibrated", confidence__cross_fit_batch_size=4, **changes)
    run(1, file, module="efficientclip.cross_fit")
    fold = pq.read_table(folder / "judged" / "cross_fit.parquet")["fold"].to_numpy()
    for number in range(2):
        table = pq.read_table(folder / "judged" / f"fold-{number}" / "confidence.parquet")
        wrong = np.isin(np.flatnonzero(fold == number), WRONG)
        assert wrong.any() and len(wrong) == len(table)
        np.testing.assert_array_equal(table["kept"].to_numpy(), ~wrong)
        np.testing.assert_array_equal(table["times_seen"].to_numpy() == 0, wrong)
