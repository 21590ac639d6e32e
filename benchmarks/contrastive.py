"""What `test_contrastive.py` measures: the contrastive loss of several packages, their memory, the CSV and its picture.

python -m benchmarks.contrastive        draws results/contrastive.svg from results/contrastive.csv

Shapes: N pairs, Q frozen rows of a bank, D width.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from torch import Tensor

from benchmarks.measuring import MIB, RESULTS, Memory, Neighbours, Row, hardware
from benchmarks.peers import IMPLEMENTATIONS, PASSES, Case, Implementation, Inputs, inputs, plain

KEY = (
    "N", "D", "bank", "dtype", "frozen", "frozen_dtype", "one_way", "loss", "pass", "device", "hardware", "threads",
    "torch", "implementation",
)  # fmt: skip
COLUMNS = (
    *KEY, "seconds", "tflops", "share_of_mm", "extra_mib", "ratio", "ratio_to", "error", "rounds", "note", "date",
)  # fmt: skip

# Seconds that a case's rounds may take together, and that a peer's round may.
BUDGET, PATIENCE = 10, 60
ROUNDS = {"cpu": (2, 7), "cuda": (5, 31)}
# Of loss and gradients against plain torch in fp32; halves round the gradients that they return.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Sample = tuple[float, float]
# FLOP and seconds of the latest case by implementation and dtype, from which larger ones are estimated.
Seen = dict[tuple[str, torch.dtype], tuple[int, float]]
Repeat = Callable[[Callable[[], None], Callable[[], None], int], None]


def free_bytes(device: str) -> int:
    if device == "cpu":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def refusal(one: Implementation, case: Case, seen: Seen) -> str | None:
    """Why it is not run."""
    reason = one.refuses(case)
    need = one.estimate(case) + case.gradient_bytes
    if reason is None and need > 0.9 * free_bytes(case.device):
        reason = f"would need {need / 2**30:.1f} GiB, {free_bytes(case.device) / 2**30:.1f} GiB are free"
    if reason is None and one.name != "ours" and (one.name, case.dtype) in seen:
        flop, seconds = seen[one.name, case.dtype]
        expected = seconds * case.flop(PASSES[1]) / flop
        if expected > PATIENCE:
            reason = f"would take {expected:.0f} s a round"
    return reason


# Measuring


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step(loss: Callable[[Inputs], Tensor], data: Inputs, memory: Memory | None = None) -> tuple[Tensor, Sample, Sample]:
    """The loss, seconds forward and in all, and peak bytes likewise."""
    device = data.text.device.type
    for leaf in data.leaves.values():
        leaf.grad = None
    if memory:
        memory.start()
    start = now(device)
    value = loss(data)
    middle = now(device)
    peak = memory.peak() if memory else math.nan
    again = now(device)
    value.backward()
    end = now(device)
    peaks = peak, memory.peak() if memory else math.nan
    return value.detach(), (middle - start, middle - start + end - again), peaks


def values(loss: Tensor, data: Inputs) -> dict[str, Tensor]:
    gradients = {name: leaf.grad for name, leaf in data.leaves.items() if leaf.grad is not None}
    return {"loss": loss, **gradients}


def worst_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(float((found[name].float() - value).norm() / value.norm()) for name, value in truth.items())


def in_turn(ours: Callable[[], None], others: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        others()
        ours()


def measure(case: Case, seen: Seen, repeat: Repeat = in_turn) -> tuple[list[Row], str | None]:
    """A row for each implementation and pass, and what makes them worthless if the machine was busy.

    The first round takes values and memory; it is left out of the medians where others are many. A case that takes
    long has three rounds.
    """
    data, memory = inputs(case), Memory(case.device)
    torch.compiler.reset()
    notes: dict[str, str | None] = {}
    found: dict[str, dict[str, Tensor]] = {}
    samples: dict[str, list[Sample]] = {}
    peaks: dict[str, Sample] = {}
    small = inputs(case.small)
    neighbours = Neighbours()
    for one in IMPLEMENTATIONS:
        notes[one.name] = refusal(one, case, seen)
        if notes[one.name]:
            continue
        try:
            step(one.loss, data if one.name == "compiled" else small)
            loss, seconds, peaks[one.name] = step(one.loss, data, memory)
        except torch.OutOfMemoryError:
            notes[one.name] = "out of memory"
        except Exception as error:
            if one.name == "ours":
                raise
            notes[one.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        else:
            samples[one.name] = [seconds]
            found[one.name] = values(loss, data)
            if not case.bank:
                seen[one.name, case.dtype] = case.flop(PASSES[1]), seconds[1]
    if "ours" not in samples:
        raise MemoryError(f"our loss does not run at {case}: {notes['ours']}; choose smaller --sizes")
    errors = _errors(case, data, found)
    found.clear()

    losses = {one.name: one.loss for one in IMPLEMENTATIONS if one.name in samples}
    size = 16384 if case.device == "cuda" else 4096
    left = data.text.detach()[:size]
    right = (data.image.detach() if data.bank is None else data.bank)[:size].to(left.dtype).T
    product_seconds: list[float] = []

    def run(name: str) -> None:
        samples[name].append(step(losses[name], data)[1])

    def run_others() -> None:
        for name in losses:
            if name != "ours":
                run(name)
        begin = now(case.device)
        torch.mm(left, right)
        product_seconds.append(now(case.device) - begin)

    least, most = ROUNDS[case.device]
    once = sum(sample[0][1] for sample in samples.values())
    repeat(lambda: run("ours"), run_others, max(least, min(most, int(BUDGET / once))))
    for name, taken in samples.items():
        samples[name] = taken[1:] if len(taken) > 3 else taken
    rate = 2 * len(left) * right.shape[1] * case.D / statistics.median(product_seconds[1:] or product_seconds)
    busy = neighbours.busy(
        torch.get_num_threads() if case.device == "cpu" else 0,
        {name: [sample[1] for sample in taken] for name, taken in samples.items()},
    )
    return _rows(case, notes, samples, peaks, errors, rate), busy


def _errors(case: Case, data: Inputs, found: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Against plain torch in fp32, where that fits into memory; a wrong loss of ours is an error."""
    truth = found.get("plain") if case.dtype == torch.float32 else None
    if truth is None and refusal(IMPLEMENTATIONS[0], case.wide, {}) is None:
        exact = data.float()
        truth = values(step(plain, exact)[0], exact)
    if truth is None:
        return {}
    errors = {name: worst_error(result, truth) for name, result in found.items()}
    if not errors["ours"] <= TOLERANCE[case.dtype]:
        raise ArithmeticError(
            f"loss or gradients are off by {errors['ours']:.1e} from plain torch at {case}, at most "
            f"{TOLERANCE[case.dtype]:.0e} is right: a wrong loss has no speed; see tests/kernels/test_contrastive.py"
        )
    return errors


def _rows(
    case: Case,
    notes: dict[str, str | None],
    samples: dict[str, list[Sample]],
    peaks: dict[str, Sample],
    errors: dict[str, float],
    rate: float,
) -> list[Row]:
    base = "open_clip" if "open_clip" in samples else "plain"
    machine = hardware(case.device)
    rows = []
    for at, pass_ in enumerate(PASSES):
        medians = {name: statistics.median(sample[at] for sample in taken) for name, taken in samples.items()}
        for name, note in notes.items():
            row: Row = {
                **case.key, "pass": pass_, "threads": torch.get_num_threads(), "implementation": name,
                "note": note, "date": date.today(), "hardware": machine, "torch": torch.__version__,
            }  # fmt: skip
            if name in medians:
                speed = case.flop(pass_) / medians[name]
                # The whole peak may stem from forward, where no gradient is held.
                extra = max(peaks[name][0], peaks[name][at] - at * case.gradient_bytes)
                row |= {
                    "seconds": f"{medians[name]:.4g}", "tflops": f"{speed / 1e12:.4g}",
                    "share_of_mm": f"{speed / rate:.3f}", "rounds": len(samples[name]),
                    "extra_mib": "" if math.isnan(extra) else f"{extra / MIB:.1f}",
                }  # fmt: skip
                if name in errors:
                    row["error"] = f"{errors[name]:.1e}"
                if base in medians:
                    row |= {"ratio": f"{medians[name] / medians[base]:.3f}", "ratio_to": base}
            rows.append(row)
    return rows


# Results


def draw(file: Path, picture: Path, D: int = 512) -> None:
    """Time and extra memory of forward+backward against N, one row of pictures for each machine and dtype."""
    with file.open() as source:
        rows = [
            row for row in csv.DictReader(source)
            if row["pass"] == PASSES[1] and row["D"] == str(D) and row["bank"] == "0" and row["frozen"] == "False"
            and row["one_way"] == "False" and row["loss"] == "contrastive" and row["seconds"]
        ]  # fmt: skip
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["hardware"], row["threads"], row["dtype"], f"torch {row['torch']}"), []).append(row)
    if not groups:
        return
    plt.switch_backend("agg")
    plt.rcParams["svg.hashsalt"] = "contrastive"
    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False, layout="constrained")
    for (time_axis, memory_axis), ((machine, threads, dtype, build), group) in zip(axes, groups.items(), strict=True):
        for name in dict.fromkeys(row["implementation"] for row in group):
            line = sorted((row for row in group if row["implementation"] == name), key=lambda row: int(row["N"]))
            sizes = [int(row["N"]) for row in line]
            time_axis.plot(sizes, [float(row["seconds"]) for row in line], marker="o", label=name)
            memory_axis.plot(sizes, [float(row["extra_mib"] or "nan") for row in line], marker="o", label=name)
            if name == "ours":
                floor = [float(row["seconds"]) * float(row["share_of_mm"]) for row in line]
                time_axis.plot(sizes, floor, "k--", label="4 products at torch.mm's rate")
        used = f", {threads} threads" if group[0]["device"] == "cpu" else ""
        time_axis.set(title=f"{machine}{used}, {dtype}, {build}, D = {D}", ylabel="forward + backward, seconds")
        memory_axis.set(title="beside inputs and gradients", ylabel="peak memory, MiB")
        for axis in (time_axis, memory_axis):
            axis.set(xscale="log", yscale="log", xlabel="pairs N")
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(RESULTS / "contrastive.csv", RESULTS / "contrastive.svg")
