"""Contrastive loss, forward and backward in fp32, beside plain torch (the products and softmaxes of open_clip's loss).

    pytest benchmarks/test_contrastive.py --benchmark-only --benchmark-group-by=param:frozen,param:N

Plain torch runs between the rounds of the fused loss, and medians are compared. A ratio goes to results/ only if the
rounds agree and other processes left the cores free: else threads wait for each other, and the figures say nothing.
Peaks are what torch's allocator held at once beside the inputs, from the profiler in a run of its own.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from efficientclip.kernels import contrastive_loss

RESULTS = Path(__file__).parent / "results" / "contrastive.csv"
D = 512
STEADY = 1.2
# Cores that others may take of those in use: the system itself needs a little.
SPARE = 0.1

Step = Callable[[], dict[str, Tensor]]


def plain_loss(text_ND: Tensor, image_ND: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(len(text_ND))
    rows, columns = scale * text_ND @ image_ND.T, scale * image_ND @ text_ND.T
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2


def fused_loss(text_ND: Tensor, image_ND: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(text_ND, image_ND, logit_scale=scale).loss


def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor], N: int, frozen: bool) -> Step:
    rng = torch.Generator().manual_seed(0)
    text, image = (F.normalize(torch.randn(N, D, generator=rng), dim=1) for _ in range(2))
    scale = torch.tensor([14.3], requires_grad=True)
    leaves = {"text": text.requires_grad_(), "image": image.requires_grad_(not frozen), "scale": scale}

    def run() -> dict[str, Tensor]:
        for leaf in leaves.values():
            leaf.grad = None
        value = loss(text, image, scale)
        value.backward()
        return {"loss": value.detach()} | {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}

    return run


def seconds_of_others() -> float:
    """CPU seconds that other processes have had so far, up to a constant."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - time.process_time()


def peak_mib(run: Step, trace: Path) -> float:
    """`run` must be fresh: gradients of an earlier run would be freed inside the profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    seen.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@pytest.fixture(params=sorted({1, torch.get_num_threads()}))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("N", [1024, 4096])
def test_contrastive(benchmark: Any, tmp_path: Path, threads: int, N: int, frozen: bool) -> None:
    """Times the fused loss; plain torch runs between its rounds and its figures are the extra ones."""
    fused, plain = step(fused_loss, N, frozen), step(plain_loss, N, frozen)
    expected = plain()
    for name, value in fused().items():
        error = float((value - expected[name]).norm() / expected[name].norm())
        if not error <= 1e-4:
            pytest.fail(f"{name} is off by {error:.1e} from plain torch: a wrong loss has no speed")
    seconds: list[float] = []

    def between() -> None:
        start = time.perf_counter()
        plain()
        seconds.append(time.perf_counter() - start)

    start, others = time.perf_counter(), seconds_of_others()
    benchmark.pedantic(fused, setup=between, rounds=7, warmup_rounds=1)
    if benchmark.disabled:
        return
    cores_of_others = (seconds_of_others() - others) / (time.perf_counter() - start)
    fused_s, plain_s = benchmark.stats.stats.median, statistics.median(seconds[1:])
    peaks = {
        f"{name}_peak_mib": round(peak_mib(step(loss, N, frozen), tmp_path / f"{name}.json"), 1)
        for name, loss in (("fused", fused_loss), ("plain", plain_loss))
    }
    benchmark.extra_info.update(plain_s=plain_s, ratio=fused_s / plain_s, **peaks)
    if cores_of_others > (os.cpu_count() or 1) - threads + SPARE:
        pytest.skip(f"busy machine: others held {cores_of_others:.1f} cores; nothing recorded")
    if max(fused_s / benchmark.stats.stats.min, plain_s / min(seconds)) > STEADY:
        pytest.skip(f"busy machine: medians are more than {STEADY} times the best rounds; nothing recorded")
    row = {
        "N": N, "D": D, "frozen": frozen, "threads": threads, "torch": torch.__version__,
        "fused_s": f"{fused_s:.4f}", "plain_s": f"{plain_s:.4f}", "ratio": f"{fused_s / plain_s:.3f}",
        **peaks,
    }  # fmt: skip
    seen: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open() as file:
            same = ("N", "D", "frozen", "threads")
            seen = [old for old in csv.DictReader(file) if any(old[key] != str(row[key]) for key in same)]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*seen, row])
