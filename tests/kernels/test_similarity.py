"""Cosines, ranks and nearest rows against their naive references; the Triton kernels interpreted and compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientclip.kernels import paired_similarity, positive_ranks, similarity, top_k
from efficientclip.kernels.similarity import paired_similarity_naive, positive_ranks_naive, top_k_naive
from tests.kernels.calls import Calls

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of queries and of the bank.
MIXED = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
SHAPES = [(1, 1, 1), (1, 300, 24), (70, 1, 100), (130, 401, 24), (257, 83, 100), (64, 128, 1)]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_ROWS", 61)
    monkeypatch.setattr(similarity, "TILE_CELLS", 61 * 37)
    monkeypatch.setattr(similarity, "CHUNK_ROWS", 50)
    monkeypatch.setattr(similarity, "PANEL_CELLS", 61 * 37)


def unit(rng: torch.Generator, rows: int, D: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, D, generator=rng, dtype=torch.float64), dim=1).to(dtype)


def whole(rng: torch.Generator, rows: int, D: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: products are exact in any order, and many tie."""
    return torch.randint(-1, 2, (rows, D), generator=rng).to(dtype)


def positives(rng: torch.Generator, M: int, Q: int) -> tuple[Tensor, Tensor]:
    """One to three positives a query, some of them twice."""
    sizes = torch.randint(1, 4, (M,), generator=rng)
    groups = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return torch.randint(0, Q, (int(groups[-1]),), generator=rng), groups


# Ranks


@pytest.mark.parametrize("draw", [unit, whole])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "Q", "D"), SHAPES)
def test_ranks(rng: torch.Generator, small_tiles: None, M: int, Q: int, D: int, dtype: torch.dtype, draw: Any) -> None:
    query, bank = draw(rng, M, D, dtype), draw(rng, Q, D, dtype)
    bank[Q // 2 :] = bank[: Q - Q // 2].clone()
    rows, groups = positives(rng, M, Q)
    ranks = positive_ranks(query, bank, rows, groups)
    assert torch.equal(ranks, positive_ranks_naive(query, bank, rows, groups))
    assert 1 in (M, Q) or bool(ranks.frac().any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_tie_wherever_they_lie(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Real tiles, whose edges a matrix product may treat by another kernel."""
    query, one = unit(rng, 515, 100, dtype), unit(rng, 1, 100, dtype)
    rows, groups = torch.randint(0, 4999, (515,), generator=rng), torch.arange(516)
    ranks = positive_ranks(query, one.repeat(4999, 1), rows, groups)
    assert torch.equal(ranks, torch.full_like(ranks, 1 + 4998 / 2))


def test_better_and_equal_positives_of_the_same_query_do_not_count() -> None:
    query, bank = torch.ones(1, 1), torch.tensor([[3.0], [3.0], [2.0], [3.0], [4.0], [1.0]])
    for rows, rank in (([0], 3.0), ([0, 1], 2.5), ([0, 1, 3, 0], 2.0), ([2, 4, 2], 1.0), ([5], 6.0)):
        ranks = positive_ranks(query, bank, torch.tensor(rows), torch.tensor([0, len(rows)]))
        assert ranks.tolist() == [rank]


def test_zero_features_rank_in_the_middle() -> None:
    ranks = positive_ranks(torch.zeros(2, 8), torch.randn(11, 8), torch.tensor([3, 10]), torch.arange(3))
    assert ranks.tolist() == [6.0, 6.0]


def test_no_queries() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert positive_ranks(torch.zeros(0, 3), torch.zeros(5, 3), nothing, torch.zeros(1, dtype=torch.int64)).shape == (
        0,
    )
    assert [part.shape for part in top_k(torch.zeros(0, 3), torch.zeros(5, 3), 2)] == [(0, 2), (0, 2)]
    assert paired_similarity(torch.zeros(0, 3), torch.zeros(5, 3), nothing).shape == (0,)


# Nearest rows


@pytest.mark.parametrize("draw", [unit, whole])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "Q", "D"), SHAPES)
def test_top_k(rng: torch.Generator, small_tiles: None, M: int, Q: int, D: int, dtype: torch.dtype, draw: Any) -> None:
    query, bank = draw(rng, M, D, dtype), draw(rng, Q, D, dtype)
    bank[Q // 2 :] = bank[: Q - Q // 2].clone()
    for k in sorted({1, min(5, Q), min(60, Q), Q}):
        scores, rows = top_k(query, bank, k)
        expected_scores, expected_rows = top_k_naive(query, bank, k)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=1e-9)
        assert torch.equal(rows, expected_rows)


@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_nearest_rows_that_fp32_cannot_tell_apart(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, scale: float, precision: str
) -> None:
    """A rough score in fp32 is wrong by more than these differ; where squares overflow, nothing bounds it."""
    monkeypatch.setattr(similarity, "PANEL_CELLS", 1 << 13)
    query = unit(rng, 3, 512, torch.float32)
    bank = (query[:1] + 1e-7 * torch.randn(1200, 512, generator=rng)) * scale
    expected_scores, expected_rows = top_k_naive(query, bank, 9)
    in_fp32 = (query @ bank.T).sort(dim=1, descending=True, stable=True).indices[:, :9]
    assert not torch.equal(in_fp32, expected_rows)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        scores, rows = top_k(query, bank, 9)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=0)


def test_few_bank_rows_are_scored_twice(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    query, bank = unit(rng, 1, 64, torch.float32), unit(rng, 1 << 16, 64, torch.float16)
    scored, real = [], similarity._select

    def counted(scores_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scored.append(scores_RC.shape[1])
        return real(scores_RC, k)

    monkeypatch.setattr(similarity, "_select", counted)
    top_k(query, bank, 10)
    assert 10 <= sum(scored) < 500


@pytest.mark.parametrize(("dtype", "of_bank"), MIXED, ids=str)
def test_a_bank_may_have_another_dtype(
    rng: torch.Generator, small_tiles: None, dtype: torch.dtype, of_bank: torch.dtype
) -> None:
    """And is read as it is: nothing is as large as it would be in fp32."""
    query, bank = unit(rng, 70, 24, dtype), unit(rng, 4000, 24, of_bank)
    bank[2000:] = bank[:2000].clone()
    rows, groups = positives(rng, 70, 4000)
    with Calls() as calls:
        scores, nearest = top_k(query, bank, 9)
        ranks = positive_ranks(query, bank, rows, groups)
        cosines = paired_similarity(query, bank, rows[:70])
    assert calls.largest <= bank.untyped_storage().nbytes()
    for value, expected in zip((scores, nearest), top_k_naive(query, bank, 9), strict=True):
        assert torch.equal(value, expected)
    assert torch.equal(ranks, positive_ranks_naive(query, bank, rows, groups)) and bool(ranks.frac().any())
    expected = paired_similarity_naive(query, bank, rows[:70])
    torch.testing.assert_close(cosines.double(), expected, rtol=0, atol=5e-7)


# Cosines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "Q", "D"), SHAPES)
def test_cosines(rng: torch.Generator, small_tiles: None, M: int, Q: int, D: int, dtype: torch.dtype) -> None:
    text = torch.randn(M, D, generator=rng).to(dtype)
    bank = torch.randn(Q, D, generator=rng).to(dtype)
    bank[Q // 2 :] *= 1e-3 if dtype == torch.float16 else 1e-30
    rows = torch.randint(0, Q, (M,), generator=rng)
    out, expected = paired_similarity(text, bank, rows), paired_similarity_naive(text, bank, rows)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 5e-7
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_cosines(rng: torch.Generator, dtype: torch.dtype) -> None:
    text = torch.randn(1, 24, generator=rng).to(dtype).repeat(5, 1)
    bank = torch.stack([text[0], -text[0], 0 * text[0], 2 * text[0], text[0]])
    bank[4, 3] = math.nan
    expected = torch.tensor([1.0, -1.0, 0.0, 1.0, math.nan])
    out = paired_similarity(text, bank, torch.arange(5)).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert paired_similarity(bank[2:3].repeat(5, 1), bank, torch.arange(5))[:4].tolist() == [0, 0, 0, 0]


def test_strides_and_gradients_do_not_matter(rng: torch.Generator) -> None:
    query, bank = unit(rng, 30, 24, torch.float32), unit(rng, 90, 24, torch.float32)
    strided = query.T.contiguous().T.requires_grad_(), torch.cat([bank, bank], 1)[:, :24].requires_grad_()
    rows, groups = torch.randint(0, 90, (30,), generator=rng), torch.arange(31)
    for one, other in (
        (paired_similarity(*strided, rows), paired_similarity(query, bank, rows)),
        (positive_ranks(*strided, rows, groups), positive_ranks(query, bank, rows, groups)),
        (top_k(*strided, 7)[0], top_k(query, bank, 7)[0]),
    ):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad


def test_autocast_rounds_nothing(rng: torch.Generator) -> None:
    query, bank = unit(rng, 30, 24, torch.float32), unit(rng, 90, 24, torch.float32)
    rows, groups = torch.randint(0, 90, (30,), generator=rng), torch.arange(31)

    def scores() -> list[Tensor]:
        return [
            paired_similarity(query, bank, rows),
            positive_ranks(query, bank, rows, groups),
            *top_k(query, bank, 7),
        ]

    plain = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = scores()
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(plain, under, strict=True))


# Cost


def test_no_matrix_of_all_scores_in_memory(rng: torch.Generator) -> None:
    query, bank = unit(rng, 3000, 16, torch.float32), unit(rng, 6000, 16, torch.float32)
    rows = torch.randint(0, 6000, (3000,), generator=rng)
    with Calls() as calls:
        positive_ranks(query, bank, rows, torch.arange(3001))
        top_k(query, bank, 10)
        paired_similarity(query, bank, rows)
    assert calls.largest <= 8 * similarity.TILE_CELLS < 4 * 3000 * 6000


# Triton


def test_triton_kernels_interpreted() -> None:
    file = Path(__file__).with_name("interpreted_similarity.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "of_bank"),
    [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"), ("bf16", "fp32")],
)
def test_triton_kernels_spill_nothing(tmp_path: Path, dtype: str, of_bank: str, capability: int) -> None:
    from efficientclip.kernels.triton import similarity, tuning
    from tests.kernels.resources import resources

    mixed = dtype != of_bank
    size = 4 if mixed or dtype == "fp32" else 2
    tile = tuning.TILES[size]._asdict()
    product = {"PRECISION": "tf32x3" if size == 4 else "ieee", "UPCAST": mixed}
    shape = {"BLOCK": tile.pop("BLOCK"), "BLOCK_K": tile.pop("BLOCK_K"), **product}
    queries, bank, vector, lists = f"*{dtype}", f"*{of_bank}", "*fp32", "*i64"
    given = {"query": queries, "bank": bank, "query_stride": "i32", "bank_stride": "i32", "D": "i32"}
    kernels: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (
            similarity.count_kernel,
            given
            | {
                "best": vector, "count": "*i32", "cells": "*i32", "bounds": "*i32", "M": "i32", "Q": "i32",
                "strip_tiles": "i32",
            },
            shape,
            tile,
        ),
        (
            similarity.positive_kernel,
            given | {"owners": lists, "rows": lists, "out": vector, "E": "i32"},
            shape,
            tile,
        ),
        (
            similarity.paired_kernel,
            {
                "text_ptr": queries, "bank_ptr": bank, "rows_ptr": lists, "out_ptr": vector,
                "M": "i32", "D": "i32",
            },
            {"BLOCK_R": tuning.PAIRED_ROWS, "BLOCK_K": tuning.PAIRED_K},
            {},
        ),
    ]  # fmt: skip
    for kernel, types, constants, options in kernels:
        # Cosines take features of any width as they lie; the others get zeros appended.
        aligned = kernel is not similarity.paired_kernel
        used = resources(kernel, types, constants, capability, tmp_path, aligned, **options)
        print(kernel.__name__, used)
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, used)
        # What a program may hold on every card of sm_80 and later but the small ones.
        assert used["SHARED"] <= 160 << 10, (kernel, used)
        assert used["MATRIX"] or not aligned, (kernel, used)


# Wrong arguments

QUERY, BANK, ROWS = torch.zeros(4, 8), torch.zeros(6, 8), torch.arange(4)
WRONG: list[tuple[Any, dict[int, Any], type[Exception], str]] = [
    (paired_similarity, {0: [1.0]}, TypeError, "text_MD is a list, expected a tensor"),
    (paired_similarity, {0: torch.zeros(4)}, ValueError, r"text_MD has shape \(4,\), expected \[rows, D\]"),
    (paired_similarity, {0: torch.zeros(4, 8, dtype=torch.int8)}, TypeError, "text_MD is torch.int8"),
    (paired_similarity, {1: torch.zeros(6, 7)}, ValueError, "bank_QD is 7 wide and text_MD 8: pass equal widths"),
    (paired_similarity, {1: BANK.to("meta")}, ValueError, "bank_QD is on meta, expected cpu"),
    (paired_similarity, {2: ROWS.int()}, TypeError, "rows_M is torch.int32, expected int64"),
    (paired_similarity, {2: ROWS[:3]}, ValueError, r"rows_M has shape \(3,\), expected \[4\]"),
    (paired_similarity, {2: ROWS - 1}, ValueError, "rows_M spans -1 to 2, expected 0 to 5"),
    (paired_similarity, {2: ROWS.to("meta")}, ValueError, "rows_M is on meta, expected cpu"),
    (positive_ranks, {2: ROWS + 3}, ValueError, "rows_E spans 3 to 6, expected 0 to 5"),
    (positive_ranks, {2: [0, 1, 2, 3]}, TypeError, "rows_E is a list, expected an int64 tensor"),
    (positive_ranks, {2: ROWS[None]}, ValueError, r"rows_E has shape \(1, 4\), expected \[E\]"),
    (positive_ranks, {3: torch.arange(4)}, ValueError, r"groups has shape \(4,\), expected \[5\]"),
    (positive_ranks, {3: torch.arange(5) + 1}, ValueError, "groups runs from 1 to 5, expected 0 to 4"),
    (positive_ranks, {3: torch.tensor([0, 1, 1, 3, 4])}, ValueError, "query 1 has no positive, expected at least one"),
    (positive_ranks, {0: torch.full((4, 8), math.nan)}, ValueError, "query_MD row 0 holds NaN or infinity"),
    (positive_ranks, {1: BANK.index_fill(0, torch.tensor(5), math.inf)}, ValueError, "bank_QD row 5 holds NaN"),
    (top_k, {2: 7}, ValueError, "k is 7 and bank_QD has 6 rows: pass a k from 1"),
    (top_k, {2: 0}, ValueError, "k is 0 and bank_QD has 6 rows"),
    (top_k, {2: 1.0}, TypeError, "k is a float, expected an int from 1 to 6"),
    (top_k, {0: torch.full((4, 8), -math.inf)}, ValueError, "query_MD row 0 holds NaN or infinity"),
    (positive_ranks, {1: BANK.index_fill(0, torch.tensor(4), math.inf)}, ValueError, "bank_QD row 4 holds NaN or inf"),
    (top_k, {1: BANK.index_fill(0, torch.tensor(5), math.nan)}, ValueError, "bank_QD row 5 holds NaN or infinity"),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(function: Any, change: dict[int, Any], error: type[Exception], message: str) -> None:
    right: dict[Any, list[Any]] = {
        paired_similarity: [QUERY, BANK, ROWS],
        positive_ranks: [QUERY, BANK, ROWS, torch.arange(5)],
        top_k: [QUERY, BANK, 3],
    }
    function(*right[function])
    with pytest.raises(error, match=message):
        function(*[change.get(at, value) for at, value in enumerate(right[function])])
