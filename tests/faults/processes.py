"""Starting a command as its user would, in the background; telling it signals; finding what it leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import psutil

from efficientclip.launchers import free_port
from tests.faults.namespace import Namespace, enter
from tests.training.launch import SERVER, environment

MARK = "EFFICIENTCLIP_FAULT"
# Seconds that anything may take to end after it was told to.
PATIENCE = 20.0
ENDLESS = 90.0
# DeepSpeed's looks once a second.
LAUNCHER_POLL = 0.5
ENGINE = ("efficientclip.cli", "efficientclip.train", "efficientclip.cross_fit", "efficientclip.prepare.build",
          "efficientclip.export")  # fmt: skip
TOLD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_starting = threading.Lock()


@dataclass(frozen=True)
class Plan:
    """One process of a command: `module`'s main with `arguments`, in `folder`."""

    module: str
    arguments: tuple[str, ...]
    folder: Path
    log: Path
    environment: dict[str, str]
    namespace: int | None = None


def _hear() -> None:
    for signum in TOLD:
        signal.signal(signum, signal.SIG_DFL)


def _enter(plan: Plan) -> None:
    """The forked process."""
    _hear()
    os.setsid()
    with plan.log.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if plan.namespace is not None:
        enter(plan.namespace)
    # As in a program of its own: semaphores of the server's way to start processes would stay behind a SIGKILL.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(plan.folder)
    os.environ.clear()
    os.environ.update(plan.environment)
    sys.argv = ["efficientclip", *plan.arguments]
    sys.exit(import_module(plan.module).main())


@dataclass
class Ended:
    """How a command's first processes ended: their exit codes, and the seconds until all of its processes were gone."""

    codes: list[int | None]
    seconds: float
    survivors: int
    output: str


class Tree:
    """The processes of one command: those that the harness started, and whatever they started."""

    def __init__(self, folder: Path, place: Path) -> None:
        """It runs in `folder`; logs, temporary files and the user's cache lie in `place`."""
        self.folder, self.place, self.mark = folder, place, uuid.uuid4().hex
        self.roots: list[BaseProcess | subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        self.sessions: set[int] = set()
        for name in ("tmp", "cache"):
            (place / name).mkdir(parents=True, exist_ok=True)

    def _environment(self, **extra: str) -> dict[str, str]:
        private = {"XDG_CACHE_HOME": str(self.place / "cache"), "TMPDIR": str(self.place / "tmp")}
        return environment(OMP_NUM_THREADS="1", **private, **extra, **{MARK: self.mark})

    def _log(self) -> Path:
        log = self.place / f"{self.mark}-{len(self.logs)}.log"
        log.touch()
        self.logs.append(log)
        return log

    def fork(
        self, module: str, arguments: Sequence[str], namespace: Namespace | None = None, **extra: str
    ) -> BaseProcess:
        """A process whose imports are done already."""
        inside = None if namespace is None else namespace.pid
        plan = Plan(module, tuple(arguments), self.folder, self._log(), self._environment(**extra), inside)
        process = SERVER.Process(target=_enter, args=(plan,))
        with _starting:
            # The server outlives this call and imports in this environment.
            SERVER.set_forkserver_preload([*ENGINE, "efficientclip.planning.profile", __name__])
            with patch.dict(os.environ, environment(OMP_NUM_THREADS="1")):
                process.start()
        assert process.pid is not None
        self.roots.append(process)
        self.sessions.add(process.pid)
        # Before, a signal would meet the server's handlers.
        while process.exitcode is None and not _leads_session(process.pid):
            time.sleep(0.0005)
        return process

    def fork_ranks(self, module: str, arguments: Sequence[str], namespaces: Sequence[Namespace | None]) -> None:
        """As many ranks as `namespaces`, in the environment that a launcher gives them."""
        port = str(free_port())
        for rank, namespace in enumerate(namespaces):
            given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(namespaces))}
            self.fork(module, arguments, namespace, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **given)

    def start(self, command: list[str], namespace: Namespace | None = None) -> None:
        """A program with imports of its own, in a process group of its own."""
        if namespace is not None:
            command = namespace.command(self.folder, command)
        with self._log().open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # Behind a shell, or under nohup, it would ignore what the case sends it.
                preexec_fn=_hear,
            )
        self.roots.append(process)
        self.sessions.add(process.pid)

    def codes(self) -> list[int | None]:
        return [root.exitcode if isinstance(root, BaseProcess) else root.poll() for root in self.roots]

    def lives(self) -> bool:
        """Whether one of the first processes is at work."""
        return None in self.codes()

    def pids(self) -> list[int]:
        return [root.pid for root, code in zip(self.roots, self.codes(), strict=True) if code is None and root.pid]

    def members(self) -> list[psutil.Process]:
        """Every process of the command that lives, known by its session or by the mark in its environment."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) in self.sessions or process.environ().get(MARK) == self.mark
        except (psutil.Error, ProcessLookupError):
            return False

    def ranks(self) -> list[psutil.Process]:
        """Those that train, under a launcher or not."""
        return [process for process in self.members() if "--local_rank" in " ".join(_command(process))]

    def wait(self, seconds: float = ENDLESS, *, relaunched: bool = True) -> Ended:
        """Wait for the end of all processes; what is left after `seconds` is counted and killed.

        `relaunched`: as a launcher does, end the other ranks once one has failed.
        """
        started, failed, told = time.monotonic(), 0.0, False
        while time.monotonic() < started + seconds:
            codes = self.codes()
            if None not in codes and not self.members():
                break
            if relaunched and None in codes and any(code not in (None, 0) for code in codes):
                failed = failed or time.monotonic()
                if not told and time.monotonic() > failed + LAUNCHER_POLL:
                    told = True
                    for pid in self.pids():
                        send(pid, signal.SIGTERM)
            time.sleep(0.005 if None in codes else 0.05)
        took, codes = time.monotonic() - started, self.codes()
        left = self.members()
        self.kill()
        return Ended(codes, took, len(left), self.output())

    def kill(self) -> None:
        """SIGKILL for every process of the command."""
        for process in self.members():
            send(process.pid, signal.SIGKILL)
        for root in self.roots:
            if isinstance(root, BaseProcess):
                root.join(10)
            else:
                root.wait(10)

    def output(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in self.logs)


def _leads_session(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return True


def send(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def send_group(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signum)


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for the signal: before, its default ends it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return mask is None or bool(int(mask[1], 16) >> (signum - 1) & 1)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(reached: Callable[[], bool], process: Tree, seconds: float = ENDLESS) -> bool:
    """Wait until `reached`; False: the command ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if reached():
            return True
        if not process.lives():
            return False
        time.sleep(0.0004)
    return False


def tracebacks(output: str) -> tuple[int, int]:
    """How many stacks of frames the engine printed, Python's and C++'s, and how many DeepSpeed's launcher, or Python
    itself, which a Ctrl-C met before it ran a line of ours."""
    engine = launcher = 0
    for part in output.split("Traceback (most recent call last)")[1:]:
        frames = [line for line in part.splitlines() if line.lstrip().startswith('File "')]
        ours = any("efficientclip" in frame or "/engine/" in frame for frame in frames)
        launchers = any("deepspeed/launcher/" in frame or "bin/deepspeed" in frame for frame in frames)
        if not ours and (launchers or "KeyboardInterrupt" in part):
            launcher += 1
        else:
            engine += 1
    return engine + output.count("(most recent call first):"), launcher


def errors(output: str) -> list[str]:
    """What tells a user what went wrong: from `error: ` to the end of its indented lines."""
    return [found.rstrip() for found in re.findall(r"^error: .*\n?(?:[ \t]+.*\n?)*", output, re.MULTILINE)]
