"""Does `efficientclip plan`, calibrated by a profile, tell what a run takes? A profile, the run, and the difference.

    python -m benchmarks.plan configs/demo.yaml [key=value …] --ranks 2

Peak memory is the resident set of the rank with most, as the system counted it. A second profile behind the run shows
how much the machine changed meanwhile: what it would have predicted stands beside.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil
import torch

from benchmarks.measuring import RESULTS, Neighbours, Row, hardware, record
from efficientclip.config import load_config
from efficientclip.launchers import free_port
from efficientclip.planning.measured import read_profile
from efficientclip.planning.plan import DAY, Plan, plan
from efficientclip.planning.settings import GIB, settings_of

COLUMNS = (
    "date", "hardware", "torch", "command", "ranks", "pair_visits", "batch_size", "planned_s", "measured_s",
    "time_error", "planned_after_s", "planned_gib", "measured_gib", "memory_error", "others_cores", "note",
)  # fmt: skip
KEY = ("date", "hardware", "torch", "command", "ranks")


def launched(ranks: int, module: str, *arguments: str) -> tuple[str, float]:
    """Runs a module by the `deepspeed` launcher; what it printed, and the peak bytes of its largest process."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators", str(ranks)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*launcher, "--master_port", str(free_port()), "--module", module, *arguments],
            env=os.environ | {"PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, *(_peak(child) for child in psutil.Process(process.pid).children(recursive=True)), 0.0)
            time.sleep(0.2)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{text[-4000:]}")
    return text, peak


def _peak(process: psutil.Process) -> float:
    """Bytes; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


def planned(config: Path, overrides: list[str], profile: Path) -> Plan:
    return plan(load_config(config, overrides), settings_of(read_profile(profile)))


def compare(config: Path, overrides: list[str], ranks: int, steps: int, warm_up: int, folder: Path) -> Row:
    """Profile, run, profile; planned and measured figures of the run."""
    lasting = [*overrides, f"run={folder / 'run'}"]
    settings = load_config(config, lasting)
    neighbours, began = Neighbours(), time.perf_counter()
    profiles = [folder / "before.json", folder / "after.json"]
    options = [["--warm-up", str(warm_up), "--steps", str(steps), "--output", str(file)] for file in profiles]
    launched(ranks, "efficientclip.profile", str(config), *lasting, *options[0])
    printed, peak = launched(ranks, "efficientclip.train", str(config), *lasting)
    launched(ranks, "efficientclip.profile", str(config), *lasting, *options[1])
    found = re.search(r"pair visits on \d+ rank\(s\) in (\d+) s", printed)
    if found is None:
        raise RuntimeError(f"the run did not end:\n{printed[-4000:]}")
    seconds = float(found[1])
    before, after = (planned(config, lasting, file) for file in profiles)
    times = [made.days(next(iter(made.rates.values())), before=False) * DAY for made in (before, after)]
    memory = sum(before.memory.values())
    others = (neighbours._seconds() - neighbours.before) / (time.perf_counter() - began)
    return {
        "date": date.today(),
        "hardware": hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__,
        "command": " ".join(["python -m benchmarks.plan", str(config), *overrides]),
        "ranks": ranks,
        "pair_visits": settings.training.pair_visits,
        "batch_size": settings.training.batch_size,
        "planned_s": f"{times[0]:.0f}",
        "measured_s": f"{seconds:.0f}",
        "time_error": f"{times[0] / seconds - 1:+.3f}",
        "planned_after_s": f"{times[1]:.0f}",
        "planned_gib": f"{memory / GIB:.3f}",
        "measured_gib": f"{peak / GIB:.3f}",
        "memory_error": f"{memory / peak - 1:+.3f}",
        "others_cores": f"{others:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a profile")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--note", default="", help="for the row: what a reader must know of data or machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of plan.csv")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        row = compare(given.config, given.overrides, given.ranks, given.steps, given.warm_up, Path(folder))
    record([row | {"note": given.note}], given.results / "plan.csv", KEY, COLUMNS)
    for name, value in row.items():
        print(f"{name:>16}  {value}")


if __name__ == "__main__":
    main()
