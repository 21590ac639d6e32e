"""The tiles of `sigmoid_loss` in Triton: losses and gradients in one pass, no M x N matrix.

Cost model, for M texts of this rank, N images of all ranks, Q bank rows and width D:

- products: M (N + Q) D multiply-adds, three times (the logits, d text, d image), twice when images are frozen, once
  where no gradient is wanted. The bank's logits yield no d image.
- a logit costs one exponential and a series; with gradients one division more.
- memory beside the inputs: fp32 M x D for d text, fp32 N x D for d image and vectors of length M + N; one chunk of
  `CHUNK` x `CHUNK` slopes (32 MB, fp32 64 MB), without gradients 4 M (N + Q) / (128 x `STRIP_TILES`) bytes of partial
  sums; 4 bytes a tile of 128 x 128 (fp32, `BURDENED`: 64 x 64) for the list of excluded cells; a copy of the features
  unless D is a multiple of 16.
- texts and columns of different dtypes are multiplied as fp32, each block once it is loaded; for d text `CHUNK` columns
  at a time are copied in fp32.

With u = -y z, y = +1 for positives and -1 else, a cell loses softplus(u) and its slope is -y sigmoid(u): both keep
their relative precision however small they are. A masked cell has u = -inf.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..contract import Options, SigmoidSums
from . import tuning
from .cells import Pair, by_tile, codes_of
from .tiles import add_product, addressable, arithmetic, fill_cells, same_ids, tile_product

# Slopes are stored times this: fp16 then reaches down to 2^-39.
SLOPE_UNIT: tl.constexpr = tl.constexpr(2.0**15)
# Stands for an excluded cell's dot product, which no features of this world reach.
CLOSED: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _exponents(
    text, columns, text_stride, columns_stride, scalars, row_codes, col_codes, cells, bounds, row, col, M, C, D,
    diagonal, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of one tile: the dot products (`CLOSED` for excluded cells), u, and which cells are positives, if any.

    Pairs' own cells are masked here: torch adds them, in fp32.
    """
    dot_RC = tile_product(
        text, text_stride, row, M, columns, columns_stride, col, C, D, BLOCK, BLOCK, BLOCK_K, PRECISION, UPCAST
    )
    dot_RC = fill_cells(dot_RC, cells, bounds, row, col, C, CLOSED, BLOCK, BLOCK)
    row_R = row + tl.arange(0, BLOCK)
    col_C = col + tl.arange(0, BLOCK)
    masked_RC = (dot_RC == CLOSED) | (col_C >= C)[None, :] | ((row_R + diagonal)[:, None] == col_C[None, :])
    positive_RC = tl.zeros([BLOCK, BLOCK], tl.int1)
    if IDS > 0:
        positive_RC = same_ids(row_codes, col_codes, row, col, M, C, IDS, BLOCK, BLOCK)
    u_RC = dot_RC * tl.load(scalars) + tl.load(scalars + 1)
    if POSITIVES:
        u_RC = tl.where(positive_RC, -u_RC, u_RC)
    else:
        masked_RC = masked_RC | positive_RC
    return dot_RC, tl.where(masked_RC, float("-inf"), u_RC), positive_RC


@triton.jit
def _softplus(u_RC, e_RC):
    """log(1 + e^u), given e^-|u|."""
    # log1p(e) / e on [0, 1], relative error 4e-8: log(1 + e) would lose every e below 2^-24. A last coefficient of
    # exactly 1 keeps the mean error at 3e-9: rows add up what cells have in common.
    series_RC = 0.00536482544 * e_RC - 0.0300657967
    series_RC = series_RC * e_RC + 0.0792045428
    series_RC = series_RC * e_RC - 0.13753803
    series_RC = series_RC * e_RC + 0.191536552
    series_RC = series_RC * e_RC - 0.248571637
    series_RC = series_RC * e_RC + 0.333213226
    series_RC = series_RC * e_RC - 0.49999648
    series_RC = series_RC * e_RC + 1.0
    return tl.maximum(u_RC, 0.0) + series_RC * e_RC


@triton.jit
def loss_kernel(
    text, columns, text_stride, columns_stride, scalars, row_codes, col_codes, cells, bounds, loss, M, C, D, diagonal,
    strip_tiles, IDS: tl.constexpr, POSITIVES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(u) of one block of texts over one strip of columns: fp32 [strips, M]."""
    row = tl.program_id(0) * BLOCK
    strip = tl.program_id(1)
    tiles = tl.cdiv(C, BLOCK)
    loss_R = tl.zeros([BLOCK], tl.float32)
    for tile in range(strip * strip_tiles, tl.minimum((strip + 1) * strip_tiles, tiles)):
        _, u_RC, _ = _exponents(
            text, columns, text_stride, columns_stride, scalars, row_codes, col_codes, cells, bounds, row,
            tile * BLOCK, M, C, D, diagonal, IDS, POSITIVES, BLOCK, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        loss_R += tl.sum(_softplus(u_RC, tl.exp(-tl.abs(u_RC))), 1)
    row_R = row + tl.arange(0, BLOCK)
    tl.store(loss + strip.to(tl.int64) * M + row_R, loss_R, mask=row_R < M)


@triton.jit
def slope_kernel(
    text, columns, text_stride, columns_stride, scalars, row_codes, col_codes, cells, bounds, slope, sums, first_row,
    first_col, M, C, D, diagonal, IDS: tl.constexpr, POSITIVES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the chunk: its slopes, and row sums: of the losses, of slopes, of slopes times dot products."""
    in_row = tl.program_id(0) * BLOCK
    in_col = tl.program_id(1) * BLOCK
    dot_RC, u_RC, positive_RC = _exponents(
        text, columns, text_stride, columns_stride, scalars, row_codes, col_codes, cells, bounds, first_row + in_row,
        first_col + in_col, M, C, D, diagonal, IDS, POSITIVES, BLOCK, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    e_RC = tl.exp(-tl.abs(u_RC))
    slope_RC = tl.where(u_RC > 0, 1.0, e_RC) / (1.0 + e_RC)
    if POSITIVES:
        slope_RC = tl.where(positive_RC, -slope_RC, slope_RC)
    # After the slopes: before them, sm_90 would be short of registers.
    loss_R = tl.sum(_softplus(u_RC, e_RC), 1)
    in_row_R = in_row + tl.arange(0, BLOCK)
    in_col_C = in_col + tl.arange(0, BLOCK)
    sums += (3 * tl.program_id(1)) * CHUNK + in_row_R
    tl.store(sums, loss_R)
    tl.store(sums + CHUNK, tl.sum(slope_RC, 1))
    tl.store(sums + 2 * CHUNK, tl.sum(slope_RC * dot_RC, 1))
    slope += in_row_R[:, None] * CHUNK + in_col_C[None, :]
    tl.store(slope, (slope_RC * SLOPE_UNIT).to(slope.dtype.element_ty))


# Launching

# Where codes of two kinds, or the positives of one, take the registers of half a tile.
BURDENED = tuning.Tile(64, 64, 4, 3)


def tile_for(size: int, kinds: int, positives: bool) -> tuning.Tile:
    """How losses and slopes are walked, for features of `size` bytes, so many kinds of ids, and what these mean."""
    tile = tuning.TILES[size]
    if size == 2 and kinds + positives > 1:
        return BURDENED
    return tile._replace(num_warps=tuning.warps(tile, kinds))


@dataclass(frozen=True)
class _Part:
    """One source of columns, the images or the bank."""

    columns_CD: Tensor
    dtype: torch.dtype
    """In which they and the texts are multiplied, block by block: fp32 where theirs differ."""
    tile: tuning.Tile
    bank: bool
    diagonal: int
    codes: Pair | None
    cells: Pair


def _parts(text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, options: Options) -> list[_Part]:
    M, N = len(text_MD), len(image_ND)
    ids_KM, ids_KN, bank_ids_Q = options.ids_KM, options.ids_KN, options.bank_ids_Q
    parts = []
    for bank, columns_CD, first in ((False, image_ND, 0), (True, bank_QD, N)):
        if not M or columns_CD is None or not len(columns_CD):
            continue
        size = len(columns_CD)
        dtype = columns_CD.dtype if columns_CD.dtype == text_MD.dtype else torch.float32
        # No text lies on a diagonal of the bank.
        diagonal = -M if bank else options.offset
        pairs: list[Pair] = []
        if ids_KM is not None and bank and bank_ids_Q is not None:
            pairs = [(ids_KM[0], bank_ids_Q)]
        elif ids_KM is not None and ids_KN is not None and not bank:
            pairs = [*zip(ids_KM, ids_KN, strict=True)]
        codes = codes_of(pairs) if pairs else None
        tile = tile_for(dtype.itemsize, len(pairs), options.as_positives)
        nothing = torch.empty(2, 0, dtype=torch.int64, device=columns_CD.device)
        row_E, col_E = nothing if options.excluded_2E is None else options.excluded_2E
        col_E = col_E - first
        negative_E = (col_E >= 0) & (col_E < size) & (row_E + diagonal != col_E)
        if codes is not None and options.as_positives:
            negative_E &= (codes[0][:, row_E] != codes[1][:, col_E.clamp(0, size - 1)]).all(0)
        # A list in any case: with and without one, a compiler may add up in another order.
        cells = by_tile(row_E, col_E, (M, size), (tile.BLOCK, tile.BLOCK), negative_E)
        parts.append(_Part(columns_CD, dtype, tile, bank, diagonal, codes, cells))
    return parts


class TritonSigmoid:
    """`ChunkedSigmoid` by the kernels above: the same methods, the same results."""

    def __init__(
        self,
        text_MD: Tensor,
        image_ND: Tensor,
        bank_QD: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        share_M: Tensor,
        options: Options,
    ) -> None:
        self.width, self.share_M, self.options = text_MD.shape[1], share_M, options
        self.text_MD, self.image_ND = addressable(text_MD), addressable(image_ND)
        self.scalars = torch.stack([scale.detach().float().reshape(()), bias.detach().float().reshape(())])
        self.scale, self.bias = scale.detach().double().reshape(()), bias.detach().reshape(())
        self.diagonal = 0 <= options.offset <= len(image_ND) - len(text_MD)
        bank_QD = None if bank_QD is None else addressable(bank_QD)
        self.parts = _parts(self.text_MD, self.image_ND, bank_QD, options)

    def _arguments(self, part: _Part) -> dict[str, Any]:
        """Those of both kernels."""
        codes = part.codes or (None, None)
        kinds = 0 if part.codes is None else len(part.codes[0])
        how = arithmetic(part.dtype)
        if self.text_MD.dtype != part.columns_CD.dtype:
            how["UPCAST"] = True
        return {
            "text": self.text_MD,
            "columns": part.columns_CD,
            "text_stride": self.text_MD.stride(0),
            "columns_stride": part.columns_CD.stride(0),
            "scalars": self.scalars,
            "row_codes": codes[0],
            "col_codes": codes[1],
            "cells": part.cells[0],
            "bounds": part.cells[1],
            "M": len(self.text_MD),
            "C": len(part.columns_CD),
            "D": self.text_MD.shape[1],
            "diagonal": part.diagonal,
            "IDS": kinds,
            "POSITIVES": self.options.as_positives,
            **part.tile._asdict(),
            **how,
        }

    def _own_dots(self) -> Tensor:
        """Of the pairs' own cells, fp64; 0 where these columns do not hold them."""
        M, offset = len(self.text_MD), self.options.offset
        dot_M = torch.zeros(M, dtype=torch.float64, device=self.text_MD.device)
        if not self.diagonal:
            return dot_M
        own_MD = self.image_ND[offset : offset + M]
        for start in range(0, M, tuning.CHUNK):
            rows = slice(start, start + tuning.CHUNK)
            products = self.text_MD[rows, : self.width].float() * own_MD[rows, : self.width]
            dot_M[rows] = products.sum(1, dtype=torch.float64)
        return dot_M

    def forward(self) -> SigmoidSums:
        """With the gradients that the options ask for: the features' in fp32, the scalars' in fp64."""
        (M, D), made, device = self.text_MD.shape, self.options.made_in_forward, self.text_MD.device
        positive_M, loss_M = (torch.zeros(M, dtype=torch.float64, device=device) for _ in "12")
        dot_M = self._own_dots()
        if self.diagonal:
            positive_M = dot_M * self.scale + self.bias
            loss_M = -functional.logsigmoid(positive_M)
        if not made:
            loss_M += self._losses()
            return SigmoidSums((self.share_M * loss_M).sum(), loss_M, positive_M)
        d_text_MD = torch.zeros(M, D, device=device) if made & 1 else None
        d_image_ND = torch.zeros(self.image_ND.shape, device=device) if made & 2 else None
        sums_3M = self._slopes(d_text_MD, d_image_ND)
        loss_M += sums_3M[0]
        d_bias, d_scale = ((sums_M * self.share_M).sum() for sums_M in sums_3M[1:])
        if self.diagonal:
            own_M = -self.share_M * torch.sigmoid(-positive_M)
            self._add_own_cells(own_M, d_text_MD, d_image_ND)
            d_scale, d_bias = d_scale + (own_M * dot_M).sum(), d_bias + own_M.sum()
        d_text_MD, d_image_ND = (
            None if gradient is None else gradient[:, : self.width] for gradient in (d_text_MD, d_image_ND)
        )
        return SigmoidSums(
            (self.share_M * loss_M).sum(), loss_M, positive_M, d_text_MD, d_image_ND, d_scale, d_bias
        )  # fmt: skip

    def _losses(self) -> Tensor:
        """Of all cells but the pairs' own [M]."""
        M = len(self.text_MD)
        loss_M = torch.zeros(M, dtype=torch.float64, device=self.text_MD.device)
        for part in self.parts:
            tiles = triton.cdiv(len(part.columns_CD), part.tile.BLOCK)
            strips = triton.cdiv(tiles, tuning.STRIP_TILES)
            partial = torch.empty(strips, M, dtype=torch.float32, device=self.text_MD.device)
            loss_kernel[triton.cdiv(M, part.tile.BLOCK), strips](
                **self._arguments(part), loss=partial, strip_tiles=tuning.STRIP_TILES
            )
            loss_M += partial.sum(0, dtype=torch.float64)
        return loss_M

    def _slopes(self, d_text_MD: Tensor | None, d_image_ND: Tensor | None) -> Tensor:
        """The same, and sums over the slopes, plain and times the dot products: [3, M]; sets the gradients."""
        M, chunk, device = len(self.text_MD), tuning.CHUNK, self.text_MD.device
        sums_3M = torch.zeros(3, M, dtype=torch.float64, device=device)
        top = self.share_M.amax() if M else self.share_M.new_zeros(())
        share_M1 = (self.share_M / torch.where(top == 0, 1, top)).float()[:, None]
        for part in self.parts:
            arguments, columns_CD, tile = self._arguments(part), part.columns_CD, tuning.TILES[part.dtype.itemsize]
            block = part.tile.BLOCK
            launch = tuning.Launch(tile.BLOCK, tile.BLOCK, tile.BLOCK_K, tile.num_warps, tile.num_stages)
            high = min(chunk, triton.cdiv(M, block) * block)
            slope_RC = torch.empty(high, chunk, dtype=part.dtype, device=device)
            for start in range(0, M, chunk):
                rows = slice(start, min(start + chunk, M))
                size = rows.stop - start
                # The row's factor goes to the text, not to the slopes: those near 1 would all round alike.
                weighted_RD = None
                if d_image_ND is not None and not part.bank:
                    weighted_RD = (self.text_MD[rows] * share_M1[rows]).to(part.dtype)
                for first in range(0, len(columns_CD), chunk):
                    cols = slice(first, min(first + chunk, len(columns_CD)))
                    across = triton.cdiv(cols.stop - first, block)
                    partial = torch.empty(across, 3, chunk, dtype=torch.float32, device=device)
                    slope_kernel[triton.cdiv(size, block), across](
                        **arguments, slope=slope_RC, sums=partial, first_row=start, first_col=first, CHUNK=chunk
                    )
                    sums_3M[:, rows] += partial[..., :size].sum(0, dtype=torch.float64)
                    of_tile_RC = slope_RC[:size, : cols.stop - first]
                    if d_text_MD is not None:
                        here_CD = columns_CD[cols].to(part.dtype)
                        add_product(d_text_MD[rows], of_tile_RC, here_CD, False, launch, False)
                    if d_image_ND is not None and weighted_RD is not None:
                        add_product(d_image_ND[cols], of_tile_RC, weighted_RD, True, launch, False)
        unit = self.scale / SLOPE_UNIT.value
        if d_text_MD is not None:
            d_text_MD.mul_((self.share_M * unit).float()[:, None])
        if d_image_ND is not None:
            d_image_ND.mul_(top * unit)
        return sums_3M

    def _add_own_cells(self, own_M: Tensor, d_text_MD: Tensor | None, d_image_ND: Tensor | None) -> None:
        own_M1, offset = (own_M * self.scale).float()[:, None], self.options.offset
        for start in range(0, len(self.text_MD), tuning.CHUNK):
            rows = slice(start, min(start + tuning.CHUNK, len(self.text_MD)))
            own = slice(offset + start, offset + rows.stop)
            if d_text_MD is not None:
                d_text_MD[rows].addcmul_(self.image_ND[own].float(), own_M1[rows])
            if d_image_ND is not None:
                d_image_ND[own].addcmul_(self.text_MD[rows].float(), own_M1[rows])
