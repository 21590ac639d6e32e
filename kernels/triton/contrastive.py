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

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ContrastiveGrads, ContrastiveKept, ContrastiveSums, Options
from . import tuning
from .cells import Pair, by_tile, codes_of, count_same, histogram
from .tiles import add_product, addressable, arithmetic, fill_cells, matrix, same_ids, store_block, tile_product
from .tuning import Config, Launch

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
def _tile_products(
    text, columns, text_stride, columns_stride, scale, row, col, row_codes, col_codes, cells, bounds, M, N, D, offset,
    BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inner products, and the factor > 0 that makes logits over ln 2 of them; a negative scale turns their sign.

    They are -inf on the diagonal, at masked cells and beyond the last column. Products, since a logit need never be
    rounded: what is taken from it comes in the same fma.
    """
    acc = tile_product(
        text, text_stride, row, M, columns, columns_stride, col, N, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST
    )
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
        same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
        acc = tl.where(same, float("-inf"), acc)
    if cells is not None:
        acc = fill_cells(acc, cells, bounds, row, col, N, float("-inf"), BLOCK_M, BLOCK_N)
    return acc, factor


@triton.jit
def _fold(x, KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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
    row_sums, row_at, real, col_sums, col_at, inside, products, factor, BANK: tl.constexpr,
):  # fmt: skip
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
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, cells, bounds, row_top, row_sum,
    row_extra, row_logits, col_top, col_sum, col_extra, col_logits, M, N, D, offset, first, last, width,
    BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
                same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
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
    col_top, col_sum, highest, total, P, first, last, width, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, cells, bounds, highest, total, M, N, D,
    offset, BANK: tl.constexpr, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
    text, columns, text_stride, columns_stride, scale, row_codes, col_codes, cells, bounds, row_vectors, col_vectors,
    out, out_stride, scale_slopes, M, N, D, offset, first_row, first_col, BANK: tl.constexpr, IDS: tl.constexpr,
    POSITIVES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
        same = same_ids(row_codes, col_codes, row, col, M, N, IDS, BLOCK_M, BLOCK_N)
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
    store_block(out, out_stride, in_row, in_col, M - first_row, N - first_col, dz, BLOCK_M, BLOCK_N)


# Launching


class _Cells:
    """Masked and positive cells as the kernels read them; their counts come from sorted ids, without tiles.

    `codes` are those of the rows [K, M] and of the columns [K, N] in int32, equal where ids are, for K kinds of
    ids. `cells` are masked cells ordered by tile, and the bounds of each tile's; nothing
    here waits for the device.
    """

    def __init__(self, options: Options, N: int, bank: int, M: int, config: Config, device: torch.device) -> None:
        self.own, as_positives = slice(options.offset, options.offset + M), options.as_positives
        self.diagonal = self.own.start >= 0 and self.own.stop <= N
        ids_KM, ids_KN, bank_ids_Q = options.ids_KM, options.ids_KN, options.bank_ids_Q
        excluded, block = options.excluded_2E, (config.forward.rows, config.forward.columns)
        self.codes = None if ids_KM is None or ids_KN is None else codes_of([*zip(ids_KM, ids_KN, strict=True)])
        self.bank_codes: Pair | None = None
        if ids_KM is not None and bank_ids_Q is not None and bank:
            self.bank_codes = codes_of([(ids_KM[0], bank_ids_Q)])
        self.cells: Pair | None = None
        self.bank_cells: Pair | None = None
        same_M, same_N, left_out_M, left_out_N = (
            torch.zeros(size, dtype=torch.float64, device=device) for size in (M, N, M, N)
        )
        if self.codes is not None:
            same_M, same_N = count_same(*self.codes)
            if self.diagonal:
                # A text's own image has its ids, and is no cell of these.
                same_M -= 1
                same_N[self.own] -= 1
        if self.bank_codes is not None:
            same_M += count_same(*self.bank_codes)[0]
        if excluded is not None and excluded.shape[1]:
            cell = (excluded[0] * (N + bank) + excluded[1]).sort().values
            row, col = cell // (N + bank), cell % (N + bank)
            plain = col != row + self.own.start
            plain[1:] &= cell[1:] != cell[:-1]
            for codes, here, first in ((self.codes, col < N, 0), (self.bank_codes, col >= N, N)):
                if codes is not None:
                    plain &= ~(here & (codes[0][:, row] == codes[1][:, torch.where(here, col - first, 0)]).any(0))
            in_batch = plain & (col < N)
            left_out_M, left_out_N = histogram(row, plain, M), histogram(col, in_batch, N)
            self.cells = by_tile(row, col, (M, N), block, in_batch)
            if bank:
                self.bank_cells = by_tile(row, col - N, (M, bank), block, plain & (col >= N))
        self.counts = (
            (left_out_M, left_out_N, same_M, same_N)
            if as_positives
            else (left_out_M + same_M, left_out_N + same_N, torch.zeros_like(same_M), torch.zeros_like(same_N))
        )


class TritonContrastive:
    """`ChunkedContrastive` by the kernels above: the same methods, the same results."""

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: Options
    ) -> None:
        self.config, self.options = tuning.tile_config(text_MD, options), options
        self.text_MD, self.image_ND = addressable(text_MD), addressable(image_ND)
        self.bank_QD = None if bank_QD is None or not len(bank_QD) else addressable(bank_QD)
        Q = 0 if bank_QD is None else len(bank_QD)
        self.cells = _Cells(options, len(image_ND), Q, len(text_MD), self.config, text_MD.device)
        # The scale over ln 2 in fp32, as the tiles take it; everything else takes the scale that this amounts to.
        self.factor = (scale.detach().double() / LN2).float().reshape(1)
        self.scale = self.factor.double() * LN2
        self.width, self.D, self.own = text_MD.shape[1], self.text_MD.shape[1], self.cells.own

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.text_MD.device)

    def _full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.text_MD.device)

    def _tile(self, bank: bool, launch: Launch) -> dict[str, Any]:
        """Arguments of every kernel that computes logits of the batch's columns, or the bank's."""
        columns_ND = self.bank_QD if bank and self.bank_QD is not None else self.image_ND
        codes, cells = (self.cells.bank_codes, self.cells.bank_cells) if bank else (self.cells.codes, self.cells.cells)
        return {
            **matrix("text", self.text_MD, (launch.rows, launch.depth), self.config.descriptors),
            **matrix("columns", columns_ND, (launch.columns, launch.depth), self.config.descriptors),
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
            "POSITIVES": self.options.as_positives,
            "BLOCK_M": launch.rows,
            "BLOCK_N": launch.columns,
            "BLOCK_D": launch.depth,
            **arithmetic(self.text_MD.dtype),
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def forward(self) -> ContrastiveSums:
        (M, N), launch, config = (len(self.text_MD), len(self.image_ND)), self.config.forward, self.config
        extra, smooth = self.options.as_positives, self.options.smooth
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

        return ContrastiveSums(
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
        self, sums: ContrastiveKept, grads: ContrastiveGrads, need_text: bool, need_image: bool
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
        launch, how = self.config.gradient, (self.config.product, self.config.descriptors)
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
                    **matrix("out", dz_RC, (launch.rows, launch.columns), self.config.descriptors),
                    row_vectors=row_KM,
                    col_vectors=None if bank else col_KN,
                    scale_slopes=scale_slopes,
                    first_row=row,
                    first_col=col,
                    SMOOTH=self.options.smooth,
                )
                d_scale += scale_slopes[: math.prod(grid)].sum(dtype=torch.float64)
                if d_text_MD is not None:
                    add_product(d_text_MD[rows], dz_RC, columns_ND[cols], False, *how)
                if d_image_ND is not None:
                    add_product(d_image_ND[cols], dz_RC, self.text_MD[rows], True, *how)
        return d_scale

    def _row_steps(self) -> Iterator[tuple[slice, slice]]:
        """Steps over the texts, and the same pairs among all images."""
        for start in range(0, len(self.text_MD), ROW_STEP):
            stop = min(start + ROW_STEP, len(self.text_MD))
            yield slice(start, stop), slice(self.own.start + start, self.own.start + stop)


def _gain(grads: ContrastiveGrads) -> Tensor:
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
