"""All that is to be seen on a GPU, in one command of eight minutes: ceilings, right values, speeds, choices, peers.

    make gpu                 or    python -m benchmarks.gpu [--wheels DIR]
    make gpu-rehearsal       the same program on a CPU, with tiny shapes in Triton's interpreter

It runs from a checkout: torch, triton, numpy, pytest and transformers are all it needs. Each part is a process of its
own with a limit; one that fails or is late is named, and the rest goes on. Figures go into the CSV file as they come.

Exit code 0 if all is right, 1 if anything is wrong, failed or late, 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from benchmarks import checkout
from benchmarks.gpu import ceilings
from benchmarks.gpu.device import DEVICES
from benchmarks.gpu.lab import BAD, Lab, Results, Row

ROOT = checkout.ROOT
DEFAULT = {"cuda": ROOT / "benchmarks" / "results" / "gpu.csv", "cpu": ROOT / ".cache" / "gpu-rehearsal.csv"}
# Seconds that a part may take, in the order of what must be known first; and all of them together.
PARTS = {"ceilings": 30, "values": 90, "kernels": 90, "choices": 120, "whole": 60, "peers": 60, "step": 60}
LIMIT = 480
SHOWN = ("what", "seconds", "of_floor", "figure", "unit", "verdict", "note")


def command(given: argparse.Namespace, part: str, rates: Sequence[float]) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--device", given.device]
    words += ["--results", str(given.results), "--command", given.command]
    words += ["--wheels", str(given.wheels)] if given.wheels else []
    return words + (["--rates", *map(str, rates)] if rates else [])


def finish(words: list[str], seconds: float) -> str | None:
    """Runs a part, with what it starts; why it is bad, if it is."""
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "late"
    finally:
        # Its own group alone, of which some may live on.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"failed with exit code {code}" if code else None


def run_all(given: argparse.Namespace, results: Results) -> int:
    first, began = len(results.rows()), time.perf_counter()
    rates: Sequence[float] = ()
    patience = DEVICES[given.device].patience
    for part, limit in PARTS.items():
        started = time.perf_counter()
        left = patience * LIMIT - (started - began)
        print(f"{part} …", flush=True)
        reason = finish(command(given, part, rates), min(patience * limit, left))
        seconds = time.perf_counter() - started
        if reason:
            verdict, _, note = reason.partition(" ")
            results.add(part=part, what=f"part {part}", seconds=f"{seconds:.1f}", verdict=verdict, note=note)
        print(f"{part}: {reason or 'done'}, {seconds:.1f} s", flush=True)
        rates = rates or ceilings.rates(results.rows(first)) or ()
    rows = results.rows(first)
    show(rows)
    bad = [row for row in rows if row["verdict"] in BAD]
    print(f"{len(rows)} figures in {given.results}, {len(bad)} of them bad, {time.perf_counter() - began:.0f} s")
    for row in bad:
        print(f"{row['verdict']}: {row['part']}, {row['what']}: {row['note']}")
    return int(bool(bad))


def show(rows: list[Row]) -> None:
    """A table a part."""
    for part in dict.fromkeys(row["part"] for row in rows):
        table = [dict(zip(SHOWN, SHOWN, strict=True)), *(row for row in rows if row["part"] == part)]
        widths = {name: max(len(row[name]) for row in table) for name in SHOWN}
        print(f"\n== {part}")
        for row in table:
            print("  ".join(row[name].ljust(widths[name]) for name in SHOWN).rstrip()[:200])
    print()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=DEVICES, help="cpu: to rehearse this program")
    parser.add_argument("--results", type=Path, help="CSV file that rows are appended to")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers that are not installed")
    parser.add_argument("--part", help="one part alone, in this process")
    parser.add_argument("--command", help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=float, nargs=2, default=(), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = DEVICES[given.device]
    if reason := device.refusal():
        print(reason, file=sys.stderr)
        return 2
    # Triton is told before it is imported.
    os.environ |= device.environment
    given.results = (given.results or DEFAULT[given.device]).absolute()
    given.command = given.command or " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])])
    results = Results(given.results, given.command, device.name())
    if given.part is None:
        return run_all(given, results)
    checkout.register()
    lab = Lab(device, given.part, results, given.rates, given.wheels)
    with lab.attempt(f"part {given.part}"):
        import_module(f"benchmarks.gpu.{given.part}").run(lab)
    return 0


if __name__ == "__main__":
    sys.exit(main())
