"""Runs on a store of several sources: pairs come as often as their source weighs, and what ECL and cross-fit tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientclip.data.store import Store
from efficientclip.evaluation.report import write_report
from efficientclip.noise.cross_fit import read_cross_fit
from tests import tiny
from tests.training.launch import back_to, metrics, run

WEIGHTS = {"a": {"weight": 2}, "b": {"weight": 0.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    tiny.pair_store(path / "store", sources=["a", "b", "b"])
    tiny.text_store(path / "texts")
    return path


def config(folder: Path, name: str, **changes: Any) -> str:
    settings = {"data__sources": WEIGHTS, "confidence__selection": "schedule", "confidence__warmup_epochs": 0}
    settings |= {"training__pair_visits": 960, "training__keep_checkpoints": 9}
    file = tiny.config(folder, run=str(folder / name), **(settings | changes))
    return str(file.rename(folder / f"{name}.yaml"))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_a_weighted_run_resumes_and_is_the_same_on_two_ranks(folder: Path) -> None:
    one = config(folder, "one")
    run(1, one)
    expected = losses(folder / "one")
    assert len(expected) == 30
    # 80 pairs twice and 160 by half: seven batches or eight of 32 in the first epoch.
    assert [line["epoch"] for line in metrics(folder / "one")][6:9] in ([0, 1, 1], [0, 0, 1])
    back_to(folder / "one", 10)
    assert "at step 10 " in run(1, one)
    assert losses(folder / "one") == expected
    run(2, config(folder, "two"))
    assert losses(folder / "two") == pytest.approx(expected, rel=1e-3)


def test_ecl_tells_the_kept_share_of_each_source(folder: Path) -> None:
    run(1, config(folder, "told"))
    lines, sources = metrics(folder / "told"), Store(folder / "store").sources()
    sizes = dict(zip(sources.names, np.bincount(sources.of), strict=True))
    assert sizes == {"b": 160, "a": 80} and lines[0]["kept_share_by_source"] == {"b": 1.0, "a": 1.0}
    for line in lines:
        kept = sum(sizes[name] * share for name, share in line["kept_share_by_source"].items())
        assert kept / 240 == pytest.approx(line["kept_share"])
    assert lines[-1]["kept_share"] < 0.85
    page = write_report(folder / "told", {}).read_text(encoding="utf-8")
    assert "Kept of each source" in page and "<th>b</th><td>160</td><td>" in page


def test_one_source_shows_no_table(folder: Path, tmp_path: Path) -> None:
    tiny.pair_store(tmp_path / "store")
    tiny.text_store(tmp_path / "texts")
    run(1, config(tmp_path, "alone", data__sources={"tiny": {"weight": 1.5}}, training__pair_visits=320))
    assert not any("kept_share_by_source" in line for line in metrics(tmp_path / "alone"))
    assert "Kept of each source" not in write_report(tmp_path / "alone", {}).read_text(encoding="utf-8")


def test_a_source_that_the_store_lacks_ends_the_run(folder: Path) -> None:
    output = run(1, config(folder, "lacks", data__sources={"a": {"weight": 2}, "wukong": {"weight": 2}}), code=2)
    assert f"data.sources.wukong: store {folder / 'store'} has no such source; it has 'b', 'a'" in output
    assert "Traceback" not in output


def test_cross_fit_tells_the_rate_of_each_source_with_its_interval(tmp_path: Path) -> None:
    tiny.pair_store(tmp_path / "store", pairs=6300, images=900, sources=["a", "a", "b"])
    tiny.text_store(tmp_path / "texts")
    changes = {"confidence__selection": "calibrated", "confidence__cross_fit": str(tmp_path / "judged")}
    changes |= {"confidence__cross_fit_share": 0.8}
    printed = run(1, config(tmp_path, "judge", **changes), module="efficientclip.cross_fit")
    found = read_cross_fit(tmp_path / "judged", Store(tmp_path / "store"))
    assert [(source.name, source.pairs) for source in found.sources] == [("a", 4200), ("b", 2100)]
    for source in found.sources:
        [line] = [line for line in printed.splitlines() if line.startswith(f"  {source.name}: ")]
        assert f"(90 % interval {source.low:.1%} to {source.high:.1%}; towers tell a right pair from" in line
        assert f"of {source.pairs:,} pairs" in line
        assert ("cannot tell" in line) == source.open and ("none is dropped" in line) == (source.droppable == 0)
