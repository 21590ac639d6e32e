"""What every benchmark needs: peak memory, how busy the machine was, runs that are not made twice, and the CSV file."""

from __future__ import annotations

import csv
import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
STEADY = 1.2
# Cores that others may take of those in use: the system itself needs a little.
SPARE = 0.1

Row = dict[str, Any]


class Memory:
    """The peak since `start`, beside what was held then: torch's on CUDA, the process's resident set on Linux."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.known = self.cuda or os.access("/proc/self/clear_refs", os.W_OK)

    def start(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        elif self.known:
            # Pages that malloc keeps would be used again unseen.
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.held = self._resident("VmRSS")

    def peak(self) -> float:
        """Bytes; NaN where the system does not tell."""
        if not self.known:
            return math.nan
        return (torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")) - self.held

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def own_seconds() -> float:
    """CPU time of this process and its children, those that ended too."""
    own = psutil.Process()
    mine = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in mine) + mine[0].children_user + mine[0].children_system


def wait_until_idle() -> None:
    """Until what this process and its children have begun ahead, in threads of their own, is done."""
    used = own_seconds()
    while True:
        time.sleep(0.25)
        before, used = used, own_seconds()
        if used - before < 0.025:
            return


class Neighbours:
    """The cores that processes other than this one and its children have held since it was made."""

    def __init__(self) -> None:
        self.began, self.before = time.perf_counter(), self._seconds()

    @staticmethod
    def _seconds() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - times.iowait - own_seconds()

    def busy(self, used: int, seconds: Mapping[str, Sequence[float]]) -> str | None:
        """Why figures taken on `used` cores are worthless; `seconds` are the rounds of each implementation, in turn.

        In the middle half of the rounds, an implementation's ratio to the first one may differ STEADY times.
        """
        cores = (self._seconds() - self.before) / (time.perf_counter() - self.began)
        if cores > (os.cpu_count() or 1) - used + SPARE:
            return f"busy machine: others held {cores:.1f} cores"
        # A round's implementations share what the machine was like meanwhile: they are compared within it.
        first, base = next(iter(seconds.items()))
        for name, rounds in seconds.items():
            low, high = np.quantile(np.divide(rounds, base), [0.25, 0.75])
            if high > STEADY * low:
                return f"busy machine: {name}'s ratio to {first} differs {high / low:.2f} times over rounds"
        return None


def on_one_core(log: Path, *arguments: str) -> tuple[float, float]:
    """`efficientclip ARGUMENTS` on one thread, printing into `log`; its CPU seconds and peak bytes."""
    command = [str(Path(sys.executable).with_name("efficientclip")), *arguments]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}, see {log}")
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def once(target: Path, *arguments: str) -> tuple[float, float]:
    """`on_one_core`, for a command that makes the folder `target`, unless the same command has made it since the files
    and folders that it names were made; what it spent lies beside it."""
    note = target.with_name(target.name + ".made.json")
    if target.is_dir() and note.is_file():
        made = json.loads(note.read_text())
        named = {Path(argument.rpartition("=")[2]) for argument in arguments} - {target}
        younger = [path for path in named if path.exists() and path.stat().st_mtime > note.stat().st_mtime]
        if made["arguments"] == list(arguments) and not younger:
            return made["cpu_seconds"], made["peak_bytes"]
    # What an interrupted command left would cost the second one less.
    shutil.rmtree(target, ignore_errors=True)
    note.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    cpu_seconds, peak_bytes = on_one_core(target.with_name(target.name + ".log"), *arguments)
    spent = {"arguments": arguments, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}
    note.write_text(json.dumps(spent))
    return cpu_seconds, peak_bytes


def kept(file: Path, measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What `measure` finds, or found when `file` was written."""
    if not file.is_file():
        file.write_text(json.dumps(measure()))
    found: dict[str, float] = json.loads(file.read_text())
    return found


@cache
def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else str(cpuinfo.get_cpu_info()["brand_raw"])


def record(rows: Iterable[Row], file: Path, key: Sequence[str], columns: Sequence[str]) -> None:
    """Writes the rows; earlier ones of the same key go."""
    kept: dict[tuple[str, ...], Row] = {}
    if file.exists():
        with file.open() as old:
            kept = {tuple(row[name] for name in key): row for row in csv.DictReader(old)}
    kept |= {tuple(str(row[name]) for name in key): row for row in rows}
    with file.open("w", newline="") as new:
        writer = csv.DictWriter(new, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def require_green(root: Path, *tests: str) -> None:
    """Ends the program where the tests of what is to be measured are red."""
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=root, check=False).returncode:
        sys.exit("the tests of the tower or of the loss are red: nothing is measured")


def show_and_record(
    rows: Sequence[Row],
    shown: Sequence[str],
    title: str,
    busy: str | None,
    file: Path,
    key: Sequence[str],
    columns: Sequence[str],
) -> None:
    """A table of the `shown` columns; the rows are recorded, unless the machine was `busy`."""
    table = Table(*shown, title=title)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in shown))
    Console(width=150).print(table)
    if busy:
        print(f"{busy}; nothing recorded")
    else:
        record(rows, file, key, columns)
