"""The Triton kernels of `similarity` in Triton's interpreter: `test_similarity` runs this file with it turned on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientclip.kernels import paired_similarity, paths, positive_ranks
from efficientclip.kernels.similarity import paired_similarity_naive, positive_ranks_naive
from efficientclip.kernels.triton import tiles, tuning
from efficientclip.kernels.triton.tuning import Tile
from tests.kernels.calls import Calls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of queries and of the bank.
MIXED = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + MIXED


@pytest.fixture(autouse=True)
def triton_path(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """CPU tensors to the Triton kernels, in tiles so small that few queries need several."""
    monkeypatch.setattr(paths, "KERNELS_ON_CPU", True)
    monkeypatch.setattr(tuning, "TILES", {2: Tile(16, 64, 4, 2), 4: Tile(32, 64, 4, 2)})
    monkeypatch.setattr(tuning, "SLAB_ROWS", 64)
    monkeypatch.setattr(tuning, "PROGRAMS", 6)


def positives(rng: torch.Generator, M: int, Q: int) -> tuple[Tensor, Tensor]:
    sizes = torch.randint(1, 4, (M,), generator=rng)
    groups = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return torch.randint(0, Q, (int(groups[-1]),), generator=rng), groups


def test_the_interpreter_is_on() -> None:
    assert tiles.arithmetic(torch.bfloat16)["UPCAST"]


@pytest.mark.parametrize(("dtype", "of_bank"), PAIRS, ids=str)
@pytest.mark.parametrize(("M", "Q", "D"), [(1, 70, 1), (75, 33, 100), (20, 33, 1000), (20, 33, 1024)])
def test_ranks_with_exact_ties(
    rng: torch.Generator, dtype: torch.dtype, of_bank: torch.dtype, M: int, Q: int, D: int
) -> None:
    """Small whole numbers: products are exact in any order, and many tie."""
    query = torch.randint(-1, 2, (M, D), generator=rng).to(dtype)
    bank = torch.randint(-1, 2, (Q, D), generator=rng).to(of_bank)
    bank[Q // 2 :] = bank[: Q - Q // 2].clone()
    rows, groups = positives(rng, M, Q)
    ranks = positive_ranks(query, bank, rows, groups)
    assert torch.equal(ranks, positive_ranks_naive(query, bank, rows, groups))
    assert M == 1 or bool(ranks.frac().any())


@pytest.mark.parametrize(("dtype", "of_bank"), MIXED, ids=str)
def test_ranks_among_rows_of_another_dtype(rng: torch.Generator, dtype: torch.dtype, of_bank: torch.dtype) -> None:
    """Those of plain torch in fp64, where no two scores are as near as fp32 rounds; the bank has rows twice."""
    query = F.normalize(torch.randn(40, 96, generator=rng), dim=1).to(dtype)
    bank = F.normalize(torch.randn(120, 96, generator=rng), dim=1).to(of_bank)
    bank[60:] = bank[:60].clone()
    rows, groups = positives(rng, 40, 120)
    with Calls() as calls:
        ranks = positive_ranks(query, bank, rows, groups)
    scores = query.double() @ bank.double().T
    apart = (scores[:, None, :60] - scores[:, :60, None]).abs() + 2 * torch.eye(60)
    clear = apart.amin((1, 2)) > 1e-6
    assert torch.equal(ranks[clear], positive_ranks_naive(query, bank, rows, groups)[clear]) and clear.sum() > 9
    assert calls.largest < max(4 * bank.numel(), bank.untyped_storage().nbytes() + 1)


@pytest.mark.parametrize(("dtype", "of_bank"), PAIRS, ids=str)
def test_equal_rows_tie_whatever_their_features(
    rng: torch.Generator, dtype: torch.dtype, of_bank: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tensor core adds up every product alike; the interpreter's numpy, with AVX2, those at a tile's edge otherwise.
    multiply = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: multiply(a, b, dtype=np.float64).astype(dtype))
    query, one = (
        F.normalize(torch.randn(n, 100, generator=rng), dim=1).to(to) for n, to in ((40, dtype), (1, of_bank))
    )
    rows, groups = torch.randint(0, 50, (40,), generator=rng), torch.arange(41)
    ranks = positive_ranks(query, one.repeat(50, 1), rows, groups)
    assert torch.equal(ranks, torch.full_like(ranks, 1 + 49 / 2))


@pytest.mark.parametrize(("dtype", "of_bank"), PAIRS, ids=str)
@pytest.mark.parametrize(("M", "D"), [(1, 1), (37, 24), (20, 512), (20, 1000)])
def test_cosines(rng: torch.Generator, dtype: torch.dtype, of_bank: torch.dtype, M: int, D: int) -> None:
    text, bank = torch.randn(M, D, generator=rng).to(dtype), torch.randn(50, D, generator=rng).to(of_bank)
    bank[7], bank[8], bank[9], bank[10] = 0, text[0], -text[0], math.nan
    bank[11:20] *= 1e-3 if of_bank == torch.float16 else 1e-30
    rows = torch.randint(11, 50, (M,), generator=rng)
    for row in (rows[0], 7, 8, 9, 10):
        rows[0] = row
        expected = paired_similarity_naive(text, bank, rows)
        torch.testing.assert_close(
            paired_similarity(text, bank, rows).double(), expected, rtol=0, atol=1e-6, equal_nan=True
        )
