"""SigLIP's pairwise sigmoid loss over a batch, a bank of images and any number of ranks, with no M x N matrix.

Cost model, for M texts on this rank, N images of all ranks, Q bank rows and width D:

- compute: 4 products of M (N + Q) D multiply-adds, one in forward and three in backward (the recompute, d
  text, d image), 3 when images are frozen. A logit costs one exponential and one logarithm in forward, one
  exponential and one division in backward. The bank's logits yield no d image.
- memory beside the inputs: fp32 M x D for d text, fp32 N x D for d image and vectors of length M + N. Chunked
  torch: two tiles of `contrastive.TILE_LOGITS` logits, the equal ids of one tile, for half-precision features also
  one block of columns in fp32. Triton: 4 M (N + Q) / (128 x `STRIP_TILES`) bytes of
  partial sums in forward, one chunk of `CHUNK` x `CHUNK` slopes in backward (32 MB, fp32 64 MB), 12
  bytes a tile of 128 x 128 (fp32: 64 x 64) for the list of excluded cells.
- exchange a rank, gather: N images in their own dtype in forward; in backward nothing when images are frozen, else
  a reduce-scatter of N x D in fp32. Memory O((N + Q) D).
- exchange a rank, ring: the same N images in forward, block by block while the last one is computed on, and once
  more in backward; beside them N x D in fp32 when images are trained. Memory O((M + Q) D + N), for M the longest
  rank's: two blocks of images, and in backward three of their gradients. No column has a normaliser, so that blocks
  are simply added up.
- either: at most 2 N ids and 2 N numbers gathered.

Shapes: M this rank's pairs, N pairs of all ranks, Q bank rows, D width, R x C one tile.

With u = -y z, y = +1 for positives and -1 else, a cell loses softplus(u) and its slope is -y sigmoid(u): both keep
their relative precision however small they are. A masked cell has u = -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .contrastive import (
    ContrastiveOutput,
    Exchange,
    Operators,
    Positives,
    _as_scalar,
    _Cells,
    _Options,
    _options,
    _or_empty,
    _plan,
    _Ranks,
    _require_arguments,
    _require_excluded_range,
    _ScaleGradient,
    _Tiles,
    fake_gradients,
    positive_and_masked,
    sums_of_all,
)
from .similarity import TILES, Tile, by_tile, interpreted, jit, tile_product, uses_triton

try:
    import triton.language as tl
except ImportError:
    tl = None

# Columns of tiles a forward program walks: a constant, so that the same bits come out on every chip.
STRIP_TILES = 32
# Rows and columns of slopes in memory at a time; a multiple of every tile.
CHUNK = 4096
# Slopes are stored times this: fp16 then reaches down to 2^-39.
SLOPE_UNIT = 2.0**15
# Stands for an excluded cell's dot product, which no features of this world reach.
CLOSED = -3.0e38


# Naive reference


def sigmoid_loss_naive(
    text_MD: Tensor,
    image_MD: Tensor,
    bank_QD: Tensor | None = None,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    pair_weights: Tensor | None = None,
    positives: Positives = "pair",
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> ContrastiveOutput:
    """The definition of `sigmoid_loss` on one rank: the whole matrix in plain torch, under autograd."""
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    M, device = len(text_MD), text_MD.device
    columns = image_MD if bank_QD is None else torch.cat([image_MD, bank_QD])
    bias = 0.0 if logit_bias is None else logit_bias
    logits = logit_scale * (text_MD.to(dtype) @ columns.to(dtype).T) + bias

    positive, masked = positive_and_masked(logits, positives, image_ids, caption_ids, bank_ids, excluded)

    cell_loss = -functional.logsigmoid(torch.where(positive, logits, -logits))
    pair_loss = cell_loss.masked_fill(masked & ~positive, 0).sum(1)
    weights = torch.ones(M, dtype=dtype, device=device) if pair_weights is None else pair_weights.to(dtype)
    total = weights.sum()
    loss = (weights * pair_loss).sum() / torch.where(total > 0, total, 1)
    return ContrastiveOutput(loss, pair_loss.detach(), logits.diagonal()[:M].detach().clone())


# Triton kernels


@jit
def _scores(  # type: ignore[no-untyped-def]
    text_ptr, column_ptr, scalars_ptr, row_R, col_C, M, C, D, diagonal,
    ids_row_ptr, ids_col_ptr, more_row_ptr, more_col_ptr, cell_rows_ptr, cell_cols_ptr, bounds_ptr, at,
    IDS: tl.constexpr, IDS_POSITIVE: tl.constexpr, CLOSED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of one tile: the dot products (`CLOSED` for excluded cells), u, and which cells are positives, if any.

    Pairs' own cells are masked here: torch adds them, in fp32.
    """
    dot_RC = tile_product(text_ptr, row_R, row_R < M, column_ptr, col_C, col_C < C, D, BLOCK, BLOCK_K, UPCAST)
    # Marked in place, so that one tensor alone lives through the loop.
    for cell in range(tl.load(bounds_ptr + at), tl.load(bounds_ptr + at + 1)):
        row = tl.load(cell_rows_ptr + cell)
        col = tl.load(cell_cols_ptr + cell)
        dot_RC = tl.where((row_R == row)[:, None] & (col_C == col)[None, :], CLOSED, dot_RC)
    masked_RC = (dot_RC == CLOSED) | (col_C >= C)[None, :] | ((row_R + diagonal)[:, None] == col_C[None, :])
    positive_RC = tl.zeros([BLOCK, BLOCK], tl.int1)
    if IDS > 0:
        row_ids_R = tl.load(ids_row_ptr + row_R, mask=row_R < M, other=0)
        col_ids_C = tl.load(ids_col_ptr + col_C, mask=col_C < C, other=0)
        positive_RC = row_ids_R[:, None] == col_ids_C[None, :]
    if IDS > 1:
        row_ids_R = tl.load(more_row_ptr + row_R, mask=row_R < M, other=0)
        col_ids_C = tl.load(more_col_ptr + col_C, mask=col_C < C, other=0)
        positive_RC = positive_RC | (row_ids_R[:, None] == col_ids_C[None, :])
    u_RC = dot_RC * tl.load(scalars_ptr) + tl.load(scalars_ptr + 1)
    if IDS_POSITIVE:
        u_RC = tl.where(positive_RC, -u_RC, u_RC)
    else:
        masked_RC = masked_RC | positive_RC
    return dot_RC, tl.where(masked_RC, float("-inf"), u_RC), positive_RC


@jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    text_ptr, column_ptr, scalars_ptr, loss_ptr, M, C, D, diagonal, strip_tiles,
    ids_row_ptr, ids_col_ptr, more_row_ptr, more_col_ptr, cell_rows_ptr, cell_cols_ptr, bounds_ptr,
    IDS: tl.constexpr, IDS_POSITIVE: tl.constexpr, CLOSED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(u) of one block of texts over one strip of columns: fp32 [strips, M]."""
    block = tl.program_id(0)
    strip = tl.program_id(1)
    tiles = tl.cdiv(C, BLOCK)
    row_R = block * BLOCK + tl.arange(0, BLOCK)
    loss_R = tl.zeros([BLOCK], tl.float32)
    for tile in range(strip * strip_tiles, tl.minimum((strip + 1) * strip_tiles, tiles)):
        col_C = tile * BLOCK + tl.arange(0, BLOCK)
        _, u_RC, _ = _scores(
            text_ptr, column_ptr, scalars_ptr, row_R, col_C, M, C, D, diagonal,
            ids_row_ptr, ids_col_ptr, more_row_ptr, more_col_ptr, cell_rows_ptr, cell_cols_ptr,
            bounds_ptr, block * tiles + tile, IDS, IDS_POSITIVE, CLOSED, BLOCK, BLOCK_K, UPCAST,
        )  # fmt: skip
        e_RC = tl.exp(-tl.abs(u_RC))
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
        loss_R += tl.sum(tl.maximum(u_RC, 0.0) + series_RC * e_RC, 1)
    tl.store(loss_ptr + strip.to(tl.int64) * M + row_R, loss_R, mask=row_R < M)


@jit
def _slope_kernel(  # type: ignore[no-untyped-def]
    text_ptr, column_ptr, scalars_ptr, slope_ptr, sums_ptr, first_row, first_col, M, C, D, diagonal,
    ids_row_ptr, ids_col_ptr, more_row_ptr, more_col_ptr, cell_rows_ptr, cell_cols_ptr, bounds_ptr,
    IDS: tl.constexpr, IDS_POSITIVE: tl.constexpr, CLOSED: tl.constexpr,
    CHUNK: tl.constexpr, SLOPE_UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the chunk: its slopes, and their row sums, plain and weighted by the dot products."""
    in_row_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_col_C = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_R = first_row + in_row_R
    col_C = first_col + in_col_C
    at = (first_row // BLOCK + tl.program_id(0)) * tl.cdiv(C, BLOCK) + first_col // BLOCK + tl.program_id(1)
    dot_RC, u_RC, positive_RC = _scores(
        text_ptr, column_ptr, scalars_ptr, row_R, col_C, M, C, D, diagonal,
        ids_row_ptr, ids_col_ptr, more_row_ptr, more_col_ptr, cell_rows_ptr, cell_cols_ptr,
        bounds_ptr, at, IDS, IDS_POSITIVE, CLOSED, BLOCK, BLOCK_K, UPCAST,
    )  # fmt: skip
    e_RC = tl.exp(-tl.abs(u_RC))
    slope_RC = tl.where(u_RC > 0, 1.0, e_RC) / (1.0 + e_RC)
    if IDS_POSITIVE:
        slope_RC = tl.where(positive_RC, -slope_RC, slope_RC)
    sums = sums_ptr + (2 * tl.program_id(1)) * CHUNK + in_row_R
    tl.store(sums, tl.sum(slope_RC, 1))
    tl.store(sums + CHUNK, tl.sum(slope_RC * dot_RC, 1))
    slope = slope_ptr + in_row_R[:, None] * CHUNK + in_col_C[None, :]
    tl.store(slope, (slope_RC * SLOPE_UNIT).to(slope_ptr.dtype.element_ty))


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    slope_ptr, feature_ptr, out_ptr, rows, K, D, ROW_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [rows, D] += slope [rows, K] x feature [K, D], the slopes by their strides."""
    row_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc_RD = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        slope = slope_ptr + row_R[:, None] * ROW_STRIDE + k_K[None, :] * K_STRIDE
        slope_RK = tl.load(slope, mask=(row_R < rows)[:, None] & (k_K < K)[None, :], other=0.0)
        feature = feature_ptr + k_K.to(tl.int64)[:, None] * D + d_D[None, :]
        feature_KD = tl.load(feature, mask=(k_K < K)[:, None] & (d_D < D)[None, :], other=0.0)
        if UPCAST:
            slope_RK = slope_RK.to(tl.float32)
            feature_KD = feature_KD.to(tl.float32)
        acc_RD = tl.dot(slope_RK, feature_KD, acc_RD, input_precision="tf32x3")
    out = out_ptr + row_R.to(tl.int64)[:, None] * D + d_D[None, :]
    open_RD = (row_R < rows)[:, None] & (d_D < D)[None, :]
    tl.store(out, tl.load(out, mask=open_RD, other=0.0) + acc_RD, mask=open_RD)


# Triton path


@dataclass(frozen=True)
class _Part:
    """One source of columns, the images or the bank; `ids` are (row, column) vectors, at most two kinds."""

    bank: bool
    columns: int
    diagonal: int
    ids: list[tuple[Tensor, Tensor]]
    cells: tuple[Tensor, Tensor, Tensor]


def warps(tile: Tile, kinds_of_ids: int) -> int:
    """Warps of a kernel that compares ids: twice as many where the registers of two kinds would spill."""
    return 2 * tile.num_warps if kinds_of_ids > 1 else tile.num_warps


def _relabelled(rows_M: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as int32, equal where they were: a tile holds half as many registers of them."""
    labels = torch.cat([rows_M, columns]).unique(return_inverse=True)[1].int()
    return labels[: len(rows_M)], labels[len(rows_M) :]


def _parts(
    text_MD: Tensor,
    columns: int,
    bank: int,
    ids_M: Sequence[Tensor],
    ids_N: Sequence[Tensor],
    bank_ids_Q: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    as_positives: bool,
    offset: int,
) -> list[_Part]:
    M = len(text_MD)
    nothing = torch.empty(0, dtype=torch.int64, device=text_MD.device)
    excluded_rows, excluded_columns = (nothing, nothing) if excluded is None else excluded
    block = TILES[text_MD.element_size()].BLOCK
    parts = []
    for is_bank, size, first in ((False, columns, 0), (True, bank, columns)):
        if not M or not size:
            continue
        here = (excluded_columns >= first) & (excluded_columns < first + size)
        rows, cols = excluded_rows[here], excluded_columns[here] - first
        # No text lies on a diagonal of the bank.
        diagonal = -M if is_bank else offset
        pairs = list(zip(ids_M, ids_N, strict=True))
        if is_bank:
            pairs = [] if bank_ids_Q is None else [(ids_M[0], bank_ids_Q)]
        ids = [_relabelled(*pair) for pair in pairs]
        negative = rows + diagonal != cols
        for pair in ids if as_positives else ():
            negative &= pair[0][rows] != pair[1][cols]
        parts.append(_Part(is_bank, size, diagonal, ids, by_tile(rows[negative], cols[negative], M, size, block)))
    return parts


class _Triton:
    """Losses and gradients by the Triton kernels."""

    def __init__(
        self,
        text_MD: Tensor,
        image_ND: Tensor,
        bank_QD: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        parts: list[_Part],
        offset: int,
        as_positives: bool,
    ) -> None:
        self.text_MD, self.image_ND = text_MD.contiguous(), image_ND.contiguous()
        self.bank_QD = None if bank_QD is None else bank_QD.contiguous()
        self.scalars = torch.stack([scale.detach().float().reshape(()), bias.detach().float().reshape(())])
        self.scale, self.bias, self.parts = scale.detach(), bias.detach(), parts
        self.offset, self.as_positives = offset, as_positives
        self.diagonal = 0 <= offset <= len(image_ND) - len(text_MD)
        self.tile = TILES[text_MD.element_size()]
        self.options = {**self.tile._asdict(), "UPCAST": interpreted()}

    def _columns(self, part: _Part) -> Tensor:
        source = self.bank_QD if part.bank else self.image_ND
        if source is None:
            raise RuntimeError("a bank part without a bank")
        return source

    def _masks(self, part: _Part) -> tuple[list[Tensor], dict[str, Any]]:
        """The arguments of a kernel that name ids and cells; ids that are not given are not read."""
        kinds = len(part.ids)
        unread = (self.scalars, self.scalars)
        vectors = [vector for pair in (*part.ids, unread, unread)[:2] for vector in pair]
        given = {
            "IDS": kinds,
            "IDS_POSITIVE": self.as_positives,
            "CLOSED": CLOSED,
            "num_warps": warps(self.tile, kinds),
        }
        return [*vectors, *part.cells], {**self.options, **given}

    def _own_dots(self) -> Tensor:
        """Of the pairs' own cells, fp64; 0 where these columns do not hold them."""
        M = len(self.text_MD)
        dot_M = torch.zeros(M, dtype=torch.float64, device=self.text_MD.device)
        if not self.diagonal:
            return dot_M
        own_MD = self.image_ND[self.offset : self.offset + M]
        for start in range(0, M, CHUNK):
            rows = slice(start, start + CHUNK)
            dot_M[rows] = (self.text_MD[rows].float() * own_MD[rows]).sum(1, dtype=torch.float64)
        return dot_M

    def losses(self) -> tuple[Tensor, Tensor]:
        """(loss_M, positive_M), fp64; without the own cells where these columns do not hold them."""
        M, D = self.text_MD.shape
        positive_M, loss_M = (torch.zeros(M, dtype=torch.float64, device=self.text_MD.device) for _ in "12")
        if self.diagonal:
            positive_M = self._own_dots().mul_(self.scale.double().reshape(())).add_(self.bias.reshape(()))
            loss_M = -functional.logsigmoid(positive_M)
        for part in self.parts:
            tiles = -(-part.columns // self.tile.BLOCK)
            strips = -(-tiles // STRIP_TILES)
            partial = torch.empty(strips, M, dtype=torch.float32, device=self.text_MD.device)
            vectors, options = self._masks(part)
            _loss_kernel[-(-M // self.tile.BLOCK), strips](
                self.text_MD, self._columns(part), self.scalars, partial, M, part.columns, D, part.diagonal,
                STRIP_TILES, *vectors, **options,
            )  # fmt: skip
            loss_M += partial.sum(0, dtype=torch.float64)
        return loss_M, positive_M

    def gradients(
        self, g_M: Tensor, own_M: Tensor, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """(d text_MD, d image_ND, d scale, d bias): the features' in fp32, the scalars' in fp64."""
        M, D = self.text_MD.shape
        device, block = self.text_MD.device, self.tile.BLOCK
        d_text_MD = torch.zeros(M, D, device=device) if need_text else None
        d_image_ND = torch.zeros(self.image_ND.shape, device=device) if need_image else None
        sums_2M = torch.zeros(2, M, dtype=torch.float64, device=device)
        top = g_M.abs().amax() if M else g_M.new_zeros(())
        share_M1 = (g_M / torch.where(top == 0, 1, top)).float()[:, None]
        height = min(CHUNK, -(-M // block) * block)
        slope = torch.empty(height * CHUNK, dtype=self.text_MD.dtype, device=device)
        for part in self.parts:
            columns_CD = self._columns(part)
            vectors, options = self._masks(part)
            for start in range(0, M, CHUNK):
                rows = slice(start, min(start + CHUNK, M))
                size = rows.stop - start
                # The row's factor goes to the text, not to the slopes: those near 1 would all round alike.
                weighted_RD = (self.text_MD[rows] * share_M1[rows]).to(self.text_MD.dtype) if need_image else None
                for first in range(0, part.columns, CHUNK):
                    cols = slice(first, min(first + CHUNK, part.columns))
                    down, across = -(-size // block), -(-(cols.stop - first) // block)
                    partial = torch.empty(across, 2, CHUNK, dtype=torch.float32, device=device)
                    _slope_kernel[down, across](
                        self.text_MD, columns_CD, self.scalars, slope, partial, start, first, M,
                        part.columns, D, part.diagonal, *vectors, CHUNK=CHUNK, SLOPE_UNIT=SLOPE_UNIT, **options,
                    )  # fmt: skip
                    sums_2M[:, rows] += partial[..., :size].sum(0, dtype=torch.float64)
                    if d_text_MD is not None:
                        self._gather(slope, columns_CD[cols], d_text_MD[rows], (CHUNK, 1))
                    if d_image_ND is not None and weighted_RD is not None and not part.bank:
                        self._gather(slope, weighted_RD, d_image_ND[cols], (1, CHUNK))
        unit = self.scale.double().reshape(()) / SLOPE_UNIT
        if d_text_MD is not None:
            d_text_MD.mul_((g_M * unit).float()[:, None])
        if d_image_ND is not None:
            d_image_ND.mul_(top * unit)
        d_bias, d_scale = ((sums_M * g_M).sum() for sums_M in sums_2M)
        if not self.diagonal:
            return d_text_MD, d_image_ND, d_scale, d_bias
        own_M1 = (own_M * self.scale.double().reshape(())).float()[:, None]
        for start in range(0, M, CHUNK):
            rows = slice(start, min(start + CHUNK, M))
            own = slice(self.offset + start, self.offset + rows.stop)
            if d_text_MD is not None:
                d_text_MD[rows].addcmul_(self.image_ND[own].float(), own_M1[rows])
            if d_image_ND is not None:
                d_image_ND[own].addcmul_(self.text_MD[rows].float(), own_M1[rows])
        return d_text_MD, d_image_ND, d_scale + (own_M * self._own_dots()).sum(), d_bias + own_M.sum()

    def _gather(self, slope: Tensor, features_KD: Tensor, out_RD: Tensor, strides: tuple[int, int]) -> None:
        (rows, D), block = out_RD.shape, self.tile.BLOCK
        _gather_kernel[-(-rows // block), -(-D // block)](
            slope, features_KD, out_RD, rows, len(features_KD), D, *strides, **self.options
        )


# Chunked path


class _Chunked(_Tiles):
    """Losses and gradients by torch, tile by tile; the diagonal apart."""

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, bias: Tensor, cells: _Cells
    ) -> None:
        super().__init__(text_MD, image_ND, bank_QD, scale, cells, False)
        self.bias = bias.detach().to(self.dtype).reshape(())

    def _exponents(self, scaled_RD: Tensor, columns_CD: Tensor, start: int, index: int) -> tuple[Tensor, Tensor | None]:
        """u of a tile, -inf on the diagonal, and the flat indices of its other positives."""
        block = self.blocks[index]
        tile = self._logits(scaled_RD, columns_CD).add_(self.bias)
        masked, extra = self.cells.tile(start, start + len(tile), index)
        self._fill(tile, start, block, masked, -math.inf)
        if extra is not None:
            tile.view(-1)[extra] = -tile.view(-1)[extra]
        return tile, extra

    def losses(self) -> tuple[Tensor, Tensor]:
        """(loss_M, positive_M), fp64; without the own cells where these columns do not hold them."""
        M = len(self.text_MD)
        loss_M, positive_M = self._vector(M), self._vector(M)
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = self._scaled_rows(rows)
            if self.diagonal:
                own_RD = self.image_ND[self.offset + start : self.offset + rows.stop]
                positive_M[rows] = (scaled_RD * own_RD).sum(1, dtype=torch.float64) + self.bias
                loss_M[rows] -= functional.logsigmoid(positive_M[rows])
            for index, block in enumerate(self.blocks):
                tile, _ = self._exponents(scaled_RD, self._columns(block), start, index)
                softened = torch.abs(tile, out=self._spare(tile)).neg_().exp_().log1p_()
                loss_M[rows] += softened.add_(tile.clamp_(min=0)).sum(1)
        return loss_M, positive_M

    def gradients(
        self, g_M: Tensor, own_M: Tensor, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """(d text_MD, d image_ND, d scale, d bias): the features' in the accumulation dtype, the scalars' in fp64."""
        M, D = self.text_MD.shape
        d_text_MD = self._new(M, D).zero_() if need_text else None
        d_image_ND = self._new(*self.image_ND.shape).zero_() if need_image else None
        d_scale, d_bias = self._vector(1).squeeze(0), self._vector(1).squeeze(0)
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            own = slice(self.offset + start, self.offset + rows.stop)
            scaled_RD = self._scaled_rows(rows)
            d_RD = None if d_text_MD is None else d_text_MD[rows]
            for index, block in enumerate(self.blocks):
                columns_CD = self._columns(block)
                tile, extra = self._exponents(scaled_RD, columns_CD, start, index)
                tile.sigmoid_()
                if extra is not None:
                    tile.view(-1)[extra] = -tile.view(-1)[extra]
                tile.mul_(g_M[rows, None].to(self.dtype))
                d_bias += tile.sum(1).sum(dtype=torch.float64)
                if d_RD is not None:
                    d_RD.addmm_(tile, columns_CD)
                if d_image_ND is not None and not block.bank:
                    d_image_ND[block.start : block.stop].addmm_(tile.T, scaled_RD)
            own_R1 = own_M[rows, None].to(self.dtype)
            if d_image_ND is not None and self.diagonal:
                d_image_ND[own].addcmul_(scaled_RD, own_R1)
            if d_RD is not None and self.diagonal:
                d_RD.addcmul_(self.image_ND[own].to(self.dtype), own_R1)
            if d_RD is not None:
                d_scale += (d_RD * self.text_MD[rows]).sum(dtype=torch.float64)
                d_RD.mul_(self.scale)
        if self.diagonal:
            d_bias += own_M.sum()
        return d_text_MD, d_image_ND, d_scale, d_bias


def _walk(
    text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, bias: Tensor, options: _Options
) -> _Triton | _Chunked:
    M, N, Q = len(text_MD), len(image_ND), 0 if bank_QD is None else len(bank_QD)
    if uses_triton(text_MD):
        parts = _parts(text_MD, N, Q, *options.of_cells(), options.offset)
        return _Triton(text_MD, image_ND, bank_QD, scale, bias, parts, options.offset, options.as_positives)
    row_step, blocks = _plan(M, N, Q)
    return _Chunked(
        text_MD, image_ND, bank_QD, scale, bias, _Cells(blocks, options.offset, *options.of_cells(), row_step)
    )


# Operators


@torch.library.custom_op("efficientclip::sigmoid_sums", mutates_args=())
def sigmoid_sums(
    text_MD: Tensor,
    image_ND: Tensor,
    bank_QD: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    ids_KM: Tensor | None,
    ids_KN: Tensor | None,
    bank_ids_Q: Tensor | None,
    excluded_2E: Tensor | None,
    offset: int,
    as_positives: bool,
) -> list[Tensor]:
    """[loss_M, positive_M] in fp64: each row's loss over these columns, and its own logit.

    Row i's own image is `offset` + i; if it is none of these, its cell is left out of `loss_M` and `positive_M` is 0.
    Arguments are as `sigmoid_loss` describes and checks them, with `bank_ids_Q` compared with `ids_KM[0]`.
    """
    options = _Options(ids_KM, ids_KN, bank_ids_Q, excluded_2E, offset, as_positives, False)
    walk = _walk(text_MD, image_ND, bank_QD, scale, bias, options)
    with torch.cuda.device_of(text_MD):
        return [*walk.losses()]


@sigmoid_sums.register_fake
def _(text_MD: Tensor, *_: Any) -> list[Tensor]:
    return [text_MD.new_empty(text_MD.shape[0], dtype=torch.float64) for _ in SIGMOID.fields]


@torch.library.custom_op("efficientclip::sigmoid_gradients", mutates_args=())
def sigmoid_gradients(
    text_MD: Tensor,
    image_ND: Tensor,
    bank_QD: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    ids_KM: Tensor | None,
    ids_KN: Tensor | None,
    bank_ids_Q: Tensor | None,
    excluded_2E: Tensor | None,
    offset: int,
    as_positives: bool,
    positive_M: Tensor,
    grads: list[Tensor],
    need_text: bool,
    need_image: bool,
) -> list[Tensor]:
    """[d text_MD, d image_ND, d scale, d bias]: the features' in fp32 (fp64 for fp64 ones), the scalars' in fp64.

    `grads` are those of `loss_M` and `positive_M`. A gradient that is not needed is empty; d scale needs `need_text`.
    """
    options = _Options(ids_KM, ids_KN, bank_ids_Q, excluded_2E, offset, as_positives, False)
    walk = _walk(text_MD, image_ND, bank_QD, scale, bias, options)
    g_M, g_positive_M = grads
    own_M = g_positive_M - g_M * torch.sigmoid(-positive_M)
    with torch.cuda.device_of(text_MD):
        parts = walk.gradients(g_M, own_M, need_text, need_image)
    return [_or_empty(part, parts[-1]) for part in parts]


@sigmoid_gradients.register_fake
def _(text_MD: Tensor, image_ND: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(2, text_MD, image_ND, *given[-2:])


SIGMOID = Operators(
    sigmoid_sums,
    sigmoid_gradients,
    fields=("loss_M", "positive_M"),
    kept=("positive_M",),
    differentiable=2,
    scalars=2,
    # Nothing is smoothed here.
    options=6,
)
SIGMOID.register_autograd()


# Public function


def sigmoid_loss(
    text_MD: Tensor,
    image_MD: Tensor,
    bank_QD: Tensor | None = None,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    pair_weights: Tensor | None = None,
    positives: Positives = "pair",
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
) -> ContrastiveOutput:
    """SigLIP's loss between the texts and images of all ranks, with a bank of further images.

    Logits are z_ij = logit_scale * <text_i, column_j> + logit_bias, on the features as given (normalise them
    first); columns are the N images of all ranks in rank order, then the Q bank rows. Pair i loses

        sum_j softplus(-y_ij z_ij)

    over the unmasked columns j, with y = +1 for positives and -1 else, and the loss is the mean over the pairs of
    all ranks, weighted by `pair_weights` (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    fp16, bf16 and fp32 on CUDA take Triton kernels (fp32 by 3xTF32, slopes rounded to the features' dtype before
    their products), everything else chunks of torch. Both are deterministic.

    Args:
        text_MD: [M, D] fp16, bf16, fp32 or fp64, D up to 1024; this rank's texts. M may differ between ranks
            or be 0.
        image_MD: [M, D], same dtype; image i belongs to text i. Without `requires_grad` its gradient, and the
            exchange that it needs, are skipped.
        bank_QD: [Q, D], same dtype, constant, the same rows on every rank: more negatives for the texts.
        logit_scale: the multiplier itself, not its logarithm: a number or a tensor of shape () or (1,).
        logit_bias: added to every logit, likewise.
        pair_weights: [M] floats >= 0, constants. A pair of weight 0 costs nothing and its image still is a
            negative of others; if all weights are 0, so are the loss and all gradients.
        positives: "pair": a pair's one positive is its own cell, and cells of equal ids are masked. "ids":
            cells of equal ids are positives too, those of the bank as well.
        image_ids: [M] int64; a cell has equal ids when the image ids of its row and its column agree,
        caption_ids: [M] int64; or when their caption ids agree.
        bank_ids: [Q] int64, image ids of the bank; needs `image_ids`. Without it no bank cell has equal ids.
        excluded: (rows, columns), two int64 tensors [E]; row in [0, M), column in [0, N + Q). These cells are
            masked, except where they are positives.
        group: the ranks that share the batch, each of which must call; None means this process alone.
        exchange: how images reach other ranks: "gather" holds those of all ranks at once; "ring" passes them from
            rank to rank while it computes, with no more than two ranks' images held, for batches whose N x D is
            too much. The numbers are the same up to rounding.

    Compiles without a graph break (`group=None`). It does not read values then: that `pair_weights` are finite and
    >= 0 and `excluded` is in range is up to the caller.

    Returns:
        ContrastiveOutput in fp32 (fp64 for fp64 features); `per_pair_loss_M` and `positive_logit_M` are
        detached. A row without negatives keeps its positives' loss. The loss is the same on all ranks.
        Gradients are W times this rank's share of it, so that the mean over W ranks which data parallelism
        takes is the gradient of one rank holding the whole batch. Second derivatives are not supported.

    Raises:
        TypeError, ValueError: before any compute, an argument of the wrong kind, shape, device, dtype or
        range.
    """
    agreed = _require_arguments(
        text_MD, image_MD, bank_QD, logit_scale, logit_bias, image_ids, caption_ids, bank_ids, excluded,
        pair_weights, positives, group, exchange,
    )  # fmt: skip
    M, Q = len(text_MD), 0 if bank_QD is None else len(bank_QD)

    device = text_MD.device
    ranks = _Ranks(group, M, agreed, device)
    _require_excluded_range(excluded, M, ranks.total + Q)
    options = _options(ranks, image_ids, caption_ids, bank_ids, excluded, positives == "ids")
    scalars = [_as_scalar(value, device) for value in (logit_scale, 0.0 if logit_bias is None else logit_bias)]
    loss_M, positive_M = sums_of_all(SIGMOID, text_MD, image_MD, bank_QD, scalars, options, ranks, exchange)

    weights_M = torch.ones_like(positive_M) if pair_weights is None else pair_weights.detach().double()
    losses_N, weights_N = ranks.gather_rows(torch.stack([loss_M, weights_M], 1).detach()).unbind(1)
    total = weights_N.sum()
    losses_N = ranks.place(loss_M, losses_N)
    loss = (weights_N * losses_N).sum() / torch.where(total > 0, total, 1)
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    return ContrastiveOutput(
        _ScaleGradient.apply(loss, ranks.world).to(dtype), loss_M.detach().to(dtype), positive_M.detach().to(dtype)
    )
