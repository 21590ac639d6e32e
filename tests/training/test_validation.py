"""Validations fall where they are asked for, by epochs or by steps, once each, whatever ends a run between them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.training.launch import run

WORKER = Path(__file__).with_name("killed.py")
BY_STEPS = {"training__validate_every": None, "training__validate_every_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


def config(folder: Path, name: str, **changes: Any) -> str:
    """20 steps; epochs end after 7 and 14."""
    return str(tiny.config(folder, run=str(folder / name), **changes).rename(folder / f"{name}.yaml"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run: Path) -> dict[int, dict[str, Any]]:
    """Reports by step; no step has two."""
    found = [line for line in lines(run) if "validation" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line["validation"] for line in found}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    run(1, config(folder, "undisturbed", **BY_STEPS))
    return folder / "undisturbed"


def test_by_steps(undisturbed: Path) -> None:
    assert list(validations(undisturbed)) == [6, 12, 18, 20]
    # What a step measured is known before its weights are judged.
    found = [(line["step"], "validation" in line) for line in lines(undisturbed)]
    assert found == sorted([(step, False) for step in range(1, 21)] + [(step, True) for step in (6, 12, 18, 20)])
    recall = {step: report["held"]["t2i"]["R@10"] for step, report in validations(undisturbed).items()}
    best = max(recall, key=lambda step: recall[step])
    assert (undisturbed / "checkpoints" / "best").read_text() == f"step-{best:08d}"


def test_by_epochs(folder: Path) -> None:
    run(1, config(folder, "epochs", training__validate_every=None))
    assert list(validations(folder / "epochs")) == [7, 14, 20]
    run(1, config(folder, "second", training__validate_every=2))
    assert list(validations(folder / "second")) == [14, 20]


@pytest.mark.parametrize("before", [6, 12, 13])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_goes_on_validates_once_where_it_would_have(
    folder: Path, undisturbed: Path, before: int, signum: signal.Signals
) -> None:
    """Told to stop in step 12, it leaves its validation to the next start; killed, it has lost what came after its
    checkpoint of step 10."""
    file, stopped = config(folder, f"{signum.name}-{before}", **BY_STEPS), folder / f"{signum.name}-{before}"
    code = 128 + signum if signum == signal.SIGTERM else -signum
    run(1, file, script=WORKER, code=code, KILLED_BEFORE=str(before - 1), KILLED_BY=str(int(signum)))
    assert list(validations(stopped)) == [step for step in (6, 12) if step < before]
    run(1, file)
    assert validations(stopped) == validations(undisturbed)
    best, expected = ((folder / "checkpoints" / "best").read_text() for folder in (stopped, undisturbed))
    assert best == expected


def test_a_run_goes_on_by_another_rhythm(folder: Path) -> None:
    file = config(folder, "other", training__validate_every=1)
    run(1, file, script=WORKER, code=-signal.SIGKILL, KILLED_BEFORE="11")
    run(1, file, "training.validate_every=null", "training.validate_every_steps=4")
    assert list(validations(folder / "other")) == [7, 12, 16, 20]


def test_ranks_validate_together(folder: Path, undisturbed: Path) -> None:
    run(2, config(folder, "two", **BY_STEPS))
    assert list(validations(folder / "two")) == list(validations(undisturbed))
