"""The tiles of both losses in plain torch, for every device and dtype: no M x N matrix, nothing of it kept.

Cost model, for M texts on this rank, N images of all ranks, Q bank rows and width D:

- compute: 4 products of M (N + Q) D multiply-adds, one in forward and three in backward (the recompute, d text,
  d image), 3 when images are frozen. 2 for columns that have no slopes of their own, those of a bank, or of frozen
  images in a loss from text to image alone: forward makes what they add to d text, a mean weighted by the softmax.
  `sigmoid_loss` makes its gradients in forward where they are wanted, from the same logits: 3, 2 when images are
  frozen, 1 where nothing is wanted.
  A logit of `contrastive_loss` costs one exponential a pass, two where logits spread too far; one of `sigmoid_loss`
  an exponential and a logarithm, with gradients an exponential and a division more. The bank's logits yield no
  d image.
- memory beside the inputs: two tiles of `TILE_LOGITS` logits, vectors of length M + N, the equal ids of one tile, fp32
  M x D for d text and fp32 N x D for d image; for half-precision features also one block of columns in fp32.

The diagonal (each pair's own logit) never enters a sum over a tile: its share is added from the pairs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .contract import (
    ContrastiveGrads,
    ContrastiveKept,
    ContrastiveSums,
    Options,
    SigmoidSums,
    accumulated,
)

# 2 MB in fp32: a tile and the block of columns that it is made of stay in a core's own cache.
TILE_LOGITS = 1 << 19
TILE_ROWS = 1024

# A tile shifted by one constant is trusted when its sums lie in this range: no term overflowed, and those
# that underflowed (below e^-87 in fp32) are at most C * 2^-46 of any sum.
SUM_RANGE = (2.0**-80, 1e34)
# In backward one exponential serves p_row and p_col while all log-sum-exps lie this near the shift.
SHIFT_REACH = 40.0


@dataclass(frozen=True)
class _Block:
    """Columns [start, stop) of the batch or of the bank; `first` is the global index of the first one."""

    start: int
    stop: int
    first: int
    bank: bool


def _plan(rows: int, columns: int, bank: int) -> tuple[int, list[_Block]]:
    """Rows a tile and the blocks of columns: no block holds both batch and bank."""
    row_step = max(1, min(TILE_ROWS, rows))
    # Few rows do not make blocks ever wider: a block may be held in fp32.
    width = max(1, TILE_LOGITS // max(row_step, TILE_ROWS // 2))
    blocks = [_Block(at, min(at + width, columns), at, False) for at in range(0, columns, width)]
    blocks += [_Block(at, min(at + width, bank), columns + at, True) for at in range(0, bank, width)]
    return row_step, blocks


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    values, order = ids.contiguous().sort(stable=True)
    return values, order


class _Cells:
    """The cells of each tile that are no plain negatives: masked ones, and positives beside the diagonal.

    Equal ids are joined by sorting, tile by tile: the lists are as long as there are equal pairs in the tile.
    The diagonal's cell of row i is in column `offset` + i, and nowhere if there is no such column.
    """

    def __init__(self, options: Options, blocks: Sequence[_Block], row_step: int) -> None:
        self.blocks, self.offset, self.row_step = blocks, options.offset, row_step
        self.as_positives = options.as_positives
        self.rows_M: Sequence[Tensor] = () if options.ids_KM is None else [*options.ids_KM]
        columns_N = () if options.ids_KN is None else [*options.ids_KN]
        self.sorted: list[list[tuple[Tensor, Tensor]]] = []
        for block in blocks:
            sources: Sequence[Tensor] = columns_N
            if block.bank:
                sources = [] if options.bank_ids_Q is None else [options.bank_ids_Q]
            self.sorted.append([_sorted(ids[block.start : block.stop]) for ids in sources])
        self.excluded: tuple[Tensor, Tensor] | None = None
        excluded = options.excluded_2E
        if excluded is not None and excluded.shape[1]:
            rows, columns = (part.contiguous() for part in excluded)
            firsts = torch.tensor([block.first for block in blocks], device=rows.device)
            tile = (rows // row_step) * len(blocks) + torch.searchsorted(firsts, columns, right=True) - 1
            tile, order = tile.sort(stable=True)
            self.excluded = rows[order], columns[order]
            self.tile_E, self.bounds_of, self.bounds = tile, -1, [0]

    def _bounds(self, step: int) -> list[int]:
        """Where the excluded cells of each tile of these rows begin in the list."""
        if step != self.bounds_of:
            first = step * len(self.blocks)
            tiles = torch.arange(first, first + len(self.blocks) + 1, device=self.tile_E.device)
            self.bounds_of, self.bounds = step, torch.searchsorted(self.tile_E, tiles).tolist()
        return self.bounds

    @property
    def empty(self) -> bool:
        return self.excluded is None and not any(self.sorted)

    def tile(self, start: int, stop: int, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Flat indices into the tile of rows [start, stop) and block `index`: masked ones, positive ones."""
        if self.empty:
            return None, None
        block = self.blocks[index]
        width = block.stop - block.start
        diagonal = block.first - self.offset - start
        same: Tensor | None = None
        joined = []
        for rows, columns in zip(self.rows_M, self.sorted[index], strict=False):
            ids, order = columns
            low = torch.searchsorted(ids, rows[start:stop])
            count = torch.searchsorted(ids, rows[start:stop], right=True) - low
            row = torch.arange(stop - start, device=ids.device).repeat_interleave(count)
            begin = (low - count.cumsum(0) + count).repeat_interleave(count)
            column = order[begin + torch.arange(len(row), device=ids.device)]
            off = row != column + diagonal
            joined.append((row * width + column)[off])
        if joined:
            same = joined[0] if len(joined) == 1 else torch.cat(joined).unique()
        left_out: Tensor | None = None
        if self.excluded is not None:
            low_at, high_at = self._bounds(start // self.row_step)[index : index + 2]
            row = self.excluded[0][low_at:high_at] - start
            column = self.excluded[1][low_at:high_at] - block.first
            left_out = (row * width + column)[row != column + diagonal].unique()
        if self.as_positives:
            if left_out is not None and same is not None:
                left_out = left_out[~torch.isin(left_out, same)]
            return left_out, same
        if left_out is None or same is None:
            return (same if left_out is None else left_out), None
        return torch.cat([same, left_out]).unique(), None


class _Tiles:
    """Walks the logits tile by tile, in buffers that all tiles share: autocast leaves such products alone."""

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: Options
    ) -> None:
        self.dtype = accumulated(text_MD.dtype)
        self.text_MD = text_MD
        self.scale = scale.detach().to(self.dtype).reshape(())
        # Features in the accumulation dtype are used where they lie; a product wants them contiguous.
        self.image_ND = image_ND.contiguous() if image_ND.dtype == self.dtype else image_ND
        self.bank_QD = bank_QD.contiguous() if bank_QD is not None and bank_QD.dtype == self.dtype else bank_QD
        M, N, Q = len(text_MD), len(image_ND), 0 if bank_QD is None else len(bank_QD)
        self.row_step, self.blocks = _plan(M, N, Q)
        self.cells = _Cells(options, self.blocks, self.row_step)
        self.offset = options.offset
        self.diagonal = 0 <= self.offset <= N - M
        widest = max((block.stop - block.start for block in self.blocks), default=0)
        tallest = min(self.row_step, M)
        self.buffers = [self._new(tallest * widest) for _ in range(2)] + [self._new(tallest * text_MD.shape[1])]
        self.scaled_RD = self._new(tallest, text_MD.shape[1])
        dtypes = {image_ND.dtype, image_ND.dtype if bank_QD is None else bank_QD.dtype}
        self.columns_CD = self._new(widest if dtypes != {self.dtype} else 0, text_MD.shape[1])

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.text_MD.device)

    def _vector(self, size: int, fill: float = 0.0) -> Tensor:
        return torch.full((size,), fill, dtype=torch.float64, device=self.text_MD.device)

    def _columns(self, block: _Block) -> Tensor:
        source = self.bank_QD if block.bank else self.image_ND
        if source is None:
            raise RuntimeError("a bank block without a bank")
        chunk = source[block.start : block.stop]
        return chunk if source.dtype == self.dtype else self.columns_CD[: len(chunk)].copy_(chunk)

    def _scaled_rows(self, rows: slice) -> Tensor:
        # Converted before the multiplication: a 0-dim scale would not widen a bf16 product.
        return self.scaled_RD[: rows.stop - rows.start].copy_(self.text_MD[rows]).mul_(self.scale)

    def _logits(self, scaled_RD: Tensor, columns_CD: Tensor) -> Tensor:
        rows, width = len(scaled_RD), len(columns_CD)
        tile = self.buffers[0][: rows * width].view(rows, width)
        return torch.mm(scaled_RD, columns_CD.T, out=tile)

    def _spare(self, tile: Tensor) -> Tensor:
        return self.buffers[1][: tile.numel()].view_as(tile)

    def _fill(self, tile: Tensor, start: int, block: _Block, masked: Tensor | None, value: float) -> None:
        """Sets the diagonal's cells and the masked ones."""
        diagonal = start + self.offset - block.first
        if not block.bank and -len(tile) < diagonal < tile.shape[1]:
            tile.diagonal(diagonal).fill_(value)
        if masked is not None:
            tile.view(-1).index_fill_(0, masked, value)

    def _gradients(self, need_text: bool, need_image: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Zeros for d text_MD and d image_ND in the accumulation dtype, and for d scale in fp64."""
        d_text_MD = self._new(*self.text_MD.shape).zero_() if need_text else None
        d_image_ND = self._new(*self.image_ND.shape).zero_() if need_image else None
        return d_text_MD, d_image_ND, self._vector(1).squeeze(0)

    def _close_rows(
        self, rows: slice, d_RD: Tensor | None, d_image_ND: Tensor | None, scaled_RD: Tensor, own_M: Tensor
    ) -> Tensor | float:
        """Adds the own cells' slopes to rows whose tiles are done, and turns d z text into d text; d scale."""
        own = slice(self.offset + rows.start, self.offset + rows.stop)
        own_R1 = own_M[rows, None].to(self.dtype)
        # A product and a sum: with a column, `addcmul` takes ten times as long.
        spare_RD = self.buffers[2][: scaled_RD.numel()].view_as(scaled_RD)
        if d_image_ND is not None and self.diagonal:
            d_image_ND[own].add_(torch.mul(scaled_RD, own_R1, out=spare_RD))
        if d_RD is None:
            return 0.0
        if self.diagonal:
            d_RD.add_(spare_RD.copy_(self.image_ND[own]).mul_(own_R1))
        slope_R = self._new(len(d_RD))
        torch.linalg.vecdot(d_RD, spare_RD.copy_(self.text_MD[rows]), out=slope_R)
        d_RD.mul_(self.scale)
        return slope_R.sum(dtype=torch.float64)


class _LogSumExps:
    """Log-sum-exps [n] in fp64, and the means [n, D] of what belongs to each term, weighted by it, if asked for.

    Tiles add sums of exp(z - shift) while the shift is the same; `fold` brings those to what was before.
    """

    def __init__(self, n: int, like: Tensor, D: int | None = None) -> None:
        self.lse = torch.full((n,), -math.inf, dtype=torch.float64, device=like.device)
        self.sums, self.shift, self.added = torch.zeros_like(self.lse), 0.0, False
        self.mean: Tensor | None = None if D is None else like.new_zeros(n, D)
        self.total: Tensor | None = None if D is None else like.new_zeros(n, D)

    def add(
        self, at: slice, sums: Tensor, shift: float, e_RC: Tensor | None = None, columns_CD: Tensor | None = None
    ) -> None:
        if shift != self.shift:
            self.fold()
            self.shift = shift
        self.sums[at] += sums
        self.added = True
        if self.total is not None and e_RC is not None and columns_CD is not None:
            self.total.addmm_(e_RC, columns_CD)

    def fold(self) -> None:
        if not self.added:
            return
        mean = None if self.total is None else self.total / self.sums[:, None].to(self.total.dtype)
        self.merge(slice(None), self.sums.log().add_(self.shift), mean)
        self.sums.zero_()
        self.added = False
        if self.total is not None:
            self.total.zero_()

    def merge(self, at: slice, lse: Tensor, mean: Tensor | None) -> None:
        before = self.lse[at]
        both = torch.logaddexp(before, lse)
        if self.mean is not None and mean is not None:
            # Of nothing there is no mean: exp(-inf - -inf) is NaN.
            old, new = ((part - both).exp().nan_to_num_(0.0)[:, None].to(mean.dtype) for part in (before, lse))
            self.mean[at] = self.mean[at] * old + mean * new
        self.lse[at] = both


class ChunkedContrastive(_Tiles):
    """Sums and gradients of `contrastive_loss`."""

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: Options
    ) -> None:
        super().__init__(text_MD, image_ND, bank_QD, scale, options)
        self.smooth, self.one_way, self.made_in_forward = options.smooth, options.one_way, options.made_in_forward

    def _once(self, block: _Block) -> bool:
        """Whether forward makes this block's share of d text, so that backward needs it no more."""
        return self.made_in_forward > (0 if block.bank else 1)

    def forward(self) -> ContrastiveSums:
        M, N, D = len(self.text_MD), len(self.image_ND), self.text_MD.shape[1]
        positive_M, row_lse_M = self._vector(M), self._vector(M, -math.inf)
        of_columns = _LogSumExps(N, self.scale)
        row_masked_M, col_masked_N, row_extras_M, col_extras_N = (self._vector(n) for n in (M, N, M, N))
        row_extra_M = col_extra_N = row_logits_M = col_logits_N = row_mean_MD = None
        if self.cells.as_positives:
            row_extra_M, col_extra_N = self._vector(M), self._vector(N)
        if self.smooth:
            row_logits_M, col_logits_N = self._vector(M), self._vector(N)
        if self.made_in_forward:
            row_mean_MD = self._new(M, D)
        shift = 0.0
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = self._scaled_rows(rows)
            if self.diagonal:
                own_RD = self.image_ND[self.offset + start : self.offset + rows.stop]
                positive_M[rows] = (scaled_RD * own_RD).sum(1, dtype=torch.float64)
            of_rows = _LogSumExps(len(scaled_RD), self.scale)
            once = _LogSumExps(len(scaled_RD), self.scale, D) if self.made_in_forward else of_rows
            for index, block in enumerate(self.blocks):
                cols = None if block.bank else slice(block.start, block.stop)
                columns_CD = self._columns(block)
                tile = self._logits(scaled_RD, columns_CD)
                masked, extra = self.cells.tile(start, rows.stop, index)
                if masked is not None:
                    _count(masked, tile, row_masked_M[rows], None if cols is None else col_masked_N[cols])
                if extra is not None and row_extra_M is not None and col_extra_N is not None:
                    _count(extra, tile, row_extras_M[rows], None if cols is None else col_extras_N[cols])
                    values = tile.view(-1)[extra].double()
                    row_extra_M[rows].index_add_(0, extra // tile.shape[1], values)
                    if cols is not None:
                        col_extra_N[cols].index_add_(0, extra % tile.shape[1], values)
                if row_logits_M is not None and col_logits_N is not None:
                    self._fill(tile, start, block, masked, 0.0)
                    row_logits_M[rows] += tile.sum(1)
                    if cols is not None:
                        col_logits_N[cols] += tile.sum(0)
                self._fill(tile, start, block, masked, -math.inf)
                here = once if self._once(block) else of_rows
                there = None if cols is None or self.one_way else (of_columns, cols)
                if not self.one_exponential(tile, shift, columns_CD, here, there):
                    tile = self._logits(scaled_RD, columns_CD)
                    self._fill(tile, start, block, masked, -math.inf)
                    shift = self.two_exponentials(tile, shift, columns_CD, here, there)
            of_rows.fold()
            row_lse_M[rows] = of_rows.lse
            if row_mean_MD is not None and once.mean is not None:
                once.fold()
                row_lse_M[rows] = torch.logaddexp(of_rows.lse, once.lse)
                share_R = (once.lse - row_lse_M[rows]).exp().nan_to_num_(0.0)
                torch.mul(once.mean, share_R[:, None].to(self.dtype), out=row_mean_MD[rows])
        of_columns.fold()
        return ContrastiveSums(
            positive_M, row_lse_M, of_columns.lse, row_extra_M, col_extra_N, row_logits_M, col_logits_N,
            row_masked_M, col_masked_N, row_extras_M, col_extras_N, row_mean_MD,
        )  # fmt: skip

    def one_exponential(
        self,
        tile: Tensor,
        shift: float,
        columns_CD: Tensor,
        of_rows: _LogSumExps,
        of_columns: tuple[_LogSumExps, slice] | None,
    ) -> bool:
        """Adds the tile to its rows and columns by one e = exp(z - shift); False, and nothing added, where unsafe."""
        e = (tile.sub_(shift) if shift else tile).exp_()
        sums = [e.sum(1), e.sum(0)] if of_columns is not None else [e.sum(1)]
        low = min(float(s.min()) for s in sums)
        high = max(float(s.max()) for s in sums)
        # Written so that a NaN is unsafe too.
        if not (low >= SUM_RANGE[0] and high <= SUM_RANGE[1]):
            return False
        of_rows.add(slice(None), sums[0], shift, e, columns_CD)
        if of_columns is not None:
            all_columns, cols = of_columns
            all_columns.add(cols, sums[1], shift)
        return True

    def two_exponentials(
        self,
        tile: Tensor,
        shift: float,
        columns_CD: Tensor,
        of_rows: _LogSumExps,
        of_columns: tuple[_LogSumExps, slice] | None,
    ) -> float:
        """The same for any logits, by each row's and each column's own maximum; the shift for the tiles that follow."""

        def lse(dim: int, out: Tensor) -> tuple[Tensor, Tensor]:
            top = tile.amax(dim, keepdim=True)
            top.masked_fill_(top == -math.inf, 0)
            total = torch.sub(tile, top, out=out).exp_().sum(dim)
            return total.double().log().add_(top.squeeze(dim)), total

        e = self._spare(tile)
        row, total_R = lse(1, e)
        # A row that has any term has its greatest, 1.
        mean = None if of_rows.mean is None else torch.mm(e, columns_CD, out=torch.empty_like(of_rows.mean))
        if mean is not None:
            mean /= total_R.clamp(min=1)[:, None]
        of_rows.merge(slice(None), row, mean)
        seen = row
        if of_columns is not None:
            all_columns, cols = of_columns
            col, _ = lse(0, tile)
            all_columns.merge(cols, col, None)
            seen = torch.cat([row, col])
        low, high = _reach(seen)
        return _shift(low, high) if low <= high else shift

    def backward(
        self, sums: ContrastiveKept, grads: ContrastiveGrads, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(d text_MD, d image_ND, d scale): the features' in the accumulation dtype; d text also serves d scale."""
        M = len(self.text_MD)
        d_text_MD, d_image_ND, d_scale = self._gradients(need_text, need_image)
        slopes = _Slopes(sums, grads, self.dtype)
        walked = [(index, block) for index, block in enumerate(self.blocks) if not self._once(block)]
        reach_rows = [_reach(part) for part in sums.row_lse_M.split(self.row_step)] if walked else []
        nothing = sums.col_lse_N[:0]
        reach_cols = {
            index: _reach(nothing if block.bank or self.one_way else sums.col_lse_N[block.start : block.stop])
            for index, block in walked
        }
        for at, start in enumerate(range(0, M, self.row_step)):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = self._scaled_rows(rows)
            d_RD = None if d_text_MD is None else d_text_MD[rows]
            if d_RD is not None and sums.row_mean_MD is not None:
                torch.mul(sums.row_mean_MD[rows], grads.row_lse_M[rows, None].to(self.dtype), out=d_RD)
            for index, block in walked:
                columns_CD = self._columns(block)
                tile = self._logits(scaled_RD, columns_CD)
                masked, extra = self.cells.tile(start, rows.stop, index)
                self._fill(tile, start, block, masked, -math.inf)
                low = min(reach_rows[at][0], reach_cols[index][0])
                high = max(reach_rows[at][1], reach_cols[index][1])
                cols = None if block.bank or self.one_way else slice(block.start, block.stop)
                slopes.weigh(tile, self._spare(tile), rows, cols, low, high)
                if grads.row_logits_M is not None and grads.col_logits_N is not None:
                    tile.add_(grads.row_logits_M[rows, None].to(self.dtype))
                    if not block.bank:
                        tile.add_(grads.col_logits_N[block.start : block.stop].to(self.dtype))
                    self._fill(tile, start, block, masked, 0.0)
                if extra is not None and grads.row_extra_M is not None and grads.col_extra_N is not None:
                    values = grads.row_extra_M[rows][extra // tile.shape[1]]
                    if not block.bank:
                        values = values + grads.col_extra_N[block.start : block.stop][extra % tile.shape[1]]
                    tile.view(-1).index_add_(0, extra, values.to(self.dtype))
                if d_RD is not None:
                    d_RD.addmm_(tile, columns_CD)
                if d_image_ND is not None and not block.bank:
                    d_image_ND[block.start : block.stop].addmm_(tile.T, scaled_RD)
            d_scale += self._close_rows(rows, d_RD, d_image_ND, scaled_RD, grads.positive_M)
        return d_text_MD, d_image_ND, d_scale


class _Slopes:
    """What logits are turned into in backward: g_row p_row + g_col p_col."""

    def __init__(self, sums: ContrastiveKept, grads: ContrastiveGrads, dtype: torch.dtype) -> None:
        self.sums, self.grads, self.dtype = sums, grads, dtype
        self.shift: float | None = None

    def weigh(self, tile: Tensor, spare: Tensor, rows: slice, cols: slice | None, low: float, high: float) -> None:
        """In place; the tile's log-sum-exps lie from `low` to `high`. `cols` is None where no column has a slope."""
        sums, grads = self.sums, self.grads
        if low >= high - 2 * SHIFT_REACH:
            shift = _shift(low, high)
            if shift != self.shift:
                self.row_M = _scaled(grads.row_lse_M, sums.row_lse_M, shift, self.dtype)
                self.col_N = _scaled(grads.col_lse_N, sums.col_lse_N, shift, self.dtype)
                self.shift = shift
            e = (tile.sub_(shift) if shift else tile).exp_()
            factor_R1 = self.row_M[rows, None]
            e.mul_(factor_R1 if cols is None else torch.add(factor_R1, self.col_N[cols], out=spare))
            return
        row_lse, g_row = _rounded(sums.row_lse_M[rows], grads.row_lse_M[rows], self.dtype)
        if cols is None:
            tile.sub_(row_lse[:, None]).exp_().mul_(g_row[:, None])
            return
        col_lse, g_col = _rounded(sums.col_lse_N[cols], grads.col_lse_N[cols], self.dtype)
        by_col = torch.sub(tile, col_lse, out=spare).exp_().mul_(g_col)
        tile.sub_(row_lse[:, None]).exp_().mul_(g_row[:, None]).add_(by_col)


def _count(flat: Tensor, tile: Tensor, row_R: Tensor, col_C: Tensor | None) -> None:
    row_R += torch.bincount(flat // tile.shape[1], minlength=tile.shape[0])
    if col_C is not None:
        col_C += torch.bincount(flat % tile.shape[1], minlength=tile.shape[1])


def _rounded(lse: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-sum-exps in `dtype`, and gradients that make up for their rounding: at 100 that is 4e-6 of every p."""
    # -inf where everything was masked, and so are the logits.
    lse = lse.masked_fill(lse == -math.inf, 0)
    rounded = lse.to(dtype)
    return rounded, (grad * (rounded - lse).exp()).to(dtype)


def _scaled(grad: Tensor, lse: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """grad * exp(shift - lse), 0 where everything was masked."""
    return torch.where(lse == -math.inf, 0, grad * (shift - lse).exp()).to(dtype)


def _reach(lse: Tensor) -> tuple[float, float]:
    """The least and the greatest log-sum-exp of those that are not masked out; NaN if one is NaN."""
    real = lse[lse != -math.inf]
    return (float(real.min()), float(real.max())) if len(real) else (math.inf, -math.inf)


def _shift(low: float, high: float) -> float:
    """A constant amid log-sum-exps, 0 near 0; exact in fp32, as it leaves tiles in fp32 and comes back in fp64."""
    return 0.0 if max(high, -low) <= SHIFT_REACH else float(torch.tensor((low + high) / 2, dtype=torch.float32))


class ChunkedSigmoid(_Tiles):
    """Losses and gradients of `sigmoid_loss`, in one pass.

    With u = -y z, y = +1 for positives and -1 else, a cell loses softplus(u) and its slope is -y sigmoid(u): both keep
    their relative precision however small they are. A masked cell has u = -inf.
    """

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
        super().__init__(text_MD, image_ND, bank_QD, scale, options)
        self.bias = bias.detach().to(self.dtype).reshape(())
        self.share_M, self.made_in_forward = share_M, options.made_in_forward

    def _exponents(self, scaled_RD: Tensor, columns_CD: Tensor, start: int, index: int) -> tuple[Tensor, Tensor | None]:
        """u of a tile, -inf on the diagonal, and the flat indices of its other positives."""
        block = self.blocks[index]
        tile = self._logits(scaled_RD, columns_CD).add_(self.bias)
        masked, extra = self.cells.tile(start, start + len(tile), index)
        self._fill(tile, start, block, masked, -math.inf)
        if extra is not None:
            tile.view(-1)[extra] = -tile.view(-1)[extra]
        return tile, extra

    def forward(self) -> SigmoidSums:
        """With the gradients that the options ask for: a slope needs no more than its logit and the pair's share."""
        M, made = len(self.text_MD), self.made_in_forward
        loss_M, positive_M, own_M = (self._vector(M) for _ in range(3))
        d_text_MD, d_image_ND, d_scale = self._gradients(bool(made & 1), bool(made & 2))
        d_bias = self._vector(1).squeeze(0)
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = self._scaled_rows(rows)
            share_R1 = self.share_M[rows, None].to(self.dtype)
            d_RD = None if d_text_MD is None else d_text_MD[rows]
            if self.diagonal:
                own_RD = self.image_ND[self.offset + start : self.offset + rows.stop]
                positive_M[rows] = (scaled_RD * own_RD).sum(1, dtype=torch.float64) + self.bias
                loss_M[rows] -= functional.logsigmoid(positive_M[rows])
                own_M[rows] -= self.share_M[rows] * torch.sigmoid(-positive_M[rows])
            for index, block in enumerate(self.blocks):
                columns_CD = self._columns(block)
                tile, extra = self._exponents(scaled_RD, columns_CD, start, index)
                spare = self._spare(tile)
                loss_M[rows] += torch.abs(tile, out=spare).neg_().exp_().log1p_().sum(1)
                loss_M[rows] += torch.clamp(tile, min=0, out=spare).sum(1)
                if not made:
                    continue
                tile.sigmoid_()
                if extra is not None:
                    tile.view(-1)[extra] = -tile.view(-1)[extra]
                tile.mul_(share_R1)
                d_bias += tile.sum(1).sum(dtype=torch.float64)
                if d_RD is not None:
                    d_RD.addmm_(tile, columns_CD)
                if d_image_ND is not None and not block.bank:
                    d_image_ND[block.start : block.stop].addmm_(tile.T, scaled_RD)
            if made:
                d_scale += self._close_rows(rows, d_RD, d_image_ND, scaled_RD, own_M)
        d_bias += own_M.sum()
        of_scalars = (d_scale, d_bias) if made else (None, None)
        return SigmoidSums((self.share_M * loss_M).sum(), loss_M, positive_M, d_text_MD, d_image_ND, *of_scalars)
