"""Two fold towers judge a store, and a run takes what they say: resumable, and on two ranks as on one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from efficientclip.data.store import Store
from efficientclip.model.efficientclip import load_model
from efficientclip.noise.cross_fit import read_cross_fit, write_cross_fit
from tests import tiny
from tests.training.launch import metrics, run, start
from tests.training.test_resume import figures, kill_at

RATE = 8e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cross-fit")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    run(1, config(path, "judge", training__checkpoint_every=2), module="efficientclip.cross_fit")
    return path


def config(folder: Path, name: str, judged: str = "judged", **changes: Any) -> str:
    changes = {"confidence__selection": "calibrated", "confidence__cross_fit": str(folder / judged)} | changes
    changes |= {"confidence__cross_fit_share": 0.8, "confidence__cross_fit_batch_size": 4}
    file = tiny.config(folder, run=str(folder / name), confidence__cross_fit_lr=RATE, **changes)
    return str(file.rename(folder / f"{name}.yaml"))


def test_each_tower_trains_on_one_fold_alone(folder: Path) -> None:
    found = read_cross_fit(folder / "judged")
    assert 0 <= found.rate <= 1 and found.visits == 2 * 256
    assert sorted(np.bincount(found.fold)) == pytest.approx([120, 120], abs=12)
    assert np.isfinite(found.clean_log_odds).all() and (found.p > 0).all() and (found.p < 1).all()
    for fold in ("fold-0", "fold-1"):
        steps = metrics(folder / "judged" / fold)
        assert [line["visits"] for line in steps] == list(range(4, 257, 4))
        assert max(line["lr"] for line in steps) == pytest.approx(RATE, rel=0.01)
    towers = [load_model(folder / "judged" / name) for name in ("fold-0", "fold-1", ".")]
    weights = [dict(tower.named_parameters()) for tower in towers]
    for name, mean in weights[2].items():
        torch.testing.assert_close(mean, (weights[0][name] + weights[1][name]) / 2)


def test_interrupted_cross_fit_goes_on(folder: Path) -> None:
    judged = folder / "judged"
    before = pq.read_table(judged / "cross_fit.parquet")
    (judged / "cross_fit.parquet").unlink()
    for name in ("fold-1", "model"):
        shutil.rmtree(judged / name)
    written = (judged / "fold-0" / "metrics.jsonl").read_bytes()
    run(1, str(folder / "judge.yaml"), module="efficientclip.cross_fit")
    assert (judged / "fold-0" / "metrics.jsonl").read_bytes() == written
    assert pq.read_table(judged / "cross_fit.parquet").equals(before)


def test_two_ranks_judge_as_one(folder: Path) -> None:
    run(2, config(folder, "ranks", judged="judged-2"), module="efficientclip.cross_fit")
    one, two = (read_cross_fit(folder / name) for name in ("judged", "judged-2"))
    np.testing.assert_array_equal(one.fold, two.fold)
    # Captions' features are kept in fp16: ranks may differ by its last bit.
    np.testing.assert_allclose(one.score, two.score, atol=2**-11)
    # The rate of so few pairs, none of them competent, turns on a single p: it is not compared. Of some 60 captions
    # many may stand as near to each other as that bit: in few pairs.
    apart = np.abs(one.p - two.p)
    assert (apart > 0.05).mean() <= 0.02 and apart.mean() < 0.002


@pytest.fixture(scope="module")
def certain(folder: Path) -> str:
    """The verdicts with a rate of 0.2, since that of so few pairs may be anything."""
    shutil.copytree(folder / "judged", folder / "certain")
    judged = replace(read_cross_fit(folder / "judged"), rate=0.2)
    write_cross_fit(folder / "certain", Store(folder / "store"), judged)
    return "certain"


def test_killed_calibrated_run_resumes_bit_identically(folder: Path, certain: str) -> None:
    run(1, config(folder, "undisturbed", certain, training__pair_visits=960))
    again = config(folder, "killed", certain, training__pair_visits=960)
    kill_at(start(folder / "log", again), folder / "killed", 11)
    run(1, again)
    assert figures(folder / "killed") == figures(folder / "undisturbed") and len(figures(folder / "killed")) == 30
    one, other = ((folder / name / "confidence.parquet").read_bytes() for name in ("killed", "undisturbed"))
    assert one == other
    assert {line["kept_share"] for line in metrics(folder / "undisturbed")} == {0.8}


def test_a_run_starts_from_the_mean_of_the_towers(folder: Path, certain: str) -> None:
    run(1, config(folder, "begun", certain, training__pair_visits=8, training__batch_size=8, optimizer__lr=1e-12))
    start, begun = (dict(load_model(folder / name).named_parameters()) for name in ("judged", "begun"))
    for name in start.keys() - {"logit_scale"}:
        torch.testing.assert_close(begun[name], start[name])


def test_run_without_verdicts_says_what_to_do(folder: Path) -> None:
    output = run(1, config(folder, "early", judged="nowhere"), code=2)
    assert "run `efficientclip cross-fit CONFIG` first" in output and "Traceback" not in output
