"""What shows a run's scalars while it goes: TensorBoard, Weights & Biases, MLflow, as `training.report_to` names them.

RUN/tensorboard/      TensorBoard's log
    wandb/            Weights & Biases' files, where WANDB_DIR names no other folder
    mlflow/           MLflow's file store, where MLFLOW_TRACKING_URI names no other place
    trackers.json     as what W&B and MLflow know this run: a resumed run goes on there

All get the same scalars at the same steps, from rank 0 alone. A run that goes on from a checkpoint trains the steps
after it again: TensorBoard hides what it had of them; W&B and MLflow, which take nothing back, have both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..config import Config, dotted
from ..errors import UserError, reading, short, writing
from ..files.atomic import write_atomically

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
# W&B's project and MLflow's experiment, where the environment names none.
PROJECT = "efficientclip"
IDENTITIES = "trackers.json"
# MLflow takes no more at once.
PARAMS = 100
# Lines that wait while a tracker cannot be reached; later ones are lost there.
WAITING = 1000
# How long a tracker may take for what waits: at the end, and when the run was told to stop.
FINISH_SECONDS, STOP_SECONDS = 60, 5


class Board(Protocol):
    """Where scalars are shown. Nothing is added after `close`, which is told whether the run has come to its end."""

    def add(self, scalars: dict[str, float], step: int) -> None: ...

    def close(self, finished: bool) -> None: ...


def require_installed(names: Iterable[str]) -> None:
    """UserError where a name of `training.report_to` has no package here."""
    for name in names:
        found = importlib.util.find_spec(name)
        # A folder that W&B or MLflow wrote here is called like its package, and can be imported.
        if found is None or found.origin is None:
            raise UserError(
                f"training.report_to: {name} is not installed here; pip install {PACKAGES[name]}, or leave {name} out"
            )


def opened(config: Config, step: int) -> list[Board]:
    """The boards that `config` names, for a run that goes on from `step`. UserError where one cannot be opened: so
    early nothing is lost, and a mistyped address is found at once."""
    boards: list[Board] = []
    for name in dict.fromkeys(config.training.report_to):
        if name == "tensorboard":
            boards.append(TensorBoard(config.run, step))
            continue
        try:
            boards.append(Aside(name, WandB(config) if name == "wandb" else MLflow(config)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"training.report_to: {name}: {short(error)}; mend that, or leave {name} out") from error
    return boards


class TensorBoard:
    """RUN/tensorboard; steps after the one that the run goes on from are hidden."""

    def __init__(self, run: Path, step: int) -> None:
        self.folder = run / "tensorboard"
        with writing(self.folder):
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        threading.excepthook = _told_by_main_thread

    def add(self, scalars: dict[str, float], step: int) -> None:
        with writing(self.folder):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        with writing(self.folder):
            self.writer.close()


def _told_by_main_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints what stopped it, although its next call raises that again."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class Aside:
    """A board in a thread of its own, where it may wait for a network, or fail: told once, and the run goes on.

    A point in a curve is worth less than a step, and metrics.jsonl has it. Every line is tried, so the board shows
    again what comes after an outage.
    """

    def __init__(self, name: str, board: Board) -> None:
        self.name, self.board = name, board
        self.lines: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(WAITING)
        self.failed = self.finished = False
        self.thread = threading.Thread(target=self._show, name=name, daemon=True)
        self.thread.start()

    def add(self, scalars: dict[str, float], step: int) -> None:
        try:
            self.lines.put_nowait((scalars, step))
        except queue.Full:
            self._fail(f"{WAITING} lines wait to be taken")

    def close(self, finished: bool) -> None:
        """Wait until all is shown, a minute at most, or some seconds where the run stops."""
        self.finished = finished
        seconds = FINISH_SECONDS if finished else STOP_SECONDS
        deadline = time.monotonic() + seconds
        with suppress(queue.Full):
            self.lines.put(None, timeout=seconds)
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self._fail(f"did not take everything within {seconds} s")

    def _show(self) -> None:
        for line in iter(self.lines.get, None):
            self._try(self.board.add, *line)
        self._try(self.board.close, self.finished)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._fail(short(error))

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            tqdm.write(
                f"notice: {self.name}: {why}; the run needs no tracker, and metrics.jsonl has what is missing there",
                file=sys.stderr,
            )


class WandB:
    """A run of Weights & Biases, by the account, project and mode that its own environment says.

    The steps are the axis of all charts: by its own count, W&B would refuse steps that are trained again. What it had
    not written when this process was killed, 15 s at most, is missing there. Its own processes end with this one.
    """

    def __init__(self, config: Config) -> None:
        import wandb

        self.teardown = wandb.teardown
        identity = _identities(config.run).get("wandb") or secrets.token_hex(8)
        _keep(config.run, wandb=identity)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", config.run.name),
            dir=os.environ.get("WANDB_DIR", str(config.run)),
            id=identity,
            resume="allow",
            config=config.model_dump(mode="json"),
            allow_val_change=True,
            # What is printed is written past Python's streams, too.
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def add(self, scalars: dict[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def close(self, finished: bool) -> None:
        code = 0 if finished else 1
        self.run.finish(code)
        self.teardown(code)


class MLflow:
    """A run of MLflow, in the place and the experiment that its own environment says; else in RUN/mlflow, as files.

    In names `@` is `_at_`, and what else MLflow does not allow is `_`. Parameters are the config that the run began
    with: they never change there. A run that is unknown in the place where it goes on begins anew there; one that was
    killed is RUNNING there until it goes on.
    """

    def __init__(self, config: Config) -> None:
        # Of MLflow's stores, files alone need no database; it asks that they be wanted.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (config.run / "mlflow").as_uri())
        self.identity = _identities(config.run).get("mlflow", "")
        if not (self.identity and self._goes_on()):
            self.identity = self.client.create_run(self._experiment(), run_name=config.run.name).info.run_id
            _keep(config.run, mlflow=self.identity)
            self._describe(config)

    def add(self, scalars: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_allowed(name), value, now, step) for name, value in scalars.items()]
        self.client.log_batch(self.identity, metrics=metrics)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.identity, "FINISHED" if finished else "FAILED")

    def _goes_on(self) -> bool:
        from mlflow import MlflowException

        try:
            self.client.update_run(self.identity, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _experiment(self) -> str:
        from mlflow import MlflowException

        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            made: str = self.client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            made = self.client.get_experiment_by_name(name).experiment_id
        return made

    def _describe(self, config: Config) -> None:
        from mlflow.entities import Param

        leaves = dotted(config.model_dump(mode="json"))
        params = [Param(_allowed(key), str(value)) for key, value in leaves.items()]
        for first in range(0, len(params), PARAMS):
            self.client.log_batch(self.identity, params=params[first : first + PARAMS])


def _allowed(name: str) -> str:
    return re.sub(r"[^\w./: -]", "_", name.replace("@", "_at_"))


def _identities(run: Path) -> dict[str, str]:
    """As what each tracker knows the run, by the tracker's name."""
    file = run / IDENTITIES
    with reading("trackers", file, "restore it from a copy, or remove it: the run begins anew there"):
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _keep(run: Path, **identities: str) -> None:
    write_atomically(run / IDENTITIES, json.dumps(_identities(run) | identities).encode())
