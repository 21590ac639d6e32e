"""The whole loss with its gradients, eager and as a graph; and what the trainer really calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.lab import BIAS, SCALE, Lab, Work
from benchmarks.peers import PASSES, Case
from efficientclip.kernels import contrastive_loss, sigmoid_loss

SIZES = (1024, 4096, 16384, 32768, 65536)
# Pairs and bank rows of the trainer's calls.
TRAINER = ((512, 100_000), (4096, 0), (4096, 100_000), (16384, 100_000))


def timed(lab: Lab, what: str, loss: Callable[[], Tensor], leaves: list[Tensor], case: Case) -> None:
    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), leaves)

    def alone() -> Tensor:
        with torch.no_grad():
            return loss()

    for pass_, call in zip(PASSES, (alone, gradients), strict=True):
        # The least traffic is one visit to each input in 16 bits.
        work = Work(case.flop(pass_), 2 * (2 * case.N + case.bank) * case.D)
        with lab.attempt(f"{what}, {pass_}, eager"):
            mib = lab.device.peak(call) / 2**20
            lab.note(f"{what}, {pass_}, eager", lab.seconds(call), work, figure=f"{mib:.0f}", unit="MiB at most")
        with lab.attempt(f"{what}, {pass_}, graph"):
            lab.note(f"{what}, {pass_}, graph", lab.seconds(lab.device.graph(call)), work)


def symmetric(lab: Lab, pairs: int) -> None:
    text, image = (lab.device.unit(pairs, seed=seed).requires_grad_() for seed in (0, 1))
    scale, bias = lab.device.scalar(SCALE), lab.device.scalar(BIAS)
    case = Case(pairs, lab.device.width)
    losses: dict[str, Callable[[], Tensor]] = {
        "contrastive_loss": lambda: contrastive_loss(text, image, logit_scale=scale).loss,
        "sigmoid_loss": lambda: sigmoid_loss(text, image, logit_scale=scale, logit_bias=bias).loss,
    }
    for name, loss in losses.items():
        leaves = [text, image, scale, *([bias] if name == "sigmoid_loss" else [])]
        timed(lab, f"{name} bf16, {pairs}", loss, leaves, case)


def as_the_trainer(lab: Lab, pairs: int, bank_rows: int, frozen: torch.dtype) -> None:
    text = lab.device.unit(pairs, torch.float32).requires_grad_()
    image = lab.device.unit(pairs, frozen, seed=1)
    scale = lab.device.scalar(SCALE)
    bank = lab.device.unit(bank_rows, frozen, seed=2) if bank_rows else None
    # A caption of each tenth pair stands with another picture of the batch, or of the bank.
    rows = torch.arange(0, pairs, 10, device=text.device)
    excluded = rows, (rows * 7 + 3) % (pairs + bank_rows)
    weights = torch.ones(pairs, device=text.device)
    what = f"as the trainer: fp32 text, {str(frozen).removeprefix('torch.')} frozen, {pairs}, bank {bank_rows}"
    case = Case(pairs, lab.device.width, bank_rows, frozen=True)

    def loss() -> Tensor:
        return contrastive_loss(text, image, bank, logit_scale=scale, pair_weights=weights, excluded=excluded).loss

    timed(lab, what, loss, [text, scale], case)


def run(lab: Lab) -> None:
    for size in SIZES:
        symmetric(lab, lab.device.size(size))
    for pairs, bank_rows in TRAINER:
        for frozen in (torch.float16, torch.float32):
            as_the_trainer(lab, lab.device.size(pairs), lab.device.size(bank_rows) if bank_rows else 0, frozen)
