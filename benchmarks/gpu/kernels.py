"""Each kernel alone at 32,768 pairs, by a graph of its launches; and what `ncu` sees of two, where it is."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.lab import BIAS, SCALE, Lab, Work, words
from benchmarks.gpu.launches import ROWS, Launch, recorded
from efficientclip.kernels import contrastive_loss, paired_similarity, positive_ranks, sigmoid_loss

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
# Of all columns that the sections give: L2, tensor pipe, spills, registers, occupancy, time.
SHOWN = re.compile(
    r"lts__.*pct|dram__throughput.*pct|pipe_tensor.*pct|sm__throughput.*pct|registers_per_thread$|local|"
    r"warps_active.*pct|gpu__time_duration.sum$"
)
PROFILED, PATIENCE = "forward_kernel|gradient_kernel", 45


def calls(lab: Lab) -> Iterator[tuple[str, Callable[[], Any]]]:
    rows, bank_rows = lab.device.size(ROWS), lab.device.size(131_072)
    text, image = (lab.device.unit(rows, seed=seed).requires_grad_() for seed in (0, 1))
    bank = lab.device.unit(bank_rows)
    named = torch.randint(0, bank_rows, (rows,), device=text.device)
    yield "contrastive_loss", lambda: contrastive_loss(text, image, bank, logit_scale=SCALE).loss.backward()
    yield "sigmoid_loss", lambda: sigmoid_loss(text, image, logit_scale=SCALE, logit_bias=BIAS).loss.backward()
    groups = torch.arange(rows + 1, device=text.device)
    yield "positive_ranks", lambda: positive_ranks(text.detach(), image.detach(), named % rows, groups)
    yield "paired_similarity", lambda: paired_similarity(text.detach(), bank, named)


def measure(lab: Lab, op: str, call: Callable[[], Any]) -> None:
    with recorded() as seen:
        call()
    if not seen:
        raise RuntimeError("no Triton kernel was launched")
    by_name: dict[str, list[Launch]] = {}
    for launch in seen:
        by_name.setdefault(launch.name, []).append(launch)
    for name, launches in by_name.items():
        what = f"{op}: {name}"
        with lab.attempt(what):
            # The first may be of the largest chunk, the last of what is left.
            usage, seconds = lab.device.usage(launches[0]()), lab.alone(launches[0])
            flop = launches[0].flop
            values = {"figure": f"{flop / seconds / 1e12:.4g}", "unit": "TFLOP/s"} if flop else {}
            note = f"x {len(launches)} launches of grid {launches[0].grid}; {usage}".removesuffix("; ")
            lab.note(what, seconds, Work(flop), note=note, **values)


def run(lab: Lab) -> None:
    for op, call in calls(lab):
        with lab.attempt(op):
            measure(lab, op, call)
    profile(lab)


def profile(lab: Lab) -> None:
    profiler = lab.device.profiler()
    if profiler is None:
        lab.note("ncu", verdict="skipped", note="ncu is not here")
        return
    command = [
        *profiler, "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", f"regex:{PROFILED}",
        "--launch-count", "2", *(word for section in SECTIONS for word in ("--section", section)), sys.executable,
        "-m", "benchmarks.gpu", "--part", "launches", "--device", lab.device.type, "--results", str(lab.results.file),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        lines = done.stdout.splitlines()
        start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
        if done.returncode or start is None:
            raise RuntimeError(f"exit code {done.returncode}: {(lines + done.stderr.splitlines())[-1:]}")
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        lab.note("ncu", verdict="no figure", note=words(error))
        return
    units, *kernels = csv.DictReader(lines[start:])
    for kernel in kernels:
        for name, value in kernel.items():
            if SHOWN.search(name):
                figure = value.replace(",", "")
                lab.note(f"ncu, {kernel['Kernel Name']}: {name}", figure=figure, unit=units[name])
