"""A step waits for the device at most twice, and figures that are read late are those of their own step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.training.launch import metrics, run

WORKER = Path(__file__).with_name("counted.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("waiting")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


@pytest.mark.parametrize(
    ("name", "ranks", "reads", "changes"),
    [
        ("alone", 1, 1, {}),
        ("two", 2, 1, {}),
        ("accumulated", 2, 1, {"training__micro_batch_size": 8}),
        ("fp16", 1, 2, {"training__precision": "fp16"}),
    ],
)
def test_a_step_waits_for_the_device_once_or_twice(
    folder: Path, name: str, ranks: int, reads: int, changes: dict[str, Any]
) -> None:
    config = tiny.config(folder, run=str(folder / name), training__pair_visits=192, **changes)
    run(ranks, str(config), script=WORKER, COUNTED=str(folder / f"{name}.json"))
    steps = json.loads((folder / f"{name}.json").read_text())
    assert len(steps) == 6
    for step in steps:
        assert sum(step["reads"].values()) == reads, step
        # Of its own a step has the tally and the bank's rows; the loss has its images and pairs, two sums of columns.
        if ranks == 2:
            assert sum(count for name, count in step["told"].items() if "gather" in name) == 4, step


def test_lines_are_those_of_their_steps_whatever_is_read_late(folder: Path) -> None:
    """A checkpoint after every step reads every step at once."""
    shared: dict[str, Any] = {
        "training__pair_visits": 640,
        "confidence__selection": "schedule",
        "training__log_every": 3,
    }
    for name, every in (("late", 100), ("at-once", 1)):
        config = tiny.config(folder, run=str(folder / name), training__checkpoint_every=every, **shared)
        run(1, str(config))
    late, at_once = metrics(folder / "late"), metrics(folder / "at-once")
    assert [line["step"] for line in late] == [1, 3, 6, 9, 12, 15, 18, 20]
    timed = {"step_seconds", "pairs_per_s", "tokens_per_s", "data_wait_share"}
    for one, other in zip(late, at_once, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
