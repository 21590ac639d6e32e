"""The tiles of `contrastive_loss` in Triton: one pass forward, one recompute backward, no M x N matrix.

Cost model, for M texts of this rank, N images of all ranks, Q bank rows and width D:

- products: M (N + Q) D multiply-adds, once in forward and three times in backward (the recompute, d text, d image);
  two in backward when images are frozen. A bank column enters no d image.
- exponentials: one a logit in forward, two in backward. Columns that the one exponential cannot serve are
  computed again, block by block; without any, that kernel only reads N sums.
- memory beside the inputs: column sums, programs x panel x 4 B (35 MB on sm_90) however large N is; two numbers a
  text and column of programs; 4 B a tile where cells are masked; the logit gradients of one chunk (32 MB); fp32
  M x D for d text and N x D for d image; a copy of the features unless D is a multiple of 16.
- traffic: a tile reads (rows + columns) D elements from L2 for rows x columns x D products, 128 x 128 being what the
  registers hold beside its exponentials. In backward a logit gradient is written once and read twice, in chunks
  that stay in L2.

Why these tiles. Forward: a program keeps a block of columns and walks down its own blocks of rows, so that column
sums leave the registers once a strip; rows are merged in a slice that no other program touches. So there are no
atomics, and the bits do not depend on a chip's number of SMs. With e = exp2(z - the tile's row maximum), e summed
along a row is the row's sum, and e * exp2(row maximum - strip maximum) summed down a column is the column's. A term
below 2^-126 of the strip's maximum is lost: a column whose sum is under 2^-80 of it goes to the rescue kernel, in any
other the loss is below M 2^-46.
Backward: dZ goes through memory since one program cannot hold the D-wide sums of both its rows and its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from .contrastive import _Gradients, _LogSumExps, _Place, _Sums

# Stands for the maximum of nothing: finite, so that differences of two of them are 0 and not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e38)
WEAK: tl.constexpr = tl.constexpr(2.0**-80)
LN2 = math.log(2)
# Rows at a time where plain torch walks features in fp32.
ROW_STEP = 4096
# The greatest magnitude a logit gradient is scaled to: fp16 ends at 2^16.
TOP_EXPONENT = 14


# Kernels


@triton.jit
def _load(
    source: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """A block of a matrix [rows, cols], 0 beyond it; `source` is a descriptor, or a pointer if `stride` is given."""
    if stride is None:
        block = source.load([row, col])
    else:
        in_rows = tl.arange(0, BLOCK_R)
        in_cols = tl.arange(0, BLOCK_C)
        # Rows times stride may pass 2^31; within a block they do not.
        at = source + tl.cast(row, tl.int64) * stride + col + (in_rows[:, None] * stride + in_cols[None, :])
        block = tl.load(at, mask=(row + in_rows < rows)[:, None] & (col + in_cols < cols)[None, :], other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def _store(
    target: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    block: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """The counterpart of `_load`; nothing is written beyond the matrix."""
    if stride is None:
        target.store([row, col], block.to(target.dtype))
    else:
        in_rows = tl.arange(0, BLOCK_R)
        in_cols = tl.arange(0, BLOCK_C)
        at = target + tl.cast(row, tl.int64) * stride + col + (in_rows[:, None] * stride + in_cols[None, :])
        inside = (row + in_rows < rows)[:, None] & (col + in_cols < cols)[None, :]
        tl.store(at, block.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _tile_products(
    text: tl.tensor,
    columns: tl.tensor,
    text_stride: tl.tensor,
    columns_stride: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    row_codes: tl.tensor,
    col_codes: tl.tensor,
    cells: tl.tensor,
    bounds: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    offset: tl.tensor,
    BANK: tl.constexpr,
    IDS: tl.constexpr,
    POSITIVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Inner products, and the factor > 0 that makes logits over ln 2 of them; a negative scale turns their sign.

    They are -inf on the diagonal, at masked cells and beyond the last column. Products, since a logit need never be
    rounded: what is taken from it comes in the same fma.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        a = _load(text, text_stride, row, d, M, D, BLOCK_M, BLOCK_D, UPCAST)
        b = _load(columns, columns_stride, col, d, N, D, BLOCK_N, BLOCK_D, UPCAST)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    factor = tl.load(scale)
    if factor < 0:
        acc = -acc
    # Not 0: -inf times 0 is NaN.
    factor = tl.maximum(tl.abs(factor), 1e-30)
    cols = col + tl.arange(0, BLOCK_N)
    if col + BLOCK_N > N:
        acc = tl.where((cols < N)[None, :], acc, float("-inf"))
    if not BANK:
        own = row + offset
        if (own < col + BLOCK_N) & (col < own + BLOCK_M):
            acc = tl.where((own + tl.arange(0, BLOCK_M))[:, None] == cols[None, :], float("-inf"), acc)
    if IDS > 0 and not POSITIVES:
        same = _tile_same(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        acc = tl.where(same, float("-inf"), acc)
    if cells is not None:
        tile = row // BLOCK_M * tl.cdiv(N, BLOCK_N) + col // BLOCK_N
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        for at in range(tl.load(bounds + tile), tl.load(bounds + tile + 1)):
            acc = tl.where(inside == tl.load(cells + at), float("-inf"), acc)
    return acc, factor


@triton.jit
def _tile_same(
    row_codes: tl.tensor,
    col_codes: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Which cells have equal ids, by their codes; none beyond the last row or column."""
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    of_rows = tl.load(row_codes + rows, mask=rows < M, other=-1)
    of_cols = tl.load(col_codes + cols, mask=cols < N, other=-2)
    same = of_rows[:, None] == of_cols[None, :]
    if IDS == 2:
        of_rows = tl.load(row_codes + M + rows, mask=rows < M, other=-1)
        of_cols = tl.load(col_codes + N + cols, mask=cols < N, other=-2)
        same = same | (of_rows[:, None] == of_cols[None, :])
    return same


@triton.jit
def _fold(x: tl.tensor, KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Column sums as far as one thread can take them: [KEPT, BLOCK_N] (KEPT = 1: all the way)."""
    if KEPT == 1:
        folded = tl.sum(x, 0)[None, :]
    else:
        # In the layouts of mma and wgmma, rows 8 apart and rows beyond all warps' share a thread.
        parts = tl.reshape(x, (BLOCK_M // (2 * KEPT), KEPT // 8, 2, 8, BLOCK_N))
        folded = tl.reshape(tl.sum(tl.sum(parts, 2), 0), (KEPT, BLOCK_N))
    return folded


@triton.jit
def _add_sums(
    row_sums: tl.tensor,
    row_at: tl.tensor,
    real: tl.tensor,
    col_sums: tl.tensor,
    col_at: tl.tensor,
    inside: tl.tensor,
    products: tl.tensor,
    factor: tl.tensor,
    BANK: tl.constexpr,
) -> None:
    """Adds a tile's logits, without the masked ones, to sums in memory: registers have no room for these too."""
    values = tl.where(products == float("-inf"), 0.0, products * factor)
    before = tl.load(row_sums + row_at, mask=real, other=0.0)
    tl.store(row_sums + row_at, before + tl.sum(values, 1), mask=real)
    if not BANK:
        # Beyond the last row logits are 0.
        before = tl.load(col_sums + col_at, mask=inside, other=0.0)
        tl.store(col_sums + col_at, before + tl.sum(values, 0), mask=inside)


@triton.jit
def forward_kernel(
    text: tl.tensor,
    columns: tl.tensor,
    text_stride: tl.tensor,
    columns_stride: tl.tensor,
    scale: tl.tensor,
    row_codes: tl.tensor,
    col_codes: tl.tensor,
    cells: tl.tensor,
    bounds: tl.tensor,
    row_top: tl.tensor,
    row_sum: tl.tensor,
    row_extra: tl.tensor,
    row_logits: tl.tensor,
    col_top: tl.tensor,
    col_sum: tl.tensor,
    col_extra: tl.tensor,
    col_logits: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    offset: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    width: tl.tensor,
    BANK: tl.constexpr,
    IDS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SMOOTH: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Grid (P, S): row sums of columns [first, last) into slice s of [S, M], column sums into row p of [P, width]."""
    p = tl.program_id(0)
    P = tl.num_programs(0)
    s = tl.program_id(1)
    slice_at = s.to(tl.int64) * M
    for col in range(first + s * BLOCK_N, last, tl.num_programs(1) * BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        top = tl.full((), LOWEST, tl.float32)
        kept = tl.zeros((KEPT, BLOCK_N), tl.float32)
        inside = cols < last
        col_at = p * width + cols - first
        for row in range(p * BLOCK_M, M, P * BLOCK_M):
            products, factor = _tile_products(
                text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, cells, bounds,
                M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
            rows = row + tl.arange(0, BLOCK_M)
            real = rows < M
            at = slice_at + rows
            if POSITIVES and IDS > 0:
                same = _tile_same(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
                positive = tl.where(same, products, 0.0)
                _add_sums(row_extra, at, real, col_extra, col_at, inside, positive, factor, BANK)
            if SMOOTH:
                _add_sums(row_logits, at, real, col_logits, col_at, inside, products, factor, BANK)
            tile_top = tl.maximum(tl.max(products, 1) * factor, LOWEST)
            e = tl.exp2(tl.fma(products, factor, -tile_top[:, None]))
            old_top = tl.load(row_top + at, mask=real, other=0.0)
            old_sum = tl.load(row_sum + at, mask=real, other=0.0)
            new_top = tl.maximum(old_top, tile_top)
            new_sum = old_sum * tl.exp2(old_top - new_top) + tl.sum(e, 1) * tl.exp2(tile_top - new_top)
            tl.store(row_top + at, new_top, mask=real)
            tl.store(row_sum + at, new_sum, mask=real)
            if not BANK:
                tile_top = tl.where(real, tile_top, LOWEST)
                higher = tl.maximum(top, tl.max(tile_top, 0))
                weight = tl.where(real, tl.exp2(tile_top - higher), 0.0)
                kept = kept * tl.exp2(top - higher) + _fold(e * weight[:, None], KEPT, BLOCK_M, BLOCK_N)
                top = higher
            # What was stored is read again, perhaps by other threads.
            tl.debug_barrier()
        if not BANK:
            tl.store(col_top + (col - first) // BLOCK_N * P + p, top)
            tl.store(col_sum + col_at, tl.sum(kept, 0), mask=inside)


@triton.jit
def merge_kernel(
    col_top: tl.tensor,
    col_sum: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    P: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    width: tl.tensor,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A block of columns a program: total * 2^highest over the P strips, in fixed order and in fp64."""
    block = tl.program_id(0)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = first + cols < last
    top = tl.full((), LOWEST, tl.float32)
    for p in range(0, P, BLOCK_P):
        strips = p + tl.arange(0, BLOCK_P)
        tops = tl.load(col_top + block * P + strips, mask=strips < P, other=LOWEST)
        top = tl.maximum(top, tl.max(tops, 0))
    sums = tl.zeros((BLOCK_N,), tl.float64)
    for p in range(0, P, BLOCK_P):
        strips = p + tl.arange(0, BLOCK_P)
        weights = tl.exp2(tl.load(col_top + block * P + strips, mask=strips < P, other=LOWEST) - top)
        parts = tl.load(
            col_sum + strips[:, None] * width + cols[None, :], mask=(strips < P)[:, None] & inside[None, :], other=0.0
        )
        sums += tl.sum(parts.to(tl.float64) * weights.to(tl.float64)[:, None], 0)
    tl.store(highest + first + cols, top.to(tl.float64) + tl.zeros((BLOCK_N,), tl.float64), mask=inside)
    tl.store(total + first + cols, sums, mask=inside)


@triton.jit
def rescue_kernel(
    text: tl.tensor,
    columns: tl.tensor,
    text_stride: tl.tensor,
    columns_stride: tl.tensor,
    scale: tl.tensor,
    row_codes: tl.tensor,
    col_codes: tl.tensor,
    cells: tl.tensor,
    bounds: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    offset: tl.tensor,
    BANK: tl.constexpr,
    IDS: tl.constexpr,
    POSITIVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A block of columns a program: those of weak sums again, each by its own maximum."""
    col = tl.program_id(0) * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    weak = tl.load(total + cols, mask=cols < N, other=1.0) < WEAK
    if tl.max(weak.to(tl.int32), 0) > 0:
        top = tl.full((BLOCK_N,), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for row in range(0, M, BLOCK_M):
            products, factor = _tile_products(
                text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, cells, bounds,
                M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
            rows = row + tl.arange(0, BLOCK_M)
            products = tl.where((rows < M)[:, None], products, float("-inf"))
            higher = tl.maximum(top, tl.max(products, 0) * factor)
            e = tl.exp2(tl.fma(products, factor, -higher[None, :]))
            sums = sums * tl.exp2(top - higher) + tl.sum(e, 0)
            top = higher
        tl.store(highest + cols, top.to(tl.float64), mask=weak)
        tl.store(total + cols, sums.to(tl.float64), mask=weak)


@triton.jit
def gradient_kernel(
    text: tl.tensor,
    columns: tl.tensor,
    text_stride: tl.tensor,
    columns_stride: tl.tensor,
    scale: tl.tensor,
    row_codes: tl.tensor,
    col_codes: tl.tensor,
    cells: tl.tensor,
    bounds: tl.tensor,
    row_vectors: tl.tensor,
    col_vectors: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    scale_slopes: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    offset: tl.tensor,
    first_row: tl.tensor,
    first_col: tl.tensor,
    BANK: tl.constexpr,
    IDS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A tile a program: d loss / d logit into the chunk `out`, and its share of d scale; vectors: see `_pack`."""
    in_row = tl.program_id(1) * BLOCK_M
    in_col = tl.program_id(0) * BLOCK_N
    row = first_row + in_row
    col = first_col + in_col
    products, factor = _tile_products(
        text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, cells, bounds,
        M, N, D, offset, BANK, IDS, POSITIVES, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    real = rows < M
    inside = cols < N
    lse = tl.load(row_vectors + rows, mask=real, other=0.0)
    slope = tl.load(row_vectors + M + rows, mask=real, other=0.0)
    dz = slope[:, None] * tl.exp2(tl.fma(products, factor, -lse[:, None]))
    if not BANK:
        lse = tl.load(col_vectors + cols, mask=inside, other=0.0)
        slope = tl.load(col_vectors + N + cols, mask=inside, other=0.0)
        dz += slope[None, :] * tl.exp2(tl.fma(products, factor, -lse[None, :]))
    if POSITIVES and IDS > 0:
        same = _tile_same(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        slopes = tl.load(row_vectors + 2 * M + rows, mask=real, other=0.0)[:, None]
        if not BANK:
            slopes = slopes + tl.load(col_vectors + 2 * N + cols, mask=inside, other=0.0)[None, :]
        dz += tl.where(same & (products != float("-inf")), slopes, 0.0)
    if SMOOTH:
        slopes = tl.load(row_vectors + 3 * M + rows, mask=real, other=0.0)[:, None]
        if not BANK:
            slopes = slopes + tl.load(col_vectors + 3 * N + cols, mask=inside, other=0.0)[None, :]
        dz += tl.where(products == float("-inf"), 0.0, slopes)
    # Taken here in fp32: from d text it would have the rounding of dZ.
    # Times a finite product, as dz is 0 at masked cells.
    shares = tl.sum(dz * tl.maximum(products, LOWEST), 1)
    share = tl.sum(tl.where(real, shares, 0.0), 0)
    share = tl.where(tl.load(scale) < 0, -share, share)
    tl.store(scale_slopes + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), share)
    _store(out, out_stride, in_row, in_col, M - first_row, N - first_col, dz, BLOCK_M, BLOCK_N)


@triton.jit
def product_kernel(
    chunk: tl.tensor,
    features: tl.tensor,
    out: tl.tensor,
    chunk_stride: tl.tensor,
    features_stride: tl.tensor,
    out_stride: tl.tensor,
    rows: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """A tile a program: out [rows, D] += chunk (or its transpose) [rows, K] @ features [K, D]."""
    row = tl.program_id(1) * BLOCK_R
    d = tl.program_id(0) * BLOCK_D
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for k in range(0, K, BLOCK_K):
        if TRANSPOSED:
            a = _load(chunk, chunk_stride, k, row, K, rows, BLOCK_K, BLOCK_R, UPCAST).T
        else:
            a = _load(chunk, chunk_stride, row, k, rows, K, BLOCK_R, BLOCK_K, UPCAST)
        b = _load(features, features_stride, k, d, K, D, BLOCK_K, BLOCK_D, UPCAST)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += _load(out, out_stride, row, d, rows, D, BLOCK_R, BLOCK_D, False)
    _store(out, out_stride, row, d, rows, D, acc, BLOCK_R, BLOCK_D)


# Tuning tables


@dataclass(frozen=True)
class Launch:
    """A tile's rows and columns, the depth of one step of its product, warps and load stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """How one architecture walks the tiles. The bits of a result depend on every field but the stages."""

    forward: Launch
    rescue: Launch
    gradient: Launch
    """Steps as deep as forward's: then both have the same products, and p sums to 1."""
    product: Launch
    """Its columns are those of d text and d image, their width D."""
    descriptors: bool
    """Whether blocks are moved by TMA, else by each thread's pointers."""
    kept: int
    """Rows of the column sums that a forward strip keeps in registers."""
    programs: int
    """Forward programs, as many as the full chip holds: a constant, so that its cut versions give equal bits."""
    chunk: tuple[int, int]
    """Rows and columns of logit gradients in memory at a time."""
    panel: int = 32768
    """Columns whose sums are in memory at a time, a multiple of a forward tile's."""


def _config(
    forward: tuple[int, ...],
    product: tuple[int, ...],
    *,
    descriptors: bool,
    kept: int,
    programs: int,
    chunk: tuple[int, int],
    recompute: tuple[int, ...] | None = None,
) -> Config:
    again = Launch(*(recompute or forward))
    return Config(Launch(*forward), again, again, Launch(*product), descriptors, kept, programs, chunk)


# By architecture, whether features are fp32, and what else a tile looks at: 0 nothing, 1 ids, masked cells or all
# logits, 2 positives by ids beside all logits. With masked cells, which are ordered by tile, forward and recompute
# have one tile. Codes and masks take the registers of half a tile, and so does each further sum on wide tiles.
_TABLE: dict[tuple[int, bool, int], Config] = {
    # mma.sync from 8 warps; shared memory stays under the 99 KB of sm_86, sm_89 and sm_120.
    (80, False, 0): _config(
        (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), descriptors=False, kept=32, programs=108, chunk=(4096, 4096)
    ),
    (80, False, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 32, 8, 4), descriptors=False, kept=32, programs=108, chunk=(4096, 4096)
    ),
    # tf32x3 holds each operand in two parts: half the tile, a quarter of the depth.
    (80, True, 0): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    (80, True, 1): _config(
        (64, 32, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=False, kept=32, programs=108, chunk=(4096, 2048)
    ),
    # 4 warps forward: two programs an SM, and the exponentials of one hide under the products of the other.
    (90, False, 0): _config(
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=264, chunk=(4096, 4096),
        recompute=(128, 128, 64, 8, 3),
    ),
    (90, False, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=132, chunk=(4096, 4096)
    ),
    (90, False, 2): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=32, programs=132, chunk=(4096, 4096)
    ),
    # The second program's registers go to the parts of tf32x3.
    (90, True, 0): _config(
        (128, 128, 32, 8, 3), (128, 128, 32, 8, 3), descriptors=True, kept=64, programs=132, chunk=(4096, 2048)
    ),
    (90, True, 1): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=132, chunk=(4096, 2048)
    ),
    (90, True, 2): _config(
        (128, 32, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=132, chunk=(4096, 2048)
    ),
    # A thread reads whole rows from tensor memory: no part of a column is a thread's own, hence kept = 1.
    (100, False, 0): _config(
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096),
        recompute=(128, 64, 64, 8, 4),
    ),
    (100, False, 1): _config(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096)
    ),
    (100, False, 2): _config(
        (128, 32, 64, 8, 3), (128, 128, 64, 8, 4), descriptors=True, kept=1, programs=148, chunk=(4096, 4096)
    ),
    (100, True, 0): _config(
        (128, 64, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, True, 1): _config(
        (128, 64, 64, 8, 2), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
    (100, True, 2): _config(
        (128, 32, 16, 8, 4), (128, 128, 32, 8, 3), descriptors=True, kept=1, programs=148, chunk=(4096, 2048)
    ),
}  # fmt: skip


def config_for(capability: tuple[int, int], dtype: torch.dtype, burden: int) -> Config:
    """The table's row for a CUDA compute capability, a feature dtype (fp16, bf16, fp32), and what a tile looks at.

    D needs no row: it is walked in steps of a depth.
    """
    # Consumer Blackwell (12.x) has sm_80's matrix instructions and shared memory.
    architecture = {9: 90, 10: 100, 11: 100}.get(capability[0], 80)
    # sm_80's tiles have room for burden 2.
    return _TABLE[architecture, dtype == torch.float32, min(burden, 1 if architecture == 80 else 2)]


# Launching


def refusal(text_MD: Tensor) -> str | None:
    """Why these kernels do not take such CUDA tensors; None if they do."""
    if text_MD.dtype == torch.float64:
        return "fp64 has no fused kernel, cast the features to fp32 for it"
    if torch.version.hip is not None:
        return "the fused kernels have no tuning table for ROCm"
    if text_MD.device.type == "cuda" and torch.cuda.get_device_capability(text_MD.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(text_MD.device)
        return f"the fused kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def tile_config(text_MD: Tensor, burden: int) -> Config:
    """`config_for` the device that the texts are on."""
    return config_for(torch.cuda.get_device_capability(text_MD.device), text_MD.dtype, burden)


Pair = tuple[Tensor, Tensor]


class FusedCells:
    """Masked and positive cells as the kernels read them; their counts come from sorted ids, without tiles.

    `codes` are those of the rows [K, M] and of the columns [K, N] in int32, equal where ids are, for K kinds of
    ids. `cells` are masked cells ordered by tile, each its place in the tile, and the bounds of each tile's; nothing
    here waits for the device.
    """

    def __init__(
        self,
        place: _Place,
        bank: int,
        ids_M: list[Tensor],
        ids_N: list[Tensor],
        bank_ids_Q: Tensor | None,
        excluded: Pair | None,
        as_positives: bool,
        config: Config,
        device: torch.device,
    ) -> None:
        self.own, self.as_positives, self.config = place.own, as_positives, config
        M, N = self.own.stop - self.own.start, place.total
        self.diagonal = self.own.start >= 0 and self.own.stop <= N
        self.codes = _codes(list(zip(ids_M, ids_N, strict=True))) if ids_M else None
        self.bank_codes = _codes([(ids_M[0], bank_ids_Q)]) if bank_ids_Q is not None and bank else None
        self.cells: Pair | None = None
        self.bank_cells: Pair | None = None
        same_M, same_N, left_out_M, left_out_N = (
            torch.zeros(size, dtype=torch.float64, device=device) for size in (M, N, M, N)
        )
        if self.codes is not None:
            same_M, same_N = _count_same(*self.codes)
            if self.diagonal:
                # A text's own image has its ids, and is no cell of these.
                same_M -= 1
                same_N[self.own] -= 1
        if self.bank_codes is not None:
            same_M += _count_same(*self.bank_codes)[0]
        if excluded is not None and len(excluded[0]):
            cell = (excluded[0] * (N + bank) + excluded[1]).sort().values
            row, col = cell // (N + bank), cell % (N + bank)
            plain = col != row + self.own.start
            plain[1:] &= cell[1:] != cell[:-1]
            for codes, here, first in ((self.codes, col < N, 0), (self.bank_codes, col >= N, N)):
                if codes is not None:
                    plain &= ~(here & (codes[0][:, row] == codes[1][:, torch.where(here, col - first, 0)]).any(0))
            in_batch = plain & (col < N)
            left_out_M, left_out_N = _histogram(row, plain, M), _histogram(col, in_batch, N)
            self.cells = _by_tile(row, col, in_batch, M, N, config.forward)
            if bank:
                self.bank_cells = _by_tile(row, col - N, plain & (col >= N), M, bank, config.forward)
        self.counts = (
            (left_out_M, left_out_N, same_M, same_N)
            if as_positives
            else (left_out_M + same_M, left_out_N + same_N, torch.zeros_like(same_M), torch.zeros_like(same_N))
        )


def _codes(ids: list[Pair]) -> Pair:
    """Ranks of the columns' ids, in int32: a register less than an id; -1 for a row whose id no column has."""
    rows, columns = [], []
    for ids_M, ids_N in ids:
        known = ids_N.contiguous().sort().values
        code_M = torch.searchsorted(known, ids_M.contiguous()).clamp(max=len(known) - 1)
        rows.append(torch.where(known[code_M] == ids_M, code_M, -1))
        columns.append(torch.searchsorted(known, ids_N.contiguous()))
    return torch.stack(rows).int(), torch.stack(columns).int()


def _count_same(code_KM: Tensor, code_KN: Tensor) -> Pair:
    """Columns [M] that share a code of any kind with each row, and rows [N] with each column; in fp64."""
    rows, columns = [*code_KM.long()], [*code_KN.long()]
    signs = [1] * len(rows)
    if len(rows) == 2:
        # Those equal in both kinds were counted twice.
        both = (rows[0] < 0) | (rows[1] < 0)
        size = code_KN.shape[1]
        rows.append(torch.where(both, -1, rows[0] * size + rows[1]))
        columns.append(columns[0] * size + columns[1])
        signs.append(-1)

    def count(of: list[Tensor], among: list[Tensor]) -> Tensor:
        total = torch.zeros(of[0].shape, dtype=torch.float64, device=of[0].device)
        for sign, one, other in zip(signs, of, among, strict=True):
            known = other.sort().values
            total += sign * (torch.searchsorted(known, one, right=True) - torch.searchsorted(known, one))
        return total

    return count(rows, columns), count(columns, rows)


def _histogram(values: Tensor, chosen: Tensor, size: int) -> Tensor:
    # bincount is refused on CUDA where deterministic algorithms are asked for.
    ordered = torch.where(chosen, values, size).sort().values
    return torch.searchsorted(ordered, torch.arange(size + 1, device=values.device)).diff().double()


def _by_tile(row: Tensor, col: Tensor, chosen: Tensor, rows: int, columns: int, tile: Launch) -> Pair:
    """Places in their tiles of the chosen cells, ordered by tile, and the tiles' bounds; the others come last."""
    across = triton.cdiv(columns, tile.columns)
    tiles = triton.cdiv(rows, tile.rows) * across
    of_tile, order = torch.where(chosen, row // tile.rows * across + col // tile.columns, tiles).sort(stable=True)
    inside = row % tile.rows * tile.columns + col % tile.columns
    bounds = torch.searchsorted(of_tile, torch.arange(tiles + 1, device=row.device))
    return inside[order].int(), bounds.int()


class FusedTiles:
    """`_Tiles` of the chunked path by the kernels above: the same methods, the same results."""

    def __init__(
        self,
        text_MD: Tensor,
        image_ND: Tensor,
        bank_QD: Tensor | None,
        scale: Tensor,
        cells: FusedCells,
        smooth: bool,
    ) -> None:
        self.config, self.cells, self.smooth = cells.config, cells, smooth
        self.text_MD, self.image_ND = _addressable(text_MD), _addressable(image_ND)
        self.bank_QD = None if bank_QD is None or not len(bank_QD) else _addressable(bank_QD)
        # The scale over ln 2 in fp32, as the tiles take it; everything else takes the scale that this amounts to.
        self.factor = (scale.detach().double() / LN2).float().reshape(1)
        self.scale = self.factor.double() * LN2
        self.width, self.D, self.own = text_MD.shape[1], self.text_MD.shape[1], cells.own
        # The interpreter multiplies bf16 as bit patterns and knows no tf32x3.
        self.upcast = text_MD.device.type == "cpu"
        self.precision = "tf32x3" if text_MD.dtype == torch.float32 and not self.upcast else "ieee"

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.text_MD.device)

    def _full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.text_MD.device)

    def _matrix(self, name: str, matrix: Tensor, block: tuple[int, int]) -> dict[str, Any]:
        """Arguments for a matrix that is read or written by blocks."""
        if self.config.descriptors:
            descriptor = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))
            return {name: descriptor, f"{name}_stride": None}
        return {name: matrix, f"{name}_stride": matrix.stride(0)}

    def _tile(self, bank: bool, launch: Launch) -> dict[str, Any]:
        """Arguments of every kernel that computes logits of the batch's columns, or the bank's."""
        columns_ND = self.bank_QD if bank and self.bank_QD is not None else self.image_ND
        codes, cells = (self.cells.bank_codes, self.cells.bank_cells) if bank else (self.cells.codes, self.cells.cells)
        return {
            **self._matrix("text", self.text_MD, (launch.rows, launch.depth)),
            **self._matrix("columns", columns_ND, (launch.columns, launch.depth)),
            "scale": self.factor,
            "row_codes": None if codes is None else codes[0],
            "col_codes": None if codes is None else codes[1],
            "cells": None if cells is None else cells[0],
            "bounds": None if cells is None else cells[1],
            "M": len(self.text_MD),
            "N": len(columns_ND),
            "D": self.D,
            "offset": self.own.start,
            "BANK": bank,
            "IDS": 0 if codes is None else len(codes[0]),
            "POSITIVES": self.cells.as_positives,
            "BLOCK_M": launch.rows,
            "BLOCK_N": launch.columns,
            "BLOCK_D": launch.depth,
            "PRECISION": self.precision,
            "UPCAST": self.upcast,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def forward(self) -> _Sums:
        from .contrastive import _Sums

        (M, N), launch, config = (len(self.text_MD), len(self.image_ND)), self.config.forward, self.config
        extra, smooth = self.cells.as_positives, self.smooth
        positive_M = self._full(0, M, dtype=torch.float64)
        for rows, own in self._row_steps() if self.cells.diagonal else ():
            products = self.text_MD[rows].float() * self.image_ND[own].float()
            positive_M[rows] = products.sum(1, dtype=torch.float64) * self.scale

        P = min(triton.cdiv(M, launch.rows), config.programs)
        S = max(1, config.programs // P)
        width = min(N, config.panel)
        row_top, row_sum = self._full(LOWEST.value, S, M), self._full(0, S, M)
        row_extra = self._full(0, S, M) if extra else None
        row_logits = self._full(0, S, M) if smooth else None
        col_top, col_sum = self._new(triton.cdiv(width, launch.columns), P), self._new(P, width)
        col_extra = self._new(P, width) if extra else None
        col_logits = self._new(P, width) if smooth else None
        highest_N, total_N = self._new(N, dtype=torch.float64), self._new(N, dtype=torch.float64)
        col_extra_N = self._new(N, dtype=torch.float64) if extra else None
        col_logits_N = self._new(N, dtype=torch.float64) if smooth else None
        of_rows = {"row_top": row_top, "row_sum": row_sum, "row_extra": row_extra, "row_logits": row_logits}
        of_columns = {"col_top": col_top, "col_sum": col_sum, "col_extra": col_extra, "col_logits": col_logits}
        options = {"width": width, "SMOOTH": smooth, "KEPT": config.kept}
        with torch.cuda.device_of(self.text_MD):
            for first in range(0, N, width):
                last = min(first + width, N)
                blocks = triton.cdiv(last - first, launch.columns)
                for partial in (col_extra, col_logits):
                    if partial is not None:
                        partial.zero_()
                forward_kernel[P, min(S, blocks)](
                    **self._tile(False, launch), **of_rows, **of_columns, first=first, last=last, **options
                )
                merge_kernel[blocks,](
                    col_top, col_sum, highest_N, total_N, P, first, last, width, BLOCK_P=16, BLOCK_N=launch.columns
                )
                for partial, sums_N in ((col_extra, col_extra_N), (col_logits, col_logits_N)):
                    if partial is not None and sums_N is not None:
                        sums_N[first:last] = partial[:, : last - first].sum(0, dtype=torch.float64)
            if self.bank_QD is not None:
                Q = len(self.bank_QD)
                forward_kernel[P, min(S, triton.cdiv(Q, launch.columns))](
                    **self._tile(True, launch), **of_rows, **dict.fromkeys(of_columns), first=0, last=Q, **options
                )
            rescue_kernel[triton.cdiv(N, config.rescue.columns),](
                **self._tile(False, config.rescue), highest=highest_N, total=total_N
            )
        top_M = row_top.amax(0)
        sum_M = (row_sum.double() * (row_top - top_M).double().exp2()).sum(0)

        def merged(parts: Tensor | None) -> Tensor | None:
            return None if parts is None else parts.sum(0, dtype=torch.float64) * LN2

        return _Sums(
            positive_M,
            (sum_M.log2() + top_M.double()) * LN2,
            (total_N.log2() + highest_N) * LN2,
            merged(row_extra),
            None if col_extra_N is None else col_extra_N * LN2,
            merged(row_logits),
            None if col_logits_N is None else col_logits_N * LN2,
            *self.cells.counts,
        )

    def backward(
        self, sums: _LogSumExps, grads: _Gradients, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(d text_MD, d image_ND, d scale) in fp32, fp32 and fp64."""
        M, N = len(self.text_MD), len(self.image_ND)
        d_scale = self._full(0, dtype=torch.float64)
        d_text_MD = self._full(0, M, self.D) if need_text else None
        d_image_ND = self._full(0, N, self.D) if need_image else None
        gain = _gain(grads)
        row_KM = _pack(sums.row_lse_M, gain, grads.row_lse_M, grads.row_extra_M, grads.row_logits_M)
        col_KN = _pack(sums.col_lse_N, gain, grads.col_lse_N, grads.col_extra_N, grads.col_logits_N)
        with torch.cuda.device_of(self.text_MD):
            d_scale += self._accumulate(False, row_KM, col_KN, d_text_MD, d_image_ND)
            if self.bank_QD is not None and d_text_MD is not None:
                d_scale += self._accumulate(True, row_KM, col_KN, d_text_MD, None)
        d_scale /= gain
        smaller = (1 / gain).float()
        for gradient in (d_text_MD, d_image_ND):
            if gradient is not None:
                gradient.mul_(smaller)
        for rows, own in self._row_steps() if self.cells.diagonal else ():
            text_RD, own_RD = self.text_MD[rows].float(), self.image_ND[own].float()
            g_R1 = grads.positive_M[rows, None].float()
            d_scale += (text_RD * own_RD * g_R1).sum(dtype=torch.float64)
            if d_image_ND is not None:
                d_image_ND[own].addcmul_(text_RD, g_R1)
            if d_text_MD is not None:
                d_text_MD[rows].addcmul_(own_RD, g_R1)
        for gradient in (d_text_MD, d_image_ND):
            if gradient is not None:
                gradient.mul_(self.scale.float())
        d_text_MD, d_image_ND = (
            None if gradient is None else gradient[:, : self.width] for gradient in (d_text_MD, d_image_ND)
        )
        return d_text_MD, d_image_ND, d_scale

    def _accumulate(
        self, bank: bool, row_KM: Tensor, col_KN: Tensor, d_text_MD: Tensor | None, d_image_ND: Tensor | None
    ) -> Tensor:
        """Adds the products of all logit gradients of the batch's columns, or the bank's; returns d scale."""
        columns_ND = self.bank_QD if bank and self.bank_QD is not None else self.image_ND
        M, N = len(self.text_MD), len(columns_ND)
        high, wide = min(self.config.chunk[0], M), min(self.config.chunk[1], triton.cdiv(N, 16) * 16)
        chunk = self._new(high, wide, dtype=self.text_MD.dtype)
        launch = self.config.gradient
        blocks = triton.cdiv(high, launch.rows) * triton.cdiv(wide, launch.columns)
        scale_slopes, d_scale = self._new(blocks), self._full(0, dtype=torch.float64)
        tile = self._tile(bank, launch)
        for row in range(0, M, high):
            rows = slice(row, min(row + high, M))
            for col in range(0, N, wide):
                cols = slice(col, min(col + wide, N))
                dz_RC = chunk[: rows.stop - row, : cols.stop - col]
                grid = triton.cdiv(dz_RC.shape[1], launch.columns), triton.cdiv(dz_RC.shape[0], launch.rows)
                gradient_kernel[grid](
                    **tile,
                    **self._matrix("out", dz_RC, (launch.rows, launch.columns)),
                    row_vectors=row_KM,
                    col_vectors=None if bank else col_KN,
                    scale_slopes=scale_slopes,
                    first_row=row,
                    first_col=col,
                    SMOOTH=self.smooth,
                )
                d_scale += scale_slopes[: math.prod(grid)].sum(dtype=torch.float64)
                if d_text_MD is not None:
                    self._add_product(d_text_MD[rows], dz_RC, columns_ND[cols], False)
                if d_image_ND is not None:
                    self._add_product(d_image_ND[cols], dz_RC, self.text_MD[rows], True)
        return d_scale

    def _add_product(self, out: Tensor, dz_RC: Tensor, features: Tensor, transposed: bool) -> None:
        launch = self.config.product
        rows, K = dz_RC.shape[::-1] if transposed else dz_RC.shape
        product_kernel[triton.cdiv(self.D, launch.columns), triton.cdiv(rows, launch.rows)](
            **self._matrix("chunk", dz_RC, (launch.depth, launch.rows) if transposed else (launch.rows, launch.depth)),
            **self._matrix("features", features, (launch.depth, launch.columns)),
            **self._matrix("out", out, (launch.rows, launch.columns)),
            rows=rows,
            K=K,
            D=self.D,
            TRANSPOSED=transposed,
            BLOCK_R=launch.rows,
            BLOCK_K=launch.depth,
            BLOCK_D=launch.columns,
            PRECISION=self.precision,
            UPCAST=self.upcast,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )

    def _row_steps(self) -> Iterator[tuple[slice, slice]]:
        """Steps over the texts, and the same pairs among all images."""
        for start in range(0, len(self.text_MD), ROW_STEP):
            stop = min(start + ROW_STEP, len(self.text_MD))
            yield slice(start, stop), slice(self.own.start + start, self.own.start + stop)


def _addressable(features: Tensor) -> Tensor:
    """The features, copied where TMA, wide loads or 32-bit offsets in a block do not reach, zeros appended to D."""
    D, stride = features.shape[1], features.stride(0)
    wide = D % 16 == stride % 16 == features.data_ptr() % 16 == 0
    if wide and features.stride(1) == 1 and D <= stride < 1 << 22:
        return features
    padded = features.new_zeros(len(features), triton.cdiv(D, 16) * 16)
    padded[:, :D] = features
    return padded


def _gain(grads: _Gradients) -> Tensor:
    """A power of two that brings logit gradients near the top of fp16: they may be far below its bottom."""
    slopes = [grad for grad in grads[1:] if grad is not None]
    bound = torch.stack([slope.abs().amax() for slope in slopes]).sum()
    exponent = (TOP_EXPONENT - bound.log2().ceil()).clamp(-100, 100)
    return torch.where(bound > 0, exponent.exp2(), 1.0)


def _pack(lse: Tensor, gain: Tensor, slope: Tensor, extra: Tensor | None, logits: Tensor | None) -> Tensor:
    """[4, M] or [4, N] fp32: the log-sum-exp over ln 2, and the slopes of it, of positives, of all logits."""
    # With everything masked it is -inf, and so are the logits.
    exact = torch.where(lse == -math.inf, 0.0, lse / LN2)
    rounded = exact.float()
    # exp2(z - rounded) is that much too large or small.
    slope = slope * (rounded - exact).exp2()
    slopes = [torch.zeros_like(slope) if part is None else part * gain for part in (slope, extra, logits)]
    return torch.stack([rounded, *(part.float() for part in slopes)])
