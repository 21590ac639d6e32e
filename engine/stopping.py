"""How a process ends on SIGTERM, SIGINT (Ctrl-C), SIGHUP or its launcher's death: in seconds, without a traceback.

By default at once, with exit code 128 + the signal's number; within `finishing`, when the work has come to a point from
which it can go on, or at the latest after some seconds. A second Ctrl-C always ends at once.

A thread does it: Python's own handlers wait for the main thread, which may be inside a long product or a collective.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import psutil

from .errors import close_bars

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NODE_LAUNCHER = "deepspeed.launcher.launch"
# mpirun is any of these by name, and its daemons on other nodes; Slurm's calls itself `slurmstepd: [JOB.STEP]`.
MPI = ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy")
LAUNCHERS = (NODE_LAUNCHER, "torch.distributed.run", "deepspeed", "torchrun")
PROGRAMS = ("bin/deepspeed", "bin/torchrun", "torch/distributed/run.py", "deepspeed/launcher/launch.py")
GOES_ON = "the same command goes on"
POLL_SECONDS = 0.5
# `timeout` tells its child and then its group: that is one Ctrl-C, not two.
ECHO_SECONDS = 0.5
WORD_SECONDS = 3


class _Stop:
    """What this process was told, and how long it may take."""

    owner = 0
    signum: int | None = None
    patience: float | None = None
    quiet = False
    stderr = 2
    word: Callable[[int], object] | None = None


_stop = _Stop()
_scratch: set[Path] = set()


def watch() -> None:
    """From now on signals, and the launcher's death, end this process as the module says; of ranks, the first tells.

    Call it from the main thread, as early as possible.
    """
    _stop.quiet = rank_of_environment() > 0
    if _stop.owner == os.getpid():
        return
    _stop.owner, _stop.signum, _stop.patience = os.getpid(), None, None
    # While DeepSpeed loads an operator, what is written to 2 goes nowhere.
    _stop.stderr = os.dup(2)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for signum in SIGNALS:
        # `nohup` ignores SIGHUP, and means it.
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)
    threading.Thread(target=_listen, args=(heard,), name="stopping", daemon=True).start()


def rank_of_environment() -> int:
    """As the launcher set it; 0 where there is none."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def requested() -> int | None:
    """The signal that told this process to end, if any."""
    return _stop.signum


@contextmanager
def finishing(seconds: float) -> Iterator[None]:
    """Within, a signal leaves the process `seconds` to come to an end by itself: look at `requested`."""
    _stop.patience = seconds
    try:
        yield
    finally:
        _stop.patience = None


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """`folder` goes with the context, also where a signal ends the process."""
    _scratch.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _scratch.discard(folder)


def name_of(signum: int) -> str:
    return signal.Signals(signum).name


def before_leaving(word: Callable[[int], object]) -> None:
    """Call `word` with the exit code before a signal ends this process; it has some seconds."""
    _stop.word = word


def leave_stopped(signum: int | None = None) -> NoReturn:
    """End the process now, as stopped by `signum`, or else by the signal that it was told."""
    found = signum or _stop.signum or signal.SIGTERM
    if _stop.word is not None:
        saying = threading.Thread(target=_stop.word, args=(128 + found,), daemon=True)
        saying.start()
        saying.join(WORD_SECONDS)
    leave(128 + found, None if _stop.quiet else f"stopped by {name_of(found)}; {GOES_ON}")


def end_with_parent() -> None:
    """A process of a pool whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def end_children() -> None:
    """Kill the processes that this one started, and those that they started."""
    with suppress(Exception):
        for child in psutil.Process().children(recursive=True):
            child.kill()


_leaving = threading.Lock()


def leave(code: int, message: str | None = None) -> NoReturn:
    """End the process now, with those that it started, whatever its threads are at; the first to come here says why."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()
    # A pipe that nobody reads, or a lock that the main thread holds, must not keep the process.
    saying = threading.Thread(target=_say, args=(message,), daemon=True)
    saying.start()
    saying.join(1)
    end_children()
    if _scratch:
        # The main thread may be writing there still, and `exec` ends it first.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with suppress(OSError):
            os.execv("/bin/sh", ["sh", "-c", 'rm -rf -- "$@"; exit "$0"', str(code), *map(str, _scratch)])
    os._exit(code)


def _say(message: str | None) -> None:
    with suppress(Exception):
        close_bars()
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        if message is not None:
            os.write(_stop.stderr, f"{message}\n".encode(errors="replace"))


def _forget() -> None:
    """A forked child has no listening thread, and must not wake its parent's."""
    if _stop.owner not in (0, os.getpid()):
        signal.set_wakeup_fd(-1)
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _listen(heard: int) -> NoReturn:
    launchers, orphaned = _launchers()
    first = deadline = 0.0
    while True:
        ready, _, _ = select.select([heard], [], [], POLL_SECONDS)
        told = [signum for signum in os.read(heard, 64) if signum in SIGNALS] if ready else []
        if orphaned or any(not _lives(launcher) for launcher in launchers):
            told.append(signal.SIGTERM)
        for signum in told:
            if _stop.signum is None:
                _stop.signum, first = signum, time.monotonic()
                deadline = first + (_stop.patience or 0)
            elif signum == signal.SIGINT and time.monotonic() > first + ECHO_SECONDS:
                leave_stopped()
        if _stop.signum is not None and time.monotonic() >= deadline:
            leave_stopped()


def _launchers() -> tuple[list[psutil.Process], bool]:
    """The processes above this one that started it as a rank, and whether one of them has gone already."""
    found: list[psutil.Process] = []
    try:
        above = psutil.Process().parent()
        while above is not None and _launches(above):
            found.append(above)
            above = above.parent()
        # `init` adopts orphans; as the first process of a container, pid 1 is of their own session.
        adopted = (above is None or above.pid == 1) and os.getsid(0) != os.getsid(1)
        lost = bool(found) and NODE_LAUNCHER in found[-1].cmdline()
    except (psutil.Error, OSError):
        return found, False
    # All launchers but Slurm's set one of these; a rank that `init` has adopted had a launcher.
    unfound = not found and bool(
        os.environ.keys() & {"CROSS_RANK", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_FD"}
    )
    return found, adopted and (lost or unfound)


def _launches(process: psutil.Process) -> bool:
    words = process.cmdline()
    if not words:
        return False
    program = os.path.basename(words[0])
    return (
        program in MPI
        or program.startswith("slurmstepd")
        or any(word in LAUNCHERS or word.endswith(PROGRAMS) for word in words)
    )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
