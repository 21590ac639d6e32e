"""The Triton kernels of `sigmoid` in Triton's interpreter: `test_sigmoid` runs this file with it turned on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from efficientclip.kernels import paths, sigmoid, sigmoid_loss, sigmoid_loss_naive
from efficientclip.kernels.contract import Options
from efficientclip.kernels.triton import tuning
from efficientclip.kernels.triton.tuning import Tile
from tests.kernels.calls import Calls
from tests.kernels.sigmoid_cases import MIXED, check, check_over_batches, everything, features, run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def triton_path(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """CPU tensors to the Triton kernels, in tiles so small that few pairs need several tiles, strips and chunks."""
    monkeypatch.setattr(paths, "KERNELS_ON_CPU", True)
    for size, tile in {2: Tile(32, 32, 4, 2), 4: Tile(32, 64, 4, 2)}.items():
        monkeypatch.setitem(tuning.TILES, size, tile)
    monkeypatch.setattr(tuning, "CHUNK", 64)
    monkeypatch.setattr(tuning, "STRIP_TILES", 2)


@DTYPES
@pytest.mark.parametrize(("scale", "bias"), [(1, -1.0), (14, -5.0), (100, -20.0)])
def test_everything_at_once(rng: torch.Generator, dtype: torch.dtype, scale: float, bias: float) -> None:
    check_over_batches(rng, (40, 20, 24), dtype, scale, bias)


@pytest.mark.parametrize(("dtype", "rows"), MIXED, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(1, -1.0), (14, -5.0), (100, -20.0)])
def test_rows_of_another_dtype(
    rng: torch.Generator, dtype: torch.dtype, rows: torch.dtype, scale: float, bias: float
) -> None:
    check_over_batches(rng, (40, 20, 24), dtype, scale, bias, rows)


def test_a_bank_of_another_dtype_than_the_images(rng: torch.Generator) -> None:
    data = features(rng, 40, 70, 24, hard=True)
    text, image, bank = (
        data[name].to(dtype) for name, dtype in zip(data, (torch.float32, torch.bfloat16, torch.float16), strict=True)
    )
    text.requires_grad_()
    found, expected = (
        loss(text, image, bank, logit_scale=14.0, logit_bias=-5.0).loss for loss in (sigmoid_loss, sigmoid_loss_naive)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    (grad,), (expected,) = torch.autograd.grad(found, text), torch.autograd.grad(expected, text)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_rows_are_read_as_they_are(rng: torch.Generator) -> None:
    """No tensor as large as the bank is in fp32."""
    text, image, bank = (torch.randn(rows, 32, generator=rng) for rows in (8, 8, 600))
    image, bank = image.half(), bank.half()
    text.requires_grad_()
    with Calls() as calls:
        sigmoid_loss(text, image, bank, logit_scale=1.0).loss.backward()
    assert calls.products == 0 and calls.largest <= 2 * bank.numel()


@pytest.mark.parametrize(("M", "Q", "D"), [(1, 0, 1), (1, 40, 24), (33, 0, 100)])
def test_ragged_shapes(rng: torch.Generator, M: int, Q: int, D: int) -> None:
    check(features(rng, M, Q, D), torch.float32, 10, image_ids=torch.arange(M) // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "bias"), [(0.01, 0.0), (200, -20.0), (-30, 3.0)])
def test_scales(rng: torch.Generator, dtype: torch.dtype, scale: float, bias: float) -> None:
    check(features(rng, 40, 20, 24, hard=True), dtype, scale, bias)


def test_losses_far_below_one(rng: torch.Generator) -> None:
    """log(1 + e) in fp32 is 0 for the e^-20 of every cell."""
    data = features(rng, 40, 20, 24)
    data["image"] = data["text"]
    out = run(sigmoid_loss, data, torch.float32, 0.01, -20.0)
    check(data, torch.float32, 0.01, -20.0)
    negatives = out["per_pair_loss"] - 20
    assert float(out["loss"]) > 0 and bool((negatives.abs() < 0.02).all())
    data["image"] = -data["text"]
    check(data, torch.float32, -40.0, -20.0)


def test_nothing_but_excluded_cells(rng: torch.Generator) -> None:
    excluded: Any = tuple(torch.cartesian_prod(torch.arange(33), torch.arange(33)).T)
    check(features(rng, 33, 0, 8), torch.float32, 10, excluded=excluded)


@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_blocks_of_columns_add_up(rng: torch.Generator, positives: str) -> None:
    """As they come round the ring: this rank's pairs are in the second block, which the bank goes with."""
    data, given = features(rng, 70, 33, 24), everything(rng, 70, 33)
    text, image, bank = (data[name].float() for name in ("text", "image", "bank"))
    own, blocks = slice(30, 70), (slice(0, 30), slice(30, 70))
    ids_KN = torch.stack([given["image_ids"], given["caption_ids"]])
    excluded_2E = torch.stack(given["excluded"])
    excluded_2E = excluded_2E[:, excluded_2E[0] < 40]
    whole = Options(ids_KN[:, own], ids_KN, given["bank_ids"], excluded_2E, own.start, positives == "ids", False)
    factors = torch.tensor(14.0), torch.tensor(-5.0), torch.rand(40, generator=rng).double()

    def found(columns: slice) -> list[torch.Tensor]:
        last = columns.stop == 70
        given = text[own], image[columns], bank if last else None, *factors, *whole.of_block(columns, 70, last)
        sums = sigmoid.OPERATORS.sums(*given)
        made = sigmoid.OPERATORS.gradients(*given, *sums[3:], [torch.tensor(2.0).double()], True, True)
        d_image_ND = torch.zeros(70, 24)
        d_image_ND[columns] = made[1]
        return [*sums[:3], made[0], d_image_ND, *made[2:]]

    for one, *parts in zip(found(slice(0, 70)), *(found(columns) for columns in blocks), strict=True):
        # Parts may cancel: their sum is as exact as they are.
        assert float((sum(parts) - one).norm()) <= 1e-6 * sum(float(part.norm()) for part in parts)


def test_nan_stays_in_its_row(rng: torch.Generator) -> None:
    data = features(rng, 40, 20, 24)
    data["text"][33, 2] = math.nan
    out = run(sigmoid_loss, data, torch.float32, 10)
    assert out["per_pair_loss"].isnan().nonzero().flatten().tolist() == [33]


def test_twice_gives_the_same_bits(rng: torch.Generator) -> None:
    data, options = features(rng, 40, 33, 24), everything(rng, 40, 33)
    one, other = (run(sigmoid_loss, data, torch.bfloat16, 100, **options) for _ in "12")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
