"""The whole loss with its gradients, eager and as a graph; and what the trainer really calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.lab import BIAS, SCALE, Lab, Work
from efficientclip.kernels import contrastive_loss, sigmoid_loss

SIZES = (1024, 4096, 16384, 32768, 65536)
# Pairs and bank rows of the trainer's calls.
TRAINER = ((512, 100_000), (4096, 0), (4096, 100_000), (16384, 100_000))


def timed(lab: Lab, what: str, loss: Callable[[], Tensor], leaves: list[Tensor], forward: Work, both: Work) -> None:
    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), leaves)

    def alone() -> Tensor:
        with torch.no_grad():
            return loss()

    for pass_, call, work in (("forward", alone, forward), ("forward+backward", gradients, both)):
        with lab.attempt(f"{what}, {pass_}, eager"):
            mib = lab.device.peak(call) / 2**20
            lab.note(f"{what}, {pass_}, eager", lab.seconds(call), work, figure=f"{mib:.0f}", unit="MiB at most")
        with lab.attempt(f"{what}, {pass_}, graph"):
            lab.note(f"{what}, {pass_}, graph", lab.seconds(lab.device.graph(call)), work)


def products(lab: Lab, rows: int, columns: int, count: int) -> Work:
    """So many products of all logits; the least traffic is one visit to each input and each gradient."""
    width = lab.device.width
    return Work(2 * count * rows * columns * width, 2 * (rows + columns) * width)


def symmetric(lab: Lab, pairs: int) -> None:
    text, image = (lab.device.unit(pairs, seed=seed).requires_grad_() for seed in (0, 1))
    scale, bias = lab.device.scalar(SCALE), lab.device.scalar(BIAS)
    forward, both = (products(lab, pairs, pairs, count) for count in (1, 4))
    losses: dict[str, Callable[[], Tensor]] = {
        "contrastive_loss": lambda: contrastive_loss(text, image, logit_scale=scale).loss,
        "sigmoid_loss": lambda: sigmoid_loss(text, image, logit_scale=scale, logit_bias=bias).loss,
    }
    for name, loss in losses.items():
        leaves = [text, image, scale, *([bias] if name == "sigmoid_loss" else [])]
        timed(lab, f"{name} bf16, {pairs}", loss, leaves, forward, both)


def as_the_trainer(lab: Lab, pairs: int, bank_rows: int, frozen: torch.dtype) -> None:
    text = lab.device.unit(pairs, torch.float32).requires_grad_()
    image = lab.device.unit(pairs, frozen, seed=1)
    scale = lab.device.scalar(SCALE)
    options: dict[str, Any] = {"direction_weights": (0.5, 0.5), "pair_weights": torch.ones(pairs, device=text.device)}
    bank = lab.device.unit(bank_rows, frozen, seed=2) if bank_rows else None
    # A caption of each tenth pair stands with another picture of the batch, or of the bank.
    rows = torch.arange(0, pairs, 10, device=text.device)
    options["excluded"] = (rows, (rows * 7 + 3) % (pairs + bank_rows))
    what = f"as the trainer: fp32 text, {str(frozen).removeprefix('torch.')} frozen, {pairs}, bank {bank_rows}"
    forward, both = (products(lab, pairs, pairs + bank_rows, count) for count in (1, 3))

    def loss() -> Tensor:
        return contrastive_loss(text, image, bank, logit_scale=scale, **options).loss

    timed(lab, what, loss, [text, scale], forward, both)


def run(lab: Lab) -> None:
    for size in SIZES:
        symmetric(lab, lab.device.size(size))
    for pairs, bank_rows in TRAINER:
        for frozen in (torch.float16, torch.float32):
            as_the_trainer(lab, lab.device.size(pairs), lab.device.size(bank_rows) if bank_rows else 0, frozen)
