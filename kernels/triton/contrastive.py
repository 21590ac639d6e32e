"""The tiles of `contrastive_loss` in Triton: one pass forward, one recompute backward, no M x N matrix.

Cost model, for M texts of this rank, N images of all ranks, Q bank rows and width D:

- products: M (N + Q) D multiply-adds, once in forward and three times in backward (the recompute, d text, d image);
  two in backward when images are frozen. A bank column enters no d image. Frozen columns of 16 bits beside texts of
  fp32 take each product in parts: two for fp16, three for bf16, at the rate of 16 bits.
- exponentials: one a logit in forward, two in backward. Columns that the one exponential cannot serve are
  computed again, block by block; without any, that kernel only reads N sums.
- memory beside the inputs: column sums, programs x panel x 4 B (35 MB on sm_90) however large N is; two numbers a
  text and column of programs; where cells are masked, a bit a tile and 8 B a cell (and as many again as it is
  made: under 64 MB at a million rows and columns); the logit gradients of one chunk (32 MB) and, where texts are
  few, as much again for the parts of a product's sums; fp32
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
Masked cells: tiles that hold any are flagged and left out; a second launch of narrower tiles, which have the registers
for it, does those, with strips of its own.
Backward: dZ goes through memory since one program cannot hold the D-wide sums of both its rows and its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..contract import ContrastiveGrads, ContrastiveKept, ContrastiveSums, Options
from . import tuning
from .cells import Masked, Pair, codes_of, count_same, histogram, masked
from .contrastive_kernels import LOWEST, forward_kernel, gradient_kernel, merge_kernel, rescue_kernel
from .tiles import TOP_EXPONENT, add_library_product, add_product, addressable, arithmetic, matrix, split
from .tuning import Config, Launch

LN2 = math.log(2)
# Rows at a time where plain torch walks features in fp32.
ROW_STEP = 4096


class _Cells:
    """Masked and positive cells as the kernels read them; their counts come from sorted ids, without tiles.

    `codes` are those of the rows [K, M] and of the columns [K, N] in int32, equal where ids are, for K kinds of
    ids. `masked` takes a side's columns, and the tiles that they are walked in. Nothing here waits for the device.
    """

    def __init__(self, options: Options, N: int, bank: int, M: int, device: torch.device) -> None:
        self.own, as_positives = slice(options.offset, options.offset + M), options.as_positives
        self.diagonal = self.own.start >= 0 and self.own.stop <= N
        self.M, self.N, self.bank = M, N, bank
        ids_KM, ids_KN, bank_ids_Q, excluded = options.ids_KM, options.ids_KN, options.bank_ids_Q, options.excluded_2E
        self.codes = None if ids_KM is None or ids_KN is None else codes_of([*zip(ids_KM, ids_KN, strict=True)])
        self.bank_codes: Pair | None = None
        if ids_KM is not None and bank_ids_Q is not None and bank:
            self.bank_codes = codes_of([(ids_KM[0], bank_ids_Q)])
        self.listed: tuple[Tensor, Tensor, Tensor] | None = None
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
            self.listed = row, col, plain
        self.counts = (
            (left_out_M, left_out_N, same_M, same_N)
            if as_positives
            else (left_out_M + same_M, left_out_N + same_N, torch.zeros_like(same_M), torch.zeros_like(same_N))
        )

    def masked(self, bank: bool, wide: Launch, narrow: Launch) -> Masked | None:
        """None where no cell is listed."""
        if self.listed is None:
            return None
        row_E, col_E, plain_E = self.listed
        shape, first = ((self.M, self.bank), self.N) if bank else ((self.M, self.N), 0)
        chosen_E = plain_E & ((col_E >= self.N) == bank)
        tiles = (wide.rows, wide.columns), (narrow.rows, narrow.columns)
        return masked(row_E, col_E - first, chosen_E, shape, *tiles)


@dataclass(frozen=True)
class _Side:
    """The batch's columns or the bank's, and the texts as they are multiplied with them."""

    bank: bool
    columns_CD: Tensor
    text_MD: Tensor
    """In `parts` side by side, in the columns' dtype."""
    parts: int
    power: Tensor
    """What the texts are multiplied with."""
    factor: Tensor
    """What makes logits over ln 2 of products."""
    config: Config
    listed: Config
    """Of the tiles that hold masked cells."""
    codes: Pair | None
    masked: Masked | None


class TritonContrastive:
    """`ChunkedContrastive` by the kernels above: the same methods, the same results.

    Frozen columns of 16 bits are read as they are: the texts, in another dtype, become a sum of parts in theirs.
    """

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: Options
    ) -> None:
        self.given, self.options = (text_MD, image_ND, bank_QD, scale), options
        self.text_MD, self.image_ND = addressable(text_MD), addressable(image_ND)
        bank_QD = None if bank_QD is None or not len(bank_QD) else addressable(bank_QD)
        Q = 0 if bank_QD is None else len(bank_QD)
        # The scale over ln 2 in fp32, as the tiles take it; everything else takes the scale that this amounts to.
        self.factor = (scale.detach().double() / LN2).float().reshape(1)
        self.scale = self.factor.double() * LN2
        self.width, self.D = text_MD.shape[1], self.text_MD.shape[1]
        self.cells = _Cells(options, len(image_ND), Q, len(text_MD), text_MD.device)
        self.own = self.cells.own
        self.batch = self._side(False, self.image_ND)
        self.bank = None if bank_QD is None else self._side(True, bank_QD)

    def _side(self, bank: bool, columns_CD: Tensor) -> _Side:
        dtype, burden = columns_CD.dtype, tuning.burden(self.options)
        config, listed = (tuning.tile_config(self.text_MD, dtype, load) for load in (burden, tuning.MASKED))
        parts = tuning.parts(self.text_MD.dtype, dtype)
        if bank and dtype == self.image_ND.dtype:
            text_MD, power = self.batch.text_MD, self.batch.power
        else:
            text_MD, power = split(self.text_MD, dtype, parts)
        codes = self.cells.bank_codes if bank else self.cells.codes
        masked = self.cells.masked(bank, config.forward, listed.forward)
        return _Side(bank, columns_CD, text_MD, parts, power, self.factor / power, config, listed, codes, masked)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.text_MD.device)

    def _full(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.text_MD.device)

    def _tile(self, side: _Side, launch: Launch, listed: bool = False) -> dict[str, Any]:
        """Arguments of every kernel that computes logits, of `listed` cells or of tiles without any."""
        codes, masked, descriptors, wide = side.codes, side.masked, side.config.descriptors, side.config.forward
        return {
            **matrix("text", side.text_MD, (launch.rows, launch.depth), descriptors),
            **matrix("columns", side.columns_CD, (launch.columns, launch.depth), descriptors),
            "scale": side.factor,
            "row_codes": None if codes is None else codes[0],
            "col_codes": None if codes is None else codes[1],
            "flags": None if masked is None else masked.flags,
            "words": None if masked is None else masked.words,
            "cells": masked.cells if listed and masked is not None else None,
            "listed": len(masked.cells) if listed and masked is not None else None,
            "WIDE_M": wide.rows,
            "WIDE_N": wide.columns,
            "M": len(self.text_MD),
            "N": len(side.columns_CD),
            "D": self.D,
            "offset": self.own.start,
            "BANK": side.bank,
            "IDS": 0 if codes is None else len(codes[0]),
            "POSITIVES": self.options.as_positives,
            "BLOCK_M": launch.rows,
            "BLOCK_N": launch.columns,
            "BLOCK_D": launch.depth,
            "PARTS": side.parts,
            **arithmetic(side.columns_CD.dtype),
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def forward(self) -> ContrastiveSums:
        batch, config = self.batch, self.batch.config
        M, N = len(self.text_MD), len(self.image_ND)
        extra, smooth = self.options.as_positives, self.options.smooth
        positive_M = self._full(0, M, dtype=torch.float64)
        for rows, own in self._row_steps() if self.cells.diagonal else ():
            products = self.text_MD[rows].float() * self.image_ND[own].float()
            positive_M[rows] = products.sum(1, dtype=torch.float64) * self.scale

        width = min(N, config.panel)
        launches = [self._forward_launches(side) for side in (self.batch, self.bank) if side is not None]
        slices = max(grid[1] for of_side in launches for grid, _ in of_side)
        strips = [grid[0] for grid, _ in launches[0]]
        row_top, row_sum = self._full(LOWEST.value, slices, M), self._full(0, slices, M)
        row_extra = self._full(0, slices, M) if extra else None
        row_logits = self._full(0, slices, M) if smooth else None
        tops = [self._new(triton.cdiv(width, given["BLOCK_N"]), grid[0]) for grid, given in launches[0]]
        sums = [self._new(P, width) for P in strips]
        col_extra = self._new(max(strips), width) if extra else None
        col_logits = self._new(max(strips), width) if smooth else None
        highest_N, total_N = self._new(N, dtype=torch.float64), self._new(N, dtype=torch.float64)
        col_extra_N = self._new(N, dtype=torch.float64) if extra else None
        col_logits_N = self._new(N, dtype=torch.float64) if smooth else None
        of_rows = {"row_top": row_top, "row_sum": row_sum, "row_extra": row_extra, "row_logits": row_logits}
        merged_by = launches[0][-1][1]["BLOCK_N"]
        more = (tops[1], sums[1], strips[1]) if len(strips) > 1 else (None, None, None)
        with torch.cuda.device_of(self.text_MD):
            for first in range(0, N, width):
                last = min(first + width, N)
                for partial in (col_extra, col_logits):
                    if partial is not None:
                        partial.zero_()
                for (grid, given), col_top, col_sum in zip(launches[0], tops, sums, strict=True):
                    forward_kernel[grid](
                        **given, **of_rows, col_top=col_top, col_sum=col_sum, col_extra=col_extra,
                        col_logits=col_logits, first=first, last=last, width=width,
                    )  # fmt: skip
                merge_kernel[triton.cdiv(last - first, merged_by),](
                    tops[0], sums[0], strips[0], *more, highest_N, total_N, first, last, width, BLOCK_P=16,
                    BLOCK_N=merged_by, WIDE_N=config.forward.columns,
                )  # fmt: skip
                for partial, sums_N in ((col_extra, col_extra_N), (col_logits, col_logits_N)):
                    if partial is not None and sums_N is not None:
                        sums_N[first:last] = partial[:, : last - first].sum(0, dtype=torch.float64)
            for grid, given in launches[1] if self.bank is not None else ():
                none = dict.fromkeys(("col_top", "col_sum", "col_extra", "col_logits"))
                last = given["N"]
                forward_kernel[grid](**given, **of_rows, **none, first=0, last=last, width=last)
            listed = batch.masked is not None
            rescue = batch.listed.rescue if listed else config.rescue
            rescue_kernel[triton.cdiv(N, rescue.columns),](
                **self._tile(batch, rescue, listed), highest=highest_N, total=total_N
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

    def _forward_launches(self, side: _Side) -> list[tuple[tuple[int, int], dict[str, Any]]]:
        """Grids and arguments: of tiles without listed cells, then of those with some."""
        # A bank, which has no column sums, is one panel.
        C = len(side.columns_CD) if side.bank else min(len(side.columns_CD), side.config.panel)
        grid = tuning.programs(side.config, len(self.text_MD), C)

        def arguments(config: Config, listed: bool) -> dict[str, Any]:
            own = {"SMOOTH": self.options.smooth, "KEPT": config.kept, "maxnreg": config.registers}
            return self._tile(side, config.forward, listed) | own

        found = [(grid, arguments(side.config, False))]
        if side.masked is not None:
            listed = side.listed
            P = min(side.masked.words, listed.programs)
            grid = P, min(max(1, listed.programs // P), triton.cdiv(C, listed.forward.columns))
            found.append((grid, arguments(listed, True)))
        return found

    def backward(
        self, sums: ContrastiveKept, grads: ContrastiveGrads, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(d text_MD, d image_ND, d scale) in fp32, fp32 and fp64."""
        if need_image and self.image_ND.dtype != self.text_MD.dtype:
            # d image is a product with the texts: they and the images then have one dtype, the bank keeps its own.
            text_MD, image_ND, bank_QD, scale = self.given
            again = TritonContrastive(text_MD.float(), image_ND.float(), bank_QD, scale, self.options)
            return again.backward(sums, grads, need_text, need_image)
        M, N = len(self.text_MD), len(self.image_ND)
        d_scale = self._full(0, dtype=torch.float64)
        d_text_MD = self._full(0, M, self.D) if need_text else None
        d_image_ND = self._full(0, N, self.D) if need_image else None
        gain = _gain(grads)
        row_KM = _pack(sums.row_lse_M, gain, grads.row_lse_M, grads.row_extra_M, grads.row_logits_M)
        col_KN = _pack(sums.col_lse_N, gain, grads.col_lse_N, grads.col_extra_N, grads.col_logits_N)
        with torch.cuda.device_of(self.text_MD):
            d_scale += self._accumulate(self.batch, row_KM, col_KN, d_text_MD, d_image_ND)
            if self.bank is not None and d_text_MD is not None:
                d_scale += self._accumulate(self.bank, row_KM, None, d_text_MD, None)
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
        self, side: _Side, row_KM: Tensor, col_KN: Tensor | None, d_text_MD: Tensor | None, d_image_ND: Tensor | None
    ) -> Tensor:
        """Adds the products of all logit gradients of a side's columns; returns d scale."""
        columns_ND, parts, config = side.columns_CD, side.parts, side.config
        M, N = len(self.text_MD), len(columns_ND)
        launch = config.gradient
        high, wide = tuning.chunk_shape(config, M, N)
        # Parts lie below one another, each with room for whole tiles.
        chunk = self._new(parts * triton.cdiv(high, launch.rows) * launch.rows, wide, dtype=columns_ND.dtype)
        d_scale = self._full(0, dtype=torch.float64)
        passes = [(launch, False)] if side.masked is None else [(launch, False), (side.listed.gradient, True)]
        tiles = [(of, self._tile(side, of, listed)) for of, listed in passes]
        for row in range(0, M, high):
            rows = slice(row, min(row + high, M))
            size = rows.stop - row
            step = size if parts == 1 else triton.cdiv(size, launch.rows) * launch.rows
            for col in range(0, N, wide):
                cols = slice(col, min(col + wide, N))
                dz_RC = chunk[: parts * step, : cols.stop - col]
                # Flagged tiles are written last.
                for of, tile in tiles:
                    grid = triton.cdiv(cols.stop - col, of.columns), triton.cdiv(size, of.rows)
                    scale_slopes = self._new(math.prod(grid))
                    gradient_kernel[grid](
                        **tile,
                        **matrix("out", dz_RC, (of.rows, of.columns), config.descriptors),
                        row_vectors=row_KM,
                        col_vectors=col_KN,
                        out_step=step,
                        scale_slopes=scale_slopes,
                        first_row=row,
                        first_col=col,
                        SMOOTH=self.options.smooth,
                    )
                    d_scale += scale_slopes.sum(dtype=torch.float64)
                if d_text_MD is not None:
                    self._add_product(config, d_text_MD[rows], dz_RC, columns_ND[cols], False, parts)
                if d_image_ND is not None:
                    self._add_product(config, d_image_ND[cols], dz_RC, side.text_MD[rows], True)
        return d_scale / side.power.double().reshape(())

    def _add_product(
        self, config: Config, out_RD: Tensor, chunk: Tensor, features_KD: Tensor, transposed: bool, parts: int = 1
    ) -> None:
        if config.products == "library":
            add_library_product(out_RD, chunk, features_KD, transposed, parts)
            return
        splits = tuning.product_splits(config, out_RD.shape[0], out_RD.shape[1], len(features_KD))
        add_product(
            out_RD, chunk, features_KD, transposed, config.product, config.descriptors, parts=parts, splits=splits
        )

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
