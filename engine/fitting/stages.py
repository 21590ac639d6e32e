"""Stages of `fit`: commands of this package, in a process each, or a rank a device, with a line of progress.

A stage begins when those before it that it waits for are done: on a CPU the start of a process leaves cores idle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

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
    take `seconds` (None: not told), and is done once `made` is there. Of the stages before it, it waits for those named
    in `waits` (None: for all)."""

    name: str
    words: Sequence[str]
    seconds: float | None = None
    ranks: int = 0
    made: Sequence[Path] = ()
    folder: Path | None = None
    waits: Sequence[str] | None = None


@dataclass(frozen=True)
class _Job:
    """A stage that runs."""

    stage: Stage
    process: subprocess.Popen[bytes]
    started: float
    bar: TaskID

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started


class Stages:
    """Runs stages, once each: what was done stands in `file`, with the seconds it took; their output in `logs`."""

    def __init__(self, file: Path, logs: Path, console: Console) -> None:
        self.file, self.logs, self.console = file, logs, console
        self.done: dict[str, float] = {}
        self.told = self.took = 0.0
        with suppress(OSError, ValueError):
            self.done = json.loads(file.read_text(encoding="utf-8"))

    def log_of(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name}.log"

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

        def ended(stage: Stage, title: str, spent: float) -> None:
            self.note(stage.name, spent)
            told = "" if stage.seconds is None else f" (told: {span(stage.seconds)})"
            self.console.print(f"{title}: {span(spent)}{told}", highlight=False)

        numbered = {
            f"{number}/{of or len(stages)} {stage.name}": stage for number, stage in enumerate(stages, after + 1)
        }
        self._run({title: stage for title, stage in numbered.items() if not self.finished(stage)}, ended)

    def run_anyway(self, *stages: Stage) -> None:
        """Such as find out by themselves whether there is anything to do."""

        def ended(stage: Stage, title: str, spent: float) -> None:
            said = last_line(self.log_of(stage)).replace(f"{Path.cwd()}/", "")
            self.console.print(f"{title}: {span(spent)}; {said}", highlight=False, soft_wrap=True)

        of = len(stages)
        self._run(
            {f"{number}/{of} {stage.name}" if of > 1 else stage.name: stage for number, stage in enumerate(stages, 1)},
            ended,
        )

    def _run(self, unfinished: dict[str, Stage], ended: Callable[[Stage, str, float], None]) -> None:
        """All of `unfinished`, by title and in their order, each as soon as it may begin; none is left there."""
        self.logs.mkdir(parents=True, exist_ok=True)
        running: dict[str, _Job] = {}
        began, told = time.monotonic(), _ends(unfinished, running)
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[said]}")
        with (
            stopping.finishing(GRACE_SECONDS),
            Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars,
        ):
            try:
                while unfinished:
                    before: list[str] = []
                    for title, stage in unfinished.items():
                        waits = before if stage.waits is None else [name for name in before if name in stage.waits]
                        if title not in running and not waits:
                            running[title] = self._begun(stage, title, bars)
                        before.append(stage.name)
                    time.sleep(POLL_SECONDS)
                    if (signum := stopping.requested()) is not None:
                        _end(running.values())
                        stopping.leave_stopped(signum)
                    left = _ends(unfinished, running)
                    for title, job in list(running.items()):
                        self._show(job, bars, left)
                        if job.process.poll() is not None:
                            self._require_done(job)
                            bars.remove_task(job.bar)
                            del running[title], unfinished[title]
                            ended(job.stage, title, job.spent)
            finally:
                _end(running.values())
        self.told, self.took = self.told + told, self.took + time.monotonic() - began

    def _begun(self, stage: Stage, title: str, bars: Progress) -> _Job:
        bar = bars.add_task(title, total=stage.seconds, said="")
        with self.log_of(stage).open("wb") as log:
            process = subprocess.Popen(
                command(stage), stdout=log, stderr=subprocess.STDOUT, env=environment(stage), cwd=stage.folder
            )
        return _Job(stage, process, time.monotonic(), bar)

    def _show(self, job: _Job, bars: Progress, left: float) -> None:
        remaining = f"{span(left)} left in all" if left else ""
        said = f"{span(job.spent)}  {remaining}  {_lines(self.log_of(job.stage))[-1][:90]}"
        bars.update(job.bar, completed=job.spent, said=said)

    def _require_done(self, job: _Job) -> None:
        """UserError with what a stage said that did not end well."""
        code, log = job.process.returncode, self.log_of(job.stage)
        if code and (signum := stopping.requested()) is not None:
            stopping.leave_stopped(signum)
        if code:
            raise UserError(
                f"{job.stage.name}: ended with code {code}: {_said(log)}; all it said is in {log}; the same command"
                " goes on from here"
            )


def _ends(stages: Mapping[str, Stage], running: Mapping[str, _Job]) -> float:
    """Seconds until all `stages` are done, by title, as they are told to take; `running` have spent some of theirs."""
    ends: dict[str, float] = {}
    for title, stage in stages.items():
        before = [ends[name] for name in (ends if stage.waits is None else stage.waits) if name in ends]
        spent = running[title].spent if title in running else 0.0
        ends[stage.name] = max(before, default=0.0) + max((stage.seconds or 0.0) - spent, 0.0)
    return max(ends.values(), default=0.0)


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
    """That of its process: threads share the cores among the ranks of a CPU, and leave some to a stage beside it."""
    found = dict(os.environ)
    # Threads of two processes that wait for each other, spinning, on the same cores are slower than one each.
    processes = stage.ranks or (1 if stage.waits is None else 2)
    found["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    if on_cpu():
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def devices() -> int:
    """Ranks that training takes: a device each, or two on CPUs, which share their cores."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def _end(jobs: Collection[_Job]) -> None:
    """Tell them to end, and wait until they have."""
    for job in jobs:
        job.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS / 2
    for job in jobs:
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(max(0.0, deadline - time.monotonic()))


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
