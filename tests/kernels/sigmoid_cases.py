"""Inputs for the tests of `sigmoid_loss`, and the comparison with its naive reference in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientclip.kernels import ContrastiveOutput, sigmoid_loss, sigmoid_loss_naive

Loss = Callable[..., ContrastiveOutput]
FEWEST_BATCHES, MOST_BATCHES = 8, 64
# Of texts, and of images and bank.
MIXED = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]


def features(rng: torch.Generator, M: int, Q: int, D: int, hard: bool = False) -> dict[str, Any]:
    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, D, generator=rng, dtype=torch.float64), dim=1)

    text, image, bank = unit(M), unit(M), unit(Q) if Q else None
    if hard:
        # Sure pairs, a negative equal to the text, its opposite, an image twice, features of length 0, a pair twice.
        image[:8] = text[:8]
        image[9], image[10], image[12] = text[8], -text[8], image[11]
        text[13] = image[14] = 0
        text[16], image[16] = text[17], image[17]
        if bank is not None:
            bank[0], bank[1] = text[15], -text[15]
    return {"text": text, "image": image, "bank": bank}


def everything(rng: torch.Generator, M: int, Q: int) -> dict[str, Any]:
    """All options at once: ids that repeat, cells excluded twice and on the diagonal, weights with zeros."""

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(0, max(high, 1), (size,), generator=rng)

    rows, columns, diagonal = draw(M, 3 * M), draw(M + Q, 3 * M), draw(M, 9)
    weights = torch.rand(M, generator=rng)
    return {
        # Far apart: ids are names, not small numbers.
        "image_ids": draw(M // 2, M) * (1 << 40),
        "caption_ids": draw(M // 2, M) - 5,
        "bank_ids": draw(M // 2, Q) * (1 << 40) if Q else None,
        "excluded": (torch.cat([rows, rows[:9], diagonal]), torch.cat([columns, columns[:9], diagonal])),
        "pair_weights": weights * (weights > 0.3),
    }


def run(
    loss: Loss,
    data: dict[str, Any],
    dtype: torch.dtype,
    scale: float,
    bias: float = -3.0,
    *,
    rows: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Values and gradients, in fp64; the features are rounded to `dtype` first, images and bank to `rows` if given."""
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    rows = rows or dtype
    text, image = (data[name].to(to, copy=True).requires_grad_() for name, to in (("text", dtype), ("image", rows)))
    bank = None if data["bank"] is None else data["bank"].to(rows)
    logit_scale = torch.tensor([scale], dtype=scalar, device=text.device, requires_grad=True)
    logit_bias = torch.tensor(bias, dtype=scalar, device=text.device, requires_grad=True)
    out = loss(text, image, bank, logit_scale=logit_scale, logit_bias=logit_bias, **options)
    out.loss.backward()
    named = {
        "loss": out.loss,
        "per_pair_loss": out.per_pair_loss_M,
        "positive_logit": out.positive_logit_M,
        "d_text": text.grad,
        "d_image": image.grad,
        "d_scale": logit_scale.grad,
        "d_bias": logit_bias.grad,
    }
    return {name: value.detach().double() for name, value in named.items()}


def rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def three(
    data: dict[str, Any],
    dtype: torch.dtype,
    scale: float,
    bias: float,
    rows: torch.dtype | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What `sigmoid_loss`, plain torch in the same dtypes, and plain torch in fp64 make of the same features."""
    dtypes = {"text": dtype, "image": rows or dtype, "bank": rows or dtype}
    rounded = {name: None if value is None else value.to(dtypes[name]).double() for name, value in data.items()}
    ours = run(sigmoid_loss, data, dtype, scale, bias, rows=rows, **options)
    plain = run(sigmoid_loss_naive, data, dtype, scale, bias, rows=rows, **options)
    return ours, plain, run(sigmoid_loss_naive, rounded, torch.float64, scale, bias, **options)


def check_over_batches(
    rng: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    scale: float,
    bias: float,
    rows: torch.dtype | None = None,
) -> None:
    """No more than twice as far from fp64 as plain torch, in root mean square, with no allowance.

    Over as many batches as it takes to tell: of a few, plain torch's scalars may be exact by luck. With all options and
    both kinds of positives.
    """
    M, Q, D = shape
    squares: dict[str, Tensor] = {}
    for batch in range(MOST_BATCHES):
        options = everything(rng, M, Q) | {"positives": ("pair", "ids")[batch % 2]}
        found = three(features(rng, M, Q, D, hard=True), dtype, scale, bias, rows, **options)
        for name, value in found[2].items():
            wrong = torch.stack([(one[name] - value).square().mean() for one in found[:2]])
            squares[name] = squares.get(name, torch.zeros(2)) + wrong
        times = {name: float((ours / plain).sqrt()) for name, (ours, plain) in squares.items()}
        if batch + 1 >= FEWEST_BATCHES and all(one <= 2 for one in times.values()):
            return
    raise AssertionError(f"errors as multiples of plain torch's over {MOST_BATCHES} batches: {times}")


def check(data: dict[str, Any], dtype: torch.dtype, scale: float, bias: float = -3.0, **options: Any) -> None:
    """The same of one batch of any shape, with an allowance: of few cells plain torch has errors of 0 by luck."""
    ours, plain, truth = three(data, dtype, scale, bias, **options)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Units in the last place of a logit, and of the result: what the first move grows with the cells of a row, each of
    # slope 1 at most. All cells err alike where D is 1, which takes 4 of them.
    cells = len(data["text"]) + (0 if data["bank"] is None else len(data["bank"]))
    unit_of_logits = eps * (1 + abs(scale) + abs(bias))
    sizes = {
        "loss": cells**0.5,
        "per_pair_loss": cells**0.5,
        "d_text": abs(scale) * cells**0.5 / len(data["text"]),
        "d_image": abs(scale) * cells**0.5 / len(data["text"]),
        "d_scale": cells**0.5,
        "d_bias": cells**0.5,
    }
    for name, value in truth.items():
        assert ours[name].isfinite().all(), name
        error = rms(ours[name] - value)
        allowed = 2 * rms(plain[name] - value) + 4 * unit_of_logits * sizes.get(name, 1.0) + 8 * eps * rms(value)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, of {rms(value):.2e}"
