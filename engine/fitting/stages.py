"""Stages of `fit`: commands of this package, in a process each, or a rank a device, with a line of progress."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from .. import stopping
from ..errors import UserError
from ..files.atomic import write_atomically
from ..launchers import free_port

POLL_SECONDS, TAIL = 0.2, 1 << 14
# A checkpoint, and the end of ranks.
GRACE_SECONDS = 40
BREAKS = re.compile(r"[\r\n]+")


@dataclass(frozen=True)
class Stage:
    """`words` is a command of this package; on `ranks`, where that is more than 0, by the deepspeed launcher. It shall
    take `seconds` (None: not told), and is done once `made` is there."""

    name: str
    words: Sequence[str]
    seconds: float | None = None
    ranks: int = 0
    made: Sequence[Path] = ()
    folder: Path | None = None


class Stages:
    """Runs stages, once each: what was done stands in `file`, with the seconds it took; their output in `logs`."""

    def __init__(self, file: Path, logs: Path, console: Console) -> None:
        self.file, self.logs, self.console = file, logs, console
        self.done: dict[str, float] = {}
        self.told = self.took = 0.0
        with suppress(OSError, ValueError):
            self.done = json.loads(file.read_text(encoding="utf-8"))

    def log_of(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name.rpartition(' ')[2]}.log"

    def finished(self, stage: Stage) -> bool:
        return stage.name in self.done and all(made.exists() for made in stage.made)

    def note(self, name: str, seconds: float) -> None:
        self.done[name] = round(seconds, 2)
        self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(self.done, indent=1).encode())

    def forget(self, stages: Sequence[Stage]) -> None:
        """Let them be done anew; whoever depends on them, too."""
        self.done = {name: spent for name, spent in self.done.items() if name not in {stage.name for stage in stages}}
        self.done.pop("cleaned", None)
        self._write()

    def run(self, stages: Sequence[Stage], *, after: int = 0, of: int = 0) -> None:
        """Those that are not done yet, of `of` in all, `after` others; UserError with what the command said where one
        fails."""
        for number, stage in enumerate(stages, after + 1):
            if self.finished(stage):
                continue
            left = sum(later.seconds or 0 for later in stages[number - after - 1 :] if not self.finished(later))
            title = f"{number}/{of or len(stages)} {stage.name}"
            spent = self._run(stage, title, left)
            self.note(stage.name, spent)
            told = "" if stage.seconds is None else f" (told: {span(stage.seconds)})"
            self.console.print(f"{title}: {span(spent)}{told}", highlight=False)

    def run_anyway(self, stage: Stage) -> None:
        """One that finds out by itself whether there is anything to do."""
        spent = self._run(stage, stage.name, stage.seconds or 0)
        said = last_line(self.log_of(stage))
        self.console.print(f"{stage.name}: {span(spent)}; {said}", highlight=False, soft_wrap=True)

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Each of them anyway, in turn."""
        for number, stage in enumerate(stages, 1):
            self.run_anyway(replace(stage, name=f"{number}/{len(stages)} {stage.name}"))

    def _run(self, stage: Stage, title: str, left: float) -> float:
        """Seconds that the stage took."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.log_of(stage)
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[said]}")
        with (
            log.open("wb") as stream,
            stopping.finishing(GRACE_SECONDS),
            Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars,
        ):
            bar = bars.add_task(title, total=stage.seconds, said="")
            started = time.monotonic()
            process = subprocess.Popen(
                command(stage), stdout=stream, stderr=subprocess.STDOUT, env=environment(stage), cwd=stage.folder
            )
            while process.poll() is None:
                if (signum := stopping.requested()) is not None:
                    _end(process)
                    stopping.leave_stopped(signum)
                time.sleep(POLL_SECONDS)
                spent = time.monotonic() - started
                remaining = f"{span(max(left - spent, 0))} left in all" if left else ""
                bars.update(bar, completed=spent, said=f"{span(spent)}  {remaining}  {_lines(log)[-1][:90]}")
        if process.returncode:
            if (signum := stopping.requested()) is not None:
                stopping.leave_stopped(signum)
            raise UserError(
                f"{stage.name}: ended with code {process.returncode}: {_said(log)}; all it said is in {log}; the same"
                " command goes on from here"
            )
        spent = time.monotonic() - started
        self.told, self.took = self.told + (stage.seconds or 0), self.took + spent
        return spent


def command(stage: Stage) -> list[str]:
    """The command line of a stage."""
    if stage.ranks == 0:
        return [sys.executable, "-m", "efficientclip", *stage.words]
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if launcher is None:
        raise UserError(f"deepspeed: no launcher beside {sys.executable}, nor on PATH; pip install deepspeed")
    module = f"efficientclip.{stage.words[0].replace('-', '_')}"
    # The launcher's own is the same for every training on this machine.
    own = "--quiet", "--num_accelerators", str(stage.ranks), "--master_port", str(free_port())
    return [launcher, *own, "--module", module, *stage.words[1:]]


def environment(stage: Stage) -> dict[str, str]:
    """That of its process: threads share the cores among the ranks of a CPU."""
    found = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    found["OMP_NUM_THREADS"] = str(max(1, cores // max(1, stage.ranks)))
    if on_cpu():
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def devices() -> int:
    """Ranks that training takes: a device each, or two on CPUs, which share their cores."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS / 2)


def last_line(log: Path) -> str:
    """What was written last; bars write over themselves."""
    return next((line for line in reversed(_lines(log)) if line and "%|" not in line), "")


def _said(log: Path) -> str:
    """The error that a command ended with, or its last line."""
    lines = [line for line in _lines(log) if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else (lines[-1] if lines else "it said nothing")


def _lines(log: Path) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        return [line.strip() for line in BREAKS.split(stream.read().decode("utf-8", "replace"))]


def span(seconds: float) -> str:
    """A length of time in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else (f"{minutes} min {rest} s" if minutes else f"{rest} s")
