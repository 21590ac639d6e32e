"""The scores in Triton: cosines of pairs, and ranks of positives with no M x Q matrix.

Cost model, for M queries, Q bank rows, width D, E positives and b bytes a feature:

- `paired`: reads 2 M D b bytes and M indices, writes 4 M; no workspace, whatever the dtypes.
- `ranks`: one product of M Q D multiply-adds, plus 128 E D for the positives. A program keeps its queries' counts in
  registers and walks the bank; workspace 4 bytes a query and strip, 4 bytes a tile of 128 x 128 (fp32: 64 x 64) of
  `SLAB_ROWS` queries, and a copy of the features unless D is a multiple of 16.

They add in fp32, each score in one order over D. Queries and bank rows of different dtypes are multiplied as fp32, each
block once it is loaded.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .cells import by_tile
from .tiles import addressable, arithmetic, fill_cells, tile_product


@triton.jit
def paired_kernel(
    text_ptr, bank_ptr, rows_ptr, out_ptr, M, D, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    open_R1 = (at_R < M)[:, None]
    text_R1 = text_ptr + at_R.to(tl.int64)[:, None] * D
    bank_R1 = bank_ptr + tl.load(rows_ptr + at_R, mask=at_R < M, other=0).to(tl.int64)[:, None] * D
    text_top_R = tl.zeros([BLOCK_R], tl.float32)
    bank_top_R = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_K):
        k_1K = start + tl.arange(0, BLOCK_K)[None, :]
        text_RK = tl.load(text_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        bank_RK = tl.load(bank_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        text_top_R = tl.maximum(text_top_R, tl.max(tl.abs(text_RK), 1))
        bank_top_R = tl.maximum(bank_top_R, tl.max(tl.abs(bank_RK), 1))
    # Divided by their largest entry, features of any size have squares that neither overflow nor vanish.
    text_top_R = tl.where(text_top_R == 0, 1.0, text_top_R)
    bank_top_R = tl.where(bank_top_R == 0, 1.0, bank_top_R)
    dot_R = tl.zeros([BLOCK_R], tl.float32)
    text_square_R = tl.zeros([BLOCK_R], tl.float32)
    bank_square_R = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_K):
        k_1K = start + tl.arange(0, BLOCK_K)[None, :]
        text_RK = tl.load(text_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        bank_RK = tl.load(bank_R1 + k_1K, mask=open_R1 & (k_1K < D), other=0.0).to(tl.float32)
        text_RK = text_RK / text_top_R[:, None]
        bank_RK = bank_RK / bank_top_R[:, None]
        dot_R += tl.sum(text_RK * bank_RK, 1)
        text_square_R += tl.sum(text_RK * text_RK, 1)
        bank_square_R += tl.sum(bank_RK * bank_RK, 1)
    length_R = tl.sqrt(text_square_R) * tl.sqrt(bank_square_R)
    tl.store(out_ptr + at_R, dot_R / tl.where(length_R == 0, 1.0, length_R), mask=at_R < M)


@triton.jit
def positive_kernel(
    query, bank, query_stride, bank_stride, owners, rows, out, E, D, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The score of each (owner, row), as the diagonal of the tile of the block's owners and rows."""
    at_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    open_R = at_R < E
    owner_R = tl.load(owners + at_R, mask=open_R, other=0)
    row_R = tl.load(rows + at_R, mask=open_R, other=0)
    score_RC = tile_product(
        query, query_stride, owner_R, open_R, bank, bank_stride, row_R, open_R, D, BLOCK, BLOCK, BLOCK_K, PRECISION,
        UPCAST, NAMED=True,
    )  # fmt: skip
    own_RC = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    tl.store(out + at_R, tl.sum(tl.where(own_RC, score_RC, 0.0), 1), mask=open_R)


@triton.jit
def count_kernel(
    query, bank, query_stride, bank_stride, best, count, cells, bounds, M, Q, D, strip_tiles, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """2 x better + equal of one block of queries among one strip of the bank, positives left out."""
    first = tl.program_id(0) * BLOCK
    strip = tl.program_id(1)
    query_R = first + tl.arange(0, BLOCK)
    best_R = tl.load(best + query_R, mask=query_R < M, other=float("inf"))
    count_R = tl.zeros([BLOCK], tl.int32)
    for tile in range(strip * strip_tiles, tl.minimum((strip + 1) * strip_tiles, tl.cdiv(Q, BLOCK))):
        col = tile * BLOCK
        score_RC = tile_product(
            query, query_stride, first, M, bank, bank_stride, col, Q, D, BLOCK, BLOCK, BLOCK_K, PRECISION, UPCAST
        )
        row_C = col + tl.arange(0, BLOCK)
        score_RC = tl.where((row_C < Q)[None, :], score_RC, float("-inf"))
        score_RC = fill_cells(score_RC, cells, bounds, first, col, Q, float("-inf"), BLOCK, BLOCK)
        better_RC = (score_RC > best_R[:, None]).to(tl.int32)
        equal_RC = (score_RC == best_R[:, None]).to(tl.int32)
        count_R += tl.sum(2 * better_RC + equal_RC, 1)
    tl.store(count + strip.to(tl.int64) * M + query_R, count_R, mask=query_R < M)


# Launching


def paired(text_MD: Tensor, bank_QD: Tensor, rows_M: Tensor) -> Tensor:
    """Cosines [M] fp32 of text i and bank row rows_M[i]."""
    M, D = text_MD.shape
    out_M = torch.empty(M, dtype=torch.float32, device=text_MD.device)
    if M:
        paired_kernel[triton.cdiv(M, tuning.PAIRED_ROWS),](
            text_MD.contiguous(), bank_QD.contiguous(), rows_M.contiguous(), out_M, M, D,
            BLOCK_R=tuning.PAIRED_ROWS, BLOCK_K=tuning.PAIRED_K,
        )  # fmt: skip
    return out_M


def ranks(query_MD: Tensor, bank_QD: Tensor, owners_E: Tensor, rows_E: Tensor) -> Tensor:
    """Ranks [M] fp64 of the best of each query's positives, cells (owner, row) sorted by owner."""
    query_MD, bank_QD = addressable(query_MD), addressable(bank_QD)
    (M, D), Q, device = query_MD.shape, len(bank_QD), query_MD.device
    dtype = query_MD.dtype if query_MD.dtype == bank_QD.dtype else torch.float32
    tile = tuning.TILES[dtype.itemsize]
    options = {**tile._asdict(), **arithmetic(dtype)}
    if query_MD.dtype != bank_QD.dtype:
        options["UPCAST"] = True
    strides = query_MD.stride(0), bank_QD.stride(0)
    score_E = torch.empty(len(rows_E), dtype=torch.float32, device=device)
    positive_kernel[triton.cdiv(len(rows_E), tile.BLOCK),](
        query_MD, bank_QD, *strides, owners_E, rows_E, score_E, len(rows_E), D, **options
    )
    best_M = torch.full((M,), -math.inf, dtype=torch.float32, device=device)
    best_M.scatter_reduce_(0, owners_E, score_E, "amax")
    ranks_M = torch.empty(M, dtype=torch.float64, device=device)
    tiles = triton.cdiv(Q, tile.BLOCK)
    for start in range(0, M, tuning.SLAB_ROWS):
        slab = slice(start, min(start + tuning.SLAB_ROWS, M))
        rows = slab.stop - start
        low, high = torch.searchsorted(owners_E, torch.tensor([start, slab.stop], device=device)).tolist()
        owner_E, row_E = owners_E[low:high] - start, rows_E[low:high]
        cells = by_tile(owner_E, row_E, (rows, Q), (tile.BLOCK, tile.BLOCK))
        blocks = triton.cdiv(rows, tile.BLOCK)
        strip_tiles = triton.cdiv(tiles, min(tiles, max(1, tuning.PROGRAMS // blocks)))
        strips = triton.cdiv(tiles, strip_tiles)
        count = torch.empty(strips, rows, dtype=torch.int32, device=device)
        count_kernel[blocks, strips](
            query_MD[slab], bank_QD, *strides, best_M[slab], count, *cells, rows, Q, D, strip_tiles, **options
        )
        ranks_M[slab] = 1 + count.sum(0).double() / 2
    return ranks_M
