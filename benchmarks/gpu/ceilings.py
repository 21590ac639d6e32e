"""What the card can do at most: every floor is told by these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.lab import Lab, Work

# Named here, read by what comes after.
PRODUCTS, COPY = "mm bf16 8192 x 8192 x 8192", "copy, read and written"
L2 = "L2 read: the maximum of 24 MB"
# Logit gradients of a panel and the rows that they are multiplied with: by chunk, and by panels of cuBLAS.
PANELS = ((4096, 4096), (8192, 8192), (16384, 16384), (512, 32768))


def run(lab: Lab) -> None:
    size, width = lab.device.size, lab.device.width
    n = size(8192)
    product(lab, PRODUCTS, n, n, n, torch.bfloat16)
    product(lab, PRODUCTS.replace("bf16", "fp16"), n, n, n, torch.float16)
    for rows in (16384, 32768):
        product(lab, f"mm bf16 {rows} x 512 x {rows}: logits", size(rows), width, size(rows), torch.bfloat16)
    for rows, columns in PANELS:
        panel(lab, f"addmm to fp32: {rows} x {columns} by 512", size(rows), size(columns), False)
        panel(lab, f"addmm to fp32: {rows} x {columns} transposed by 512", size(rows), size(columns), True)
    # Of 2 GB most comes from memory; 24 MB stay in an H200's 60 MB of L2.
    with lab.attempt(COPY):
        source = noise(lab, size(1 << 31))
        target = torch.empty_like(source)
        traffic(lab, COPY, lambda: target.copy_(source), 2 * source.nbytes)
    with lab.attempt(L2):
        resident = noise(lab, size(24 << 20))
        traffic(lab, L2, resident.amax, resident.nbytes)


def product(lab: Lab, what: str, rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    with lab.attempt(what):
        a, b = (torch.randn(one, inner, device=lab.device.type).to(dtype) for one in (rows, columns))
        seconds = lab.seconds(lambda: torch.mm(a, b.T))
        lab.note(what, seconds, figure=f"{2 * rows * inner * columns / seconds / 1e12:.4g}", unit="TFLOP/s")


def panel(lab: Lab, what: str, rows: int, columns: int, transposed: bool) -> None:
    # The program reads this file before the checkout is known and Triton is told where it runs.
    from efficientclip.kernels.triton.tiles import add_library_product

    with lab.attempt(what):
        left = torch.randn(rows, columns, device=lab.device.type).bfloat16()
        left = left.T if transposed else left
        features = lab.device.unit(left.shape[1])
        out = torch.zeros(len(left), features.shape[1], device=left.device)
        seconds = lab.seconds(lambda: add_library_product(out, left, features, False))
        flop = 2 * left.numel() * features.shape[1]
        lab.note(what, seconds, Work(flop), figure=f"{flop / seconds / 1e12:.4g}", unit="TFLOP/s")


def noise(lab: Lab, count: int) -> torch.Tensor:
    return torch.randint(0, 100, (count,), dtype=torch.uint8, device=lab.device.type).view(torch.float32)


def traffic(lab: Lab, what: str, call: Callable[[], Any], size: int) -> None:
    seconds = lab.alone(call)
    lab.note(what, seconds, figure=f"{size / seconds / 1e12:.4g}", unit="TB/s")


def rates(lab_rows: list[dict[str, str]]) -> tuple[float, float] | None:
    """FLOP and bytes a second by the rows of `run`; None unless both are there."""
    found = {row["what"]: float(row["figure"]) * 1e12 for row in lab_rows if row["figure"]}
    return (found[PRODUCTS], found[COPY]) if {PRODUCTS, COPY} <= found.keys() else None
