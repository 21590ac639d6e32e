"""Losses, gradients and scores against fp64, twice with equal bits; what is wrong stands beside the speeds.

Each check runs in one of many processes: they compile at the same time what the later parts use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Cuda
from benchmarks.gpu.lab import Lab, words
from efficientclip.kernels import (
    contrastive_loss,
    contrastive_loss_naive,
    paired_similarity,
    positive_ranks,
    sigmoid_loss,
    sigmoid_loss_naive,
    top_k,
)
from efficientclip.kernels.similarity import paired_similarity_naive, positive_ranks_naive, top_k_naive
from tests.kernels import sigmoid_cases, test_contrastive

SCALE, BIAS = 30.0, -3.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of text and image, whether images are frozen.
DTYPES = ((FP32, FP16, True), (FP32, FP32, False), (FP16, FP16, False), (BF16, BF16, False), (BF16, BF16, True))
OPTIONS = {
    "ids": ("image_ids", "caption_ids", "bank_ids", "label_smoothing"),
    "excluded": ("excluded", "pair_weights", "direction_weights"),
    "plain": (),
}
LOSSES: dict[str, Any] = {
    "contrastive_loss": (contrastive_loss, contrastive_loss_naive, test_contrastive),
    "sigmoid_loss": (sigmoid_loss, sigmoid_loss_naive, sigmoid_cases),
}
SCORES: dict[str, Any] = {
    "positive_ranks": (positive_ranks, positive_ranks_naive),
    "top_k": (top_k, top_k_naive),
    "paired_similarity": (paired_similarity, paired_similarity_naive),
}


@dataclass(frozen=True)
class Check:
    what: str
    error: float
    allowed: float
    repeats: bool = True
    """Whether a second call gave the same bits."""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.repeats


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def moved(value: Any, device: str) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(part.to(device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def loss_and_gradients(
    loss: Any, data: dict[str, Tensor | None], frozen: bool, device: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    given = {name: None if value is None else value.to(device, copy=True) for name, value in data.items()}
    text, image = given["text"], given["image"]
    assert text is not None and image is not None
    text.requires_grad_()
    image.requires_grad_(not frozen)
    dtype = torch.float64 if text.dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(x, dtype=dtype, device=device, requires_grad=True) for x in (SCALE, BIAS))
    out = loss(text, image, given["bank"], logit_scale=scale, logit_bias=bias, **options)
    out.loss.backward()
    found = {**out._asdict(), "d_text": text.grad, "d_image": image.grad, "d_scale": scale.grad, "d_bias": bias.grad}
    return {name: value.detach() for name, value in found.items() if value is not None}


def loss_checks(
    device: Cuda, name: str, text: torch.dtype, image: torch.dtype, frozen: bool, options: str
) -> Iterator[Check]:
    """Errors at most twice those of plain torch in the same dtypes, or a few units in a logit's last place."""
    loss, naive, cases = LOSSES[name]
    unit = torch.finfo(torch.float32).eps * (1 + SCALE - BIAS)
    for M, Q, D in device.shapes:
        rng = torch.Generator().manual_seed(M)
        dtypes = {"text": text, "image": image, "bank": image}
        random = cases.features(rng, M, Q, D, hard=M > 30)
        data = {side: None if value is None else value.to(dtypes[side]) for side, value in random.items()}
        wide = {side: None if value is None else value.to(text) for side, value in data.items()}
        every = cases.everything(rng, M, Q)
        given = {option: moved(every[option], device.type) for option in OPTIONS[options] if option in every}
        exact = {side: None if value is None else value.double() for side, value in data.items()}
        truth = loss_and_gradients(naive, exact, frozen, device.type, given)
        torchs = loss_and_gradients(naive, wide, frozen, device.type, given)
        ours, again = (loss_and_gradients(loss, data, frozen, device.type, given) for _ in "12")
        # A row's cells add up in one loss, where the other takes their mean.
        spread = (M + Q) ** 0.5 if name == "sigmoid_loss" else 1.0
        for field, value in truth.items():
            size = spread * (SCALE / M if field in ("d_text", "d_image") else 1)
            allowed = 2 * rms(torchs[field] - value) + 8 * unit * size + 8 * 2**-23 * rms(value)
            repeats = torch.equal(ours[field], again[field])
            yield Check(f"{field}, {M} x {M + Q} x {D}", rms(ours[field] - value), allowed, repeats)


def score_checks(device: Cuda, name: str, dtype: torch.dtype) -> Iterator[Check]:
    """Small whole numbers have exact products, so ranks and rows must be exact; cosines as near as torch's in fp32."""
    ours, naive = SCORES[name]
    for M, bank_rows, D in device.shapes:
        rng, Q = torch.Generator().manual_seed(M), bank_rows or M
        query, bank = (torch.randint(-1, 2, (size, D), generator=rng).to(dtype) for size in (M, Q))
        text, other = (torch.randn(size, D, generator=rng).to(dtype) for size in (M, Q))
        rows, groups = torch.randint(0, Q, (2 * M,), generator=rng), 2 * torch.arange(M + 1)
        given: tuple[Any, ...] = {
            "positive_ranks": (query, bank, rows, groups),
            "top_k": (query, bank, min(10, Q)),
            "paired_similarity": (text, other, rows[:M]),
        }[name]
        given = tuple(moved(value, device.type) for value in given)
        truth, found, again = (one(*given) for one in (naive, ours, ours))
        allowed = 0.0
        if name == "paired_similarity":
            torchs = F.cosine_similarity(given[0].float(), given[1].float()[given[2]])
            allowed = 2 * rms(torchs - truth) + 8 * 2**-23
        several = (value if isinstance(value, tuple) else (value,) for value in (truth, found, again))
        for exact, one, other in zip(*several, strict=True):
            yield Check(f"{M} x {Q} x {D}", rms(one - exact), allowed, torch.equal(one, other))


def check(device: Cuda, name: str, *given: Any) -> list[Check]:
    return [*(loss_checks if name in LOSSES else score_checks)(device, name, *given)]


def plan() -> list[tuple[Any, ...]]:
    """What takes longest to compile comes first."""
    losses = [(name, *dtypes, options) for options in OPTIONS for name in LOSSES for dtypes in DTYPES]
    return losses + [(name, dtype) for name in SCORES for dtype in (FP32, FP16, BF16)]


def summary(found: list[Check]) -> dict[str, Any]:
    """A row's values: how many are right, and of the wrong ones the worst."""
    wrong = [one for one in found if not one.passed]
    if not wrong:
        return {"figure": len(found), "unit": "checks", "verdict": "ok"}
    worst = max(wrong, key=lambda one: one.error - one.allowed)
    note = f"{len(wrong)} of {len(found)} wrong, as {worst.what}: error {worst.error:.1e}, allowed {worst.allowed:.1e}"
    changing = sum(not one.repeats for one in wrong)
    note += f"; of {changing} a second call gave other bits" if changing else ""
    return {"figure": len(found), "unit": "checks", "verdict": "WRONG", "note": note}


def run(lab: Lab) -> None:
    planned = plan()
    for number, found in lab.spread(check, planned):
        named = ("frozen" if part is True else str(part).removeprefix("torch.") for part in planned[number] if part)
        if isinstance(found, Exception):
            lab.note(" ".join(named), verdict="failed", note=words(found))
        else:
            lab.note(" ".join(named), **summary(found))
