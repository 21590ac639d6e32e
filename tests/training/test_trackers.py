"""W&B and MLflow show what TensorBoard shows, go on with a run, and neither hold a run up nor outlive it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from efficientclip.config import load_config
from efficientclip.errors import UserError
from efficientclip.training import trackers
from efficientclip.training.trackers import Aside, opened, require_installed
from tests import tiny
from tests.conftest import ABSENT
from tests.training.boards import Scalars, in_mlflow, in_tensorboard, in_wandb
from tests.training.launch import ended, metrics, run, start, start_ranks
from tests.training.test_resume import kill_at

ALL = ["tensorboard", "wandb", "mlflow"]
# A run in which something was done before.
SCRIPT = "import sys\n{}\nfrom efficientclip import train\ntrain.main(sys.argv[1:])\n"
FAILS_LATER = """
from mlflow import MlflowClient
log_batch, calls = MlflowClient.log_batch, []

def failing(*arguments, **options):
    calls.append(1)
    if 5 < len(calls) < 10:
        raise OSError(28, "No space left on device")
    return log_batch(*arguments, **options)

MlflowClient.log_batch = failing
"""


@pytest.fixture(autouse=True)
def with_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path != ABSENT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trackers")
    tiny.pair_store(path / "store")
    tiny.text_store(path / "texts")
    return path


def config(folder: Path, name: str, *, steps: int = 20, report_to: list[str] = ALL, **changes: Any) -> str:
    given = {"training__pair_visits": 32 * steps, "training__report_to": report_to, "training__validate_every": 1}
    file = tiny.config(folder, run=str(folder / name), **given, **changes)
    return str(file.rename(folder / f"{name}.yaml"))


def rounded(scalars: Scalars) -> dict[tuple[str, int], float]:
    """TensorBoard keeps fp32."""
    return {key: pytest.approx(value, rel=1e-6) for key, value in scalars.items()}


def test_all_show_the_same_and_change_no_number(folder: Path) -> None:
    run(2, config(folder, "plain", report_to=[]))
    assert not (folder / "plain" / "tensorboard").exists()
    run(2, config(folder, "shown"))
    timed = {"step_seconds", "pairs_per_s", "tokens_per_s", "data_wait_share"}
    plain, shown = (
        [{key: value for key, value in line.items() if key not in timed} for line in metrics(folder / name)]
        for name in ("plain", "shown")
    )
    assert plain == shown and len(shown) == 20
    in_file = {("train/loss", line["step"]): line["loss"] for line in shown}
    by_tensorboard, (by_mlflow, kept), (by_wandb, described, names) = (
        read(folder / "shown") for read in (in_tensorboard, in_mlflow, in_wandb)
    )
    assert len(names) == len(list((folder / "shown" / "wandb").glob("offline-run-*"))) == 1
    assert by_wandb.items() >= in_file.items() and ("held/t2i R@10", 20) in by_wandb
    assert by_tensorboard == rounded(by_wandb)
    assert by_mlflow == {(name.replace("@", "_at_"), step): value for (name, step), value in by_wandb.items()}
    assert described["training"]["report_to"] == ALL and described["optimizer"]["lr"] == 1e-3
    assert kept.data.params["optimizer.lr"] == "0.001" and kept.info.status == "FINISHED"


def test_a_run_that_was_stopped_and_moved_goes_on_there(folder: Path) -> None:
    file = config(folder, "stopped", steps=40)
    process = start(folder / "log", file)
    kill_at(process, folder / "stopped", 12, signal.SIGTERM)
    output = (folder / "log").read_text()
    assert process.exitcode == 128 + signal.SIGTERM
    assert output.count("stopped by SIGTERM; checkpoint of step") == 1 and "Traceback" not in output
    _, kept = in_mlflow(folder / "stopped")
    assert kept.info.status == "FAILED"
    (folder / "stopped").rename(folder / "moved")
    run(1, file, f"run={folder / 'moved'}")
    assert not (folder / "stopped").exists()
    by_mlflow, kept = in_mlflow(folder / "moved")
    by_wandb, _, names = in_wandb(folder / "moved")
    assert kept.info.status == "FINISHED" and len(names) == 1
    assert [step for name, step in sorted(by_mlflow) if name == "train/loss"] == list(range(1, 41))
    assert [step for name, step in sorted(by_wandb) if name == "train/loss"] == list(range(1, 41))


def test_nothing_outlives_a_run_that_is_killed_and_its_steps_are_shown_again(folder: Path) -> None:
    file, killed = config(folder, "killed", steps=30), folder / "killed"
    process = start(folder / "log", file)
    while process.is_alive() and not (killed / "checkpoints" / "step-00000010").exists():
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert "wandb-core" in [child.name() for child in children]
    process.kill()
    process.join()
    deadline = time.monotonic() + 15
    while left := [child.name() for child in children if lives(child)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    before = json.loads((killed / "trackers.json").read_text())
    run(1, file, "training.report_to=[mlflow]")
    assert json.loads((killed / "trackers.json").read_text()) == before
    by_mlflow, _ = in_mlflow(killed)
    assert {step: value for (name, step), value in by_mlflow.items() if name == "train/loss"} == {
        line["step"]: line["loss"] for line in metrics(killed)
    }


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """A folder `wandb` beside the program is what W&B itself writes, and no package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="report_to: wandb is not installed here; pip install wandb, or leave"):
        require_installed(["wandb"])


def test_a_package_that_is_missing_ends_all_ranks_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(SCRIPT.format("sys.modules['mlflow'] = None"))
    file = config(folder, "missing")
    ranks = start_ranks(tmp_path, (file,), (file,), script=script)
    codes, output = ended(tmp_path, ranks, 60)
    assert codes == [2, 2] and output.count("error: ") == 1 and "Traceback" not in output
    assert "error: training.report_to: mlflow is not installed here; pip install mlflow-skinny" in output
    assert not (folder / "missing").exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("wandb", {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "wandb: No API key configured"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "nowhere://at-all"}, "mlflow: .*nowhere"),
    ],
)
def test_a_tracker_that_cannot_be_opened_is_one_message(
    folder: Path, name: str, given: dict[str, str], message: str
) -> None:
    output = run(1, config(folder, f"no-{name}", report_to=[name]), code=2, **given)
    assert re.search(f"error: training.report_to: {message}.*; mend that, or leave {name} out", output)
    assert output.count("error: ") == 1 and "Traceback" not in output


def test_a_broken_list_of_identities_is_one_message(folder: Path) -> None:
    broken = folder / "broken" / "trackers.json"
    broken.parent.mkdir()
    broken.write_text('{"mlflow": ')
    with pytest.raises(UserError, match=r"broken/trackers\.json: broken .*; restore it from a copy, or remove it"):
        opened(load_config(Path(config(folder, "broken", report_to=["mlflow"]))), 0)


def test_a_tracker_that_fails_is_told_once_and_missed_no_longer_than_it_fails(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(SCRIPT.format(FAILS_LATER))
    output = run(1, config(folder, "failing", report_to=["mlflow"]), script=script)
    assert output.count("notice: mlflow: ") == 1 and "No space left on device" in output
    assert len(metrics(folder / "failing")) == 20 and (folder / "failing" / "model").exists()
    steps = {step for name, step in in_mlflow(folder / "failing")[0] if name == "train/loss"}
    assert len(steps) in (16, 17) and {1, 20} <= steps


class Stuck:
    """Waits for a network that is gone."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.back = threading.Event()

    def add(self, scalars: dict[str, float], step: int) -> None:
        self.back.wait(60)
        self.taken.append(step)

    def close(self, finished: bool) -> None:
        self.taken.append(-int(finished))


def test_a_tracker_that_hangs_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "STOP_SECONDS", 0.2)
    stuck, started = Stuck(), time.monotonic()
    board = Aside("wandb", stuck)
    for step in range(100):
        board.add({"train/loss": 1.0}, step)
    board.close(finished=False)
    assert time.monotonic() - started < 5 and stuck.taken == []
    told = capfd.readouterr().err
    assert told.count("notice: wandb: 3 lines wait to be taken") == 1 and told.count("notice") == 1
    stuck.back.set()
    board.close(finished=True)
    assert stuck.taken[:3] == [0, 1, 2] and stuck.taken[-1] == -1
