"""What every part is handed: the device, a clock, and the table that figures go into as they are found."""

from __future__ import annotations

import csv
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkout
from benchmarks.gpu.device import DEVICES, Call, Cuda

COLUMNS = (
    "date", "hardware", "torch", "triton", "command", "part", "what", "seconds", "floor_s", "of_floor", "figure",
    "unit", "verdict", "note",
)  # fmt: skip
# What a run must not end with.
BAD = ("WRONG", "failed", "late")
SCALE, BIAS = 14.3, -10.0

Row = dict[str, str]


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without."""

    flop: float = 0
    bytes: float = 0


class Results:
    """A CSV file that rows are appended to, each at once."""

    def __init__(self, file: Path, command: str, hardware: str) -> None:
        self.file = file
        self.run = {
            "date": str(date.today()), "hardware": hardware, "torch": torch.__version__, "triton": version("triton"),
            "command": command,
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> None:
        new = not self.file.exists() or not self.file.stat().st_size
        with self.file.open("a", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(self.run | values)

    def rows(self, after: int = 0) -> list[Row]:
        """Those from this number on."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as source:
            return list(csv.DictReader(source))[after:]


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


class Lab:
    def __init__(
        self, device: Cuda, part: str, results: Results, rates: Sequence[float] = (), wheels: Path | None = None
    ) -> None:
        self.device, self.part, self.results, self.wheels = device, part, results, wheels
        self.flops, self.bandwidth = rates or device.rates
        device.prepare()

    # Figures

    def note(self, what: str, seconds: float | None = None, work: Work | None = None, **values: Any) -> None:
        """A row; with the floor that the ceilings set, where the work is known."""
        if seconds is not None:
            values["seconds"] = f"{seconds:.4g}"
        floor = max(work.flop / self.flops, work.bytes / self.bandwidth) if work else 0
        if seconds and floor:
            values |= {"floor_s": f"{floor:.4g}", "of_floor": f"{seconds / floor:.2f}"}
        self.results.add(part=self.part, what=what, **values)

    @contextmanager
    def attempt(self, what: str, must: bool = True) -> Iterator[None]:
        """What fails is named, and the rest goes on; `must` tells whether the run is bad then."""
        try:
            yield
        except Exception as error:
            if must:
                traceback.print_exc()
            self.note(what, verdict="failed" if must else "no figure", note=words(error))

    def seconds(self, call: Call) -> float:
        return self.race({"": call})[""]

    def race(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Median seconds of each, in turn, so that a clock that falls meanwhile falls on all."""
        for call in calls.values():
            call()
        samples = [{name: self.device.sample(call) for name, call in calls.items()}]
        least, most = self.device.rounds
        rounds = max(least, min(most, int(self.device.budget * len(calls) / max(sum(samples[0].values()), 1e-9))))
        samples += [{name: self.device.sample(call) for name, call in calls.items()} for _ in range(rounds - 1)]
        return {name: statistics.median(sample[name] for sample in samples) for name in calls}

    def alone(self, launch: Call) -> float:
        """Seconds of one launch, by a graph of several."""
        times = self.device.launches
        return self.seconds(self.device.graph(launch, times)) / times

    # Processes

    def spread(self, work: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """(number, what `work(device, *given[number])` returned or raised), as they end, in processes of their own.

        They also fill Triton's cache, which every process on this machine shares.
        """
        with ProcessPoolExecutor(
            min(self.device.processes, len(given)), get_context("spawn"), _prepare, (self.device.type,)
        ) as pool:
            jobs = {pool.submit(_work, work, self.device.type, one): number for number, one in enumerate(given)}
            for job in as_completed(jobs):
                yield jobs[job], job.exception() or job.result()


def _prepare(device: str) -> None:
    checkout.register()
    # 16 processes with a thread for every core each would fight for the cores.
    torch.set_num_threads(1)
    DEVICES[device].prepare()


def _work(work: Callable[..., Any], device: str, given: Iterable[Any]) -> Any:
    return work(DEVICES[device], *given)
