"""A killed run goes on bit-identically; a SIGTERM saves first; a broken batch stops the run with its keys."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.training.launch import metrics, run, start

FIGURES = ("loss", "contrastive", "mlm", "cosine", "grad_norm", "kept_share", "lr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


def config(folder: Path, name: str) -> str:
    """40 steps over several epochs and drops."""
    return str(
        tiny.config(
            folder,
            run=str(folder / name),
            training__pair_visits=1280,
            confidence__selection="schedule",
            confidence__reaudition_share=0.1,
        ).rename(folder / f"{name}.yaml")
    )


def figures(run_folder: Path) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in FIGURES) for line in metrics(run_folder)]


def kill_at(process: BaseProcess, reached: Path, step: int | None, signum: int = signal.SIGKILL) -> None:
    """Send the signal once `step` is logged, or, without a step, once a checkpoint is being written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if step is None:
            hit = any((reached / "checkpoints").glob("step-0000001*.partial"))
        else:
            file = reached / "metrics.jsonl"
            hit = file.exists() and len(file.read_text().splitlines()) >= step
        if hit:
            assert process.pid is not None
            os.kill(process.pid, signum)
            process.join(60)
            return
        time.sleep(0.0005 if step is None else 0.01)
    raise RuntimeError(f"the run ended with {process.exitcode} before it could be stopped")


def test_killed_run_resumes_bit_identically(folder: Path) -> None:
    run(1, config(folder, "undisturbed"))
    random = np.random.default_rng()
    steps = sorted(int(step) for step in random.integers(6, 36, 2))
    print(f"killed at steps {steps} and in a checkpoint write")
    again = config(folder, "killed")
    kill_at(start(folder / "log", again), folder / "killed", None)
    for step in steps:
        kill_at(start(folder / "log", again), folder / "killed", step)
    run(1, again)
    assert figures(folder / "killed") == figures(folder / "undisturbed")
    assert len(figures(folder / "killed")) == 40
    one, other = ((folder / name / "confidence.parquet").read_bytes() for name in ("killed", "undisturbed"))
    assert one == other
    histories = [
        {file.name: file.read_bytes() for file in (folder / name / "history").iterdir()}
        for name in ("killed", "undisturbed")
    ]
    assert histories[0] == histories[1] and len(histories[0]) > 5


def test_sigterm_saves_and_stops(folder: Path) -> None:
    file = config(folder, "stopped")
    process = start(folder / "log", file)
    kill_at(process, folder / "stopped", 8, signal.SIGTERM)
    assert process.exitcode == 128 + signal.SIGTERM
    saved = int((folder / "stopped" / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert saved >= 8
    assert not (folder / "stopped" / "model").exists()
    run(1, file)
    assert [line["step"] for line in metrics(folder / "stopped")] == list(range(1, 41))


def test_overflow_stops_with_step_and_keys(folder: Path) -> None:
    file = tiny.config(folder, run=str(folder / "overflow"), optimizer__lr=1e30, optimizer__clip=0)
    output = run(1, str(file), code=2)
    assert "error: step " in output and "the batch's pairs begin with pair-" in output
    assert "Traceback" not in output
