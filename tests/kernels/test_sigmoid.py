"""`sigmoid_loss` against its naive reference: values, every gradient; the Triton kernels interpreted and compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efficientclip.kernels import chunked, sigmoid_loss, sigmoid_loss_naive
from tests.kernels.calls import Calls
from tests.kernels.sigmoid_cases import MIXED, check, check_over_batches, everything, features, run

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ROWS", 61)
    monkeypatch.setattr(chunked, "TILE_LOGITS", 61 * 97)


# The reference


def test_reference_is_siglip(rng: torch.Generator) -> None:
    """The pseudocode of Zhai et al. 2023, algorithm 1."""
    data = features(rng, 40, 0, 16)
    logits = data["text"] @ data["image"].T * 10 - 10
    labels = 2 * torch.eye(40) - torch.ones(40, 40)
    expected = -torch.nn.functional.logsigmoid(labels * logits).sum() / 40
    ours = sigmoid_loss_naive(data["text"], data["image"], logit_scale=10, logit_bias=-10)
    torch.testing.assert_close(ours.loss, expected)


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize("D", [1, 24, 100])
@pytest.mark.parametrize(("M", "Q"), [(1, 0), (1, 70), (63, 5), (257, 0), (131, 301)])
def test_ragged_shapes(
    rng: torch.Generator, small_tiles: None, M: int, Q: int, D: int, positives: str, dtype: torch.dtype
) -> None:
    check(features(rng, M, Q, D), dtype, 10, positives=positives, **everything(rng, M, Q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(1, -1.0), (14, -5.0), (100, -20.0)])
def test_errors_beside_plain_torch(
    rng: torch.Generator, small_tiles: None, dtype: torch.dtype, scale: float, bias: float
) -> None:
    check_over_batches(rng, (140, 70, 24), dtype, scale, bias)


@pytest.mark.parametrize(("dtype", "rows"), MIXED, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(1, -1.0), (14, -5.0), (100, -20.0)])
def test_rows_of_another_dtype(
    rng: torch.Generator, small_tiles: None, dtype: torch.dtype, rows: torch.dtype, scale: float, bias: float
) -> None:
    check_over_batches(rng, (140, 70, 24), dtype, scale, bias, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "bias"), [(0.01, 0.0), (1, -1.0), (10, -10.0), (100, -20.0), (200, 5.0)])
def test_scales(rng: torch.Generator, small_tiles: None, dtype: torch.dtype, scale: float, bias: float) -> None:
    data = features(rng, 140, 70, 24, hard=True)
    check(data, dtype, scale, bias)
    check(data, dtype, scale, bias, positives="ids", **everything(rng, 140, 70))


@pytest.mark.parametrize("names", [["image_ids"], ["image_ids", "bank_ids"], ["caption_ids"], ["excluded"]])
@pytest.mark.parametrize("positives", ["pair", "ids"])
def test_options(rng: torch.Generator, small_tiles: None, positives: str, names: list[str]) -> None:
    options = everything(rng, 131, 70)
    check(features(rng, 131, 70, 32), torch.float64, 14, positives=positives, **{name: options[name] for name in names})


def test_default_tiles(rng: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(features(rng, 700, 77, 64, hard=True), dtype, 50, image_ids=torch.arange(700) // 2)


def test_gradcheck(rng: torch.Generator, small_tiles: None) -> None:
    data, options = features(rng, 7, 4, 3), everything(rng, 7, 4)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (5.0, -2.0))
    for positives in ("pair", "ids"):

        def loss(text: Tensor, image: Tensor, scale: Tensor, bias: Tensor, positives: Any = positives) -> Tensor:
            return sigmoid_loss(
                text, image, data["bank"], logit_scale=scale, logit_bias=bias, positives=positives, **options
            ).loss

        inputs = (data["text"].clone().requires_grad_(), data["image"].clone().requires_grad_(), scale, bias)
        assert torch.autograd.gradcheck(loss, inputs)


def test_small_losses_are_exact() -> None:
    text, image = torch.eye(2).requires_grad_(), torch.eye(2)
    out = sigmoid_loss(text, image, logit_scale=60.0, logit_bias=-30.0)
    out.loss.backward()
    slope = 1 / (1 + math.exp(30))
    expected = 60 * slope / 2 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(out.loss, torch.tensor(2 * math.log1p(math.exp(-30))), rtol=1e-6, atol=0)
    torch.testing.assert_close(text.grad, expected, rtol=1e-6, atol=0)


def test_strides_do_not_matter(rng: torch.Generator) -> None:
    data = features(rng, 90, 30, 24)
    strided = {
        "text": data["text"].T.contiguous().T,
        "image": torch.stack([data["image"], -data["image"]], 1)[:, 0],
        "bank": torch.cat([data["bank"], data["bank"]], 1)[:, :24],
    }
    ids = (torch.arange(90) // 2).repeat_interleave(2)[::2]
    one, other = (run(sigmoid_loss, features, torch.float64, 14, image_ids=ids) for features in (data, strided))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])


def test_twice_gives_the_same_bits_and_autocast_rounds_nothing(rng: torch.Generator) -> None:
    data, options = features(rng, 700, 130, 64, hard=True), everything(rng, 700, 130)
    one = run(sigmoid_loss, data, torch.float32, 100, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = run(sigmoid_loss, data, torch.float32, 100, **options)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Rows without negatives, weights of zero


@pytest.mark.parametrize("positives", ["pair", "ids"])
@pytest.mark.parametrize("reason", ["equal ids", "excluded"])
def test_nothing_but_positives(rng: torch.Generator, positives: str, reason: str) -> None:
    options: dict[str, Any] = {
        "equal ids": {"image_ids": torch.zeros(9, dtype=torch.int64)},
        "excluded": {"excluded": tuple(torch.cartesian_prod(torch.arange(9), torch.arange(9)).T)},
    }[reason]
    data = features(rng, 9, 0, 8)
    check(data, torch.float64, 10, positives=positives, **options)
    out = run(sigmoid_loss, data, torch.float64, 10, positives=positives, **options)
    if positives == "pair" or reason == "excluded":
        own = -torch.nn.functional.logsigmoid(out["positive_logit"])
        torch.testing.assert_close(out["per_pair_loss"], own)


def test_weights_of_zero_and_no_pairs(rng: torch.Generator) -> None:
    out = run(sigmoid_loss, features(rng, 9, 5, 8), torch.float32, 10, pair_weights=torch.zeros(9))
    assert not any(bool(out[name].any()) for name in ("loss", "d_text", "d_image", "d_scale", "d_bias"))
    assert out["per_pair_loss"].min() > 0
    text = torch.zeros(0, 8, requires_grad=True)
    empty = sigmoid_loss(text, torch.zeros(0, 8), torch.ones(5, 8), logit_scale=10.0)
    empty.loss.backward()
    assert float(empty.loss.detach()) == 0
    assert text.grad is not None and text.grad.shape == (0, 8)


def test_nan_stays_in_its_row(rng: torch.Generator) -> None:
    data = features(rng, 70, 30, 16)
    data["text"][33, 2] = math.nan
    out = run(sigmoid_loss, data, torch.float32, 10)
    for name in ("per_pair_loss", "positive_logit"):
        assert out[name].isnan().nonzero().flatten().tolist() == [33]


# Cost


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_and_products(rng: torch.Generator, frozen: bool) -> None:
    """No M x N matrix; 3 products of M x N x D in all, 2 with frozen images, 1 where no gradient is wanted."""
    data = {name: value.float() for name, value in features(rng, 3000, 1500, 16).items()}
    text, image = data["text"].requires_grad_(), data["image"].requires_grad_(not frozen)
    tiles = {"image": math.ceil(3000 / 1024) * math.ceil(3000 / 512), "bank": 3 * math.ceil(1500 / 512)}

    def loss() -> Tensor:
        return sigmoid_loss(text, image, data["bank"], logit_scale=14.0, image_ids=torch.arange(3000) // 2).loss

    with Calls() as calls:
        value = loss()
        # The bank's tiles yield no gradient for images.
        assert calls.products == (2 if frozen else 3) * tiles["image"] + 2 * tiles["bank"]
        value.backward()
        assert calls.products == (2 if frozen else 3) * tiles["image"] + 2 * tiles["bank"]
    assert calls.largest <= 4 * chunked.TILE_LOGITS < 4 * 3000 * 3000
    assert (image.grad is None) == frozen
    with Calls() as calls, torch.no_grad():
        assert not loss().requires_grad
    assert calls.products == sum(tiles.values())
    with Calls() as calls:
        constant = sigmoid_loss(text.detach(), image.detach(), data["bank"], logit_scale=14.0).loss
    assert calls.products == sum(tiles.values()) and not constant.requires_grad


def test_rows_are_read_as_they_are(rng: torch.Generator, small_tiles: None) -> None:
    """No tensor as large as the bank is in fp32, nor as large as all logits."""
    text, image, bank = (torch.randn(rows, 24, generator=rng) for rows in (700, 700, 4000))
    image, bank = image.half(), bank.half()
    text.requires_grad_()
    with Calls() as calls:
        sigmoid_loss(text, image, bank, logit_scale=1.0).loss.backward()
    assert calls.largest <= 2 * bank.numel()


@pytest.mark.parametrize("leaf", ["text", "image", "scale", "bias"])
def test_one_gradient_alone(rng: torch.Generator, small_tiles: None, leaf: str) -> None:
    """Each is the same whether others are wanted or not; of what is not wanted nothing is made."""
    data, options = features(rng, 131, 70, 24), everything(rng, 131, 70)
    given = {"text": data["text"], "image": data["image"], "scale": torch.tensor(14.0), "bias": torch.tensor(-5.0)}
    wanted = given[leaf].double().clone().requires_grad_()
    text, image, scale, bias = (given | {leaf: wanted}).values()
    loss = sigmoid_loss(text, image, data["bank"], logit_scale=scale, logit_bias=bias, **options).loss
    loss.backward()
    everything_wanted = run(sigmoid_loss, data, torch.float64, 14, -5.0, **options)
    torch.testing.assert_close(wanted.grad, everything_wanted[f"d_{leaf}"].reshape(wanted.shape))


def test_gradients_add_up_and_follow_the_loss(rng: torch.Generator, small_tiles: None) -> None:
    """Backward twice through one graph, by two factors: what forward made is not used up."""
    data, options = features(rng, 131, 70, 24), everything(rng, 131, 70)
    text, image = data["text"].requires_grad_(), data["image"].requires_grad_()
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (14.0, -5.0))
    leaves = [text, image, scale, bias]
    loss = sigmoid_loss(text, image, data["bank"], logit_scale=scale, logit_bias=bias, **options).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    (3 * loss).backward(retain_graph=True)
    (loss - 0.5 * loss).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3.5 * grad)


# Triton


def test_triton_kernels_interpreted() -> None:
    file = Path(__file__).with_name("interpreted_sigmoid.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "of_columns", "kinds", "positives"),
    [
        ("bf16", "bf16", 0, False),
        ("bf16", "bf16", 0, True),
        ("fp16", "fp16", 1, False),
        ("bf16", "bf16", 1, True),
        ("bf16", "bf16", 2, True),
        ("fp32", "fp32", 2, True),
        ("fp32", "fp16", 0, False),
        ("fp32", "fp16", 2, True),
        ("fp32", "bf16", 2, True),
        ("bf16", "fp32", 2, True),
    ],
)
def test_triton_kernels_spill_nothing(
    tmp_path: Path, dtype: str, of_columns: str, kinds: int, positives: bool, capability: int
) -> None:
    from efficientclip.kernels.triton import sigmoid, tiles, tuning
    from tests.kernels.resources import resources

    mixed = dtype != of_columns
    used_as = "fp32" if mixed else dtype
    size = 4 if used_as == "fp32" else 2
    tile, of_products = sigmoid.tile_for(size, kinds, positives), tuning.TILES[size]
    product = {"PRECISION": "tf32x3" if used_as == "fp32" else "ieee", "UPCAST": False}
    shape = {"BLOCK": tile.BLOCK, "BLOCK_K": tile.BLOCK_K, **product, "UPCAST": mixed}
    flags = {"IDS": kinds, "POSITIVES": positives}
    features, vector, label = f"*{used_as}", "*fp32", "*i32"
    given = {
        "text": f"*{dtype}", "columns": f"*{of_columns}", "text_stride": "i32", "columns_stride": "i32",
        "scalars": vector, "cells": label, "bounds": label, "M": "i32", "C": "i32", "D": "i32", "diagonal": "i32",
    }  # fmt: skip
    if kinds:
        given |= {"row_codes": label, "col_codes": label}
    loss = given | {"loss": vector, "strip_tiles": "i32"}
    slope = given | {"slope": features, "sums": vector, "first_row": "i32", "first_col": "i32"}
    gather = {
        "chunk": features, "features": features, "out": vector, "chunk_stride": "i32", "features_stride": "i32",
        "out_stride": "i32", "rows": "i32", "step": "i32", "K": "i32", "D": "i32", "span": "i32", "out_step": "i32",
    }  # fmt: skip
    kernels: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        (sigmoid.loss_kernel, loss, shape | flags, tile.num_warps),
        (sigmoid.slope_kernel, slope, shape | flags | {"CHUNK": tuning.CHUNK}, tile.num_warps),
    ]
    if kinds and not mixed:
        blocks = {"BLOCK_R": of_products.BLOCK, "BLOCK_K": of_products.BLOCK_K, "BLOCK_D": of_products.BLOCK, **product}
        for transposed in (False, True):
            constants = {"TRANSPOSED": transposed, "SPLIT": False, "PARTS": 1, **blocks}
            kernels.append((tiles.product_kernel, gather, constants, of_products.num_warps))
    for kernel, types, constants, num_warps in kernels:
        used = resources(
            kernel, types, constants, capability, tmp_path, num_warps=num_warps, num_stages=tile.num_stages
        )
        print(kernel.__name__, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)
        assert used["SHARED"] <= 160 << 10, (kernel, used)
        assert used["MATRIX"], (kernel, used)


# Wrong arguments

TEXT = torch.zeros(4, 8)
IDS = torch.zeros(4, dtype=torch.int64)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"text_MD": [1.0]}, TypeError, "text_MD is a list"),
    ({"text_MD": torch.zeros(4, 1025)}, ValueError, r"text_MD has shape \(4, 1025\)"),
    ({"image_MD": torch.zeros(5, 8)}, ValueError, r"image_MD has shape \(5, 8\), expected \(4, 8\)"),
    ({"image_MD": TEXT.double()}, TypeError, "image_MD is torch.float64 and text_MD is torch.float32"),
    ({"bank_QD": torch.zeros(5, 8, requires_grad=True)}, ValueError, "bank_QD requires grad"),
    ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale has shape \(2,\)"),
    ({"logit_bias": math.inf}, ValueError, "logit_bias is inf"),
    ({"pair_weights": -torch.ones(4)}, ValueError, "pair_weights has negative"),
    ({"positives": "all"}, ValueError, "positives is 'all', expected 'pair' or 'ids'"),
    ({"image_ids": IDS.int()}, TypeError, "image_ids is torch.int32, expected int64"),
    ({"caption_ids": [1, 2, 3, 4]}, TypeError, "caption_ids is a list"),
    ({"bank_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "bank_ids is given without image_ids"),
    ({"bank_QD": None, "bank_ids": IDS, "image_ids": IDS}, ValueError, "bank_ids is given without bank_QD"),
    ({"excluded": IDS}, TypeError, "excluded is a Tensor"),
    ({"excluded": (IDS, IDS + 9)}, ValueError, r"excluded\[1\] \(columns\) spans 9 to 9, expected 0 to 8"),
    ({"group": "gloo"}, TypeError, "group is a str, expected a ProcessGroup"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"text_MD": TEXT, "image_MD": TEXT, "bank_QD": torch.zeros(5, 8), "logit_scale": 1.0}
    sigmoid_loss(**right)
    with Calls() as calls, pytest.raises(error, match=message):
        sigmoid_loss(**(right | change))
    assert calls.products == 0
