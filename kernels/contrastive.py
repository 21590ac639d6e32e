"""Symmetric InfoNCE (CLIP) over a batch, a bank of extra images and any number of ranks, without an M x N matrix.

Cost model, for M texts on this rank, N images of all ranks, Q bank rows and width D:

- compute: 4 products of M (N + Q) D multiply-adds, 1 in forward and 3 in backward (the recompute, d text, d image);
  3 products when the images are frozen. Each logit costs one exponential a pass, two where logits spread too far.
- memory beside the inputs: two tiles of `TILE_LOGITS` logits, vectors of length M + N, one fp32 M x D for d text,
  and one fp32 N x D for d image when images train.
- exchange a rank: N images in their own dtype and about 4 N + 2 M numbers in forward, nothing in backward when
  images are frozen, else a reduce-scatter of N x D fp32.

Shapes: M this rank's pairs, N pairs of all ranks, Q bank rows, D width, R x C one tile; W ranks.

The diagonal (each pair's own logit) never enters a log-sum-exp. With n = log-sum-exp of a row's other logits and z its
own logit, the loss is softplus(n - z) and its slope sigmoid(n - z): both keep full precision where p - 1 would cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Positives = Literal["pair", "ids"]

# A tile of 2M logits is 8 MB in fp32: it stays in the last-level cache between the product and the passes over it.
TILE_LOGITS = 1 << 21
TILE_ROWS = 512

# A tile shifted by one constant is trusted when its sums lie in this range: terms that underflowed (below e^-87 in
# fp32) are then at most N * 2^-46 of any sum, and no term overflowed.
SUM_RANGE = (2.0**-80, 1e34)
# The same for backward, where p_row and p_col come from one exponential: half the allowed spread of log-sum-exps.
SHIFT_REACH = 40.0


class ContrastiveOutput(NamedTuple):
    """What `contrastive_loss` returns: fp32, or fp64 for fp64 features."""

    loss: Tensor
    """0-dim, differentiable, the same value on every rank."""
    per_pair_loss_M: Tensor
    """Unweighted loss of this rank's pairs, both directions combined; detached."""
    positive_logit_M: Tensor
    """logit_scale * <text_i, image_i> + logit_bias of this rank's pairs; detached."""


# Naive reference


def contrastive_loss_naive(
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
    label_smoothing: float = 0.0,
    direction_weights: tuple[float, float] = (0.5, 0.5),
) -> ContrastiveOutput:
    """The definition of `contrastive_loss` on one rank: the whole matrix, plain torch, autograd, nothing else."""
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    M, device = len(text_MD), text_MD.device
    columns = image_MD if bank_QD is None else torch.cat([image_MD, bank_QD])
    bias = 0.0 if logit_bias is None else logit_bias
    logits = logit_scale * (text_MD.to(dtype) @ columns.to(dtype).T) + bias

    own = torch.eye(M, len(columns), dtype=torch.bool, device=device)
    same = own.clone()
    if image_ids is not None:
        same[:, :M] |= image_ids[:, None] == image_ids
        if bank_ids is not None:
            same[:, M:] |= image_ids[:, None] == bank_ids
    if caption_ids is not None:
        same[:, :M] |= caption_ids[:, None] == caption_ids
    positive = same if positives == "ids" else own
    masked = torch.zeros_like(own) if positives == "ids" else same
    if excluded is not None:
        masked = masked.index_put(excluded, torch.tensor(True, device=device))
    kept = ~masked | positive

    def direction(logits: Tensor, kept: Tensor, positive: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.masked_fill(~kept, -math.inf), dim=1).masked_fill(~kept, 0)
        target = (1 - label_smoothing) * positive.to(dtype) / positive.sum(1, keepdim=True)
        target = target + label_smoothing * kept.to(dtype) / kept.sum(1, keepdim=True)
        return torch.where((kept & ~positive).any(1), -(target * log_p).sum(1), 0)

    row_loss = direction(logits, kept, positive)
    col_loss = direction(logits[:, :M].T, kept[:, :M].T, positive[:, :M].T)
    pair_loss = direction_weights[0] * row_loss + direction_weights[1] * col_loss
    weights = torch.ones(M, dtype=dtype, device=device) if pair_weights is None else pair_weights.to(dtype)
    total = weights.sum()
    loss = (weights * pair_loss).sum() / torch.where(total > 0, total, 1)
    return ContrastiveOutput(loss, pair_loss.detach(), logits.diagonal()[:M].detach().clone())


# Exchange over ranks


class _Ranks:
    """Where this rank's pairs lie in the global batch, and the exchanges the loss needs; `group=None` is one rank."""

    def __init__(self, group: dist.ProcessGroup | None, agreed: dict[str, int], size: int, device: torch.device) -> None:
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sizes = [size]
        if group is not None:
            mine = torch.tensor([size, *agreed.values()], dtype=torch.int64, device=device)
            seen = self.gather(mine).tolist()
            for at, name in enumerate(agreed, start=1):
                if len({row[at] for row in seen}) > 1:
                    raise ValueError(
                        f"{name} differs between ranks: {[row[at] for row in seen]} in rank order; "
                        "call contrastive_loss with the same kind of arguments on every rank"
                    )
            self.sizes = [row[0] for row in seen]
        self.total = sum(self.sizes)
        self.offset = sum(self.sizes[: self.rank])
        self.own = slice(self.offset, self.offset + size)

    def gather(self, flat: Tensor) -> Tensor:
        """The equally long tensors of all ranks, stacked: [W, *shape]."""
        if self.group is None:
            return flat[None]
        out = torch.empty(self.world * flat.numel(), dtype=flat.dtype, device=flat.device)
        dist.all_gather_into_tensor(out, flat.reshape(-1), group=self.group)
        return out.view(self.world, *flat.shape)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order: [N, ...]; ranks may hold different numbers of rows."""
        if self.group is None:
            return rows
        padded = rows.new_zeros((max(self.sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = self.gather(padded)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])

    def with_own(self, own_M: Tensor) -> Tensor:
        """The vectors of all ranks in rank order, [N]; this rank's part keeps its gradient."""
        if self.group is None:
            return own_M
        all_N = self.gather_rows(own_M.detach())
        return torch.cat([all_N[: self.own.start], own_M, all_N[self.own.stop :]])

    def joined(self, lse_N: Tensor) -> Tensor:
        """Global column log-sum-exps from this rank's; the gradient is this rank's share."""
        if self.group is None:
            return lse_N
        joined: Tensor = _JoinColumns.apply(lse_N, self.gather(lse_N.detach()))
        return joined

    def summed(self, own: Tensor | None) -> Tensor | None:
        """The sum over ranks; the gradient is this rank's share."""
        if self.group is None or own is None:
            return own
        return _replace_value(self.gather(own.detach()).sum(0), own)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Sums [N, ...] over the ranks and returns this rank's rows of the sum."""
        if self.group is None:
            return rows
        longest = max(self.sizes)
        padded = rows.new_zeros((self.world, longest, *rows.shape[1:]))
        for part, own in zip(padded, rows.split(self.sizes), strict=True):
            part[: len(own)] = own
        out = rows.new_empty((longest, *rows.shape[1:]))
        dist.reduce_scatter_tensor(out, padded.flatten(0, 1), group=self.group)
        return out[: self.sizes[self.rank]]


# Chunked path


@dataclass(frozen=True)
class _Block:
    """Columns [start, stop) of the batch or of the bank; `first` is the global index of the first one."""

    start: int
    stop: int
    first: int
    bank: bool


class _Cells:
    """The cells of each tile that are no plain negatives: masked ones, and positives beside the diagonal.

    Equal ids are joined by sorting, tile by tile: the lists are as long as there are equal pairs in the tile.
    """

    def __init__(
        self,
        blocks: Sequence[_Block],
        ranks: _Ranks,
        rows_M: Sequence[Tensor],
        columns_N: Sequence[Tensor],
        bank_ids_Q: Tensor | None,
        excluded: tuple[Tensor, Tensor] | None,
        as_positives: bool,
        row_step: int,
    ) -> None:
        self.blocks = blocks
        self.offset = ranks.offset
        self.rows_M = rows_M
        self.as_positives = as_positives
        self.row_step = row_step
        self.sorted: list[list[tuple[Tensor, Tensor] | None]] = []
        for block in blocks:
            sources: Sequence[Tensor | None] = columns_N
            if block.bank:
                # rows_M[0] holds the image ids wherever bank ids are given.
                sources = [bank_ids_Q] if bank_ids_Q is not None else []
            self.sorted.append(
                [None if ids is None else tuple(ids[block.start : block.stop].sort()) for ids in sources]
            )
        self.excluded: tuple[Tensor, Tensor] | None = None
        if excluded is not None and len(excluded[0]):
            rows, columns = excluded
            firsts = torch.tensor([block.first for block in blocks], device=rows.device)
            tile = (rows // row_step) * len(blocks) + torch.searchsorted(firsts, columns, right=True) - 1
            tile, order = tile.sort(stable=True)
            self.excluded = rows[order], columns[order]
            tiles = -(-int(rows.max() + 1) // row_step) * len(blocks)
            self.bounds = torch.searchsorted(tile, torch.arange(tiles + 1, device=rows.device)).tolist()

    @property
    def empty(self) -> bool:
        return self.excluded is None and not any(self.sorted)

    def tile(self, start: int, stop: int, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Flat indices into the tile of rows [start, stop) and block `index`: (masked, positive), each sorted."""
        if self.empty:
            return None, None
        block = self.blocks[index]
        width = block.stop - block.start
        diagonal = block.first - self.offset - start
        same: Tensor | None = None
        joined = []
        for rows, columns in zip(self.rows_M, self.sorted[index], strict=False):
            if columns is None:
                continue
            ids, order = columns
            low = torch.searchsorted(ids, rows[start:stop])
            count = torch.searchsorted(ids, rows[start:stop], right=True) - low
            row = torch.arange(stop - start, device=ids.device).repeat_interleave(count)
            begin = (low - count.cumsum(0) + count).repeat_interleave(count)
            column = order[begin + torch.arange(len(row), device=ids.device)]
            off = row != column + diagonal
            joined.append((row * width + column)[off])
        if joined:
            same = torch.cat(joined).unique()
        left_out: Tensor | None = None
        if self.excluded is not None:
            at = start // self.row_step * len(self.blocks) + index
            low_at, high_at = (self.bounds[min(i, len(self.bounds) - 1)] for i in (at, at + 1))
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


class _Sums(NamedTuple):
    """What one pass over the tiles yields; all fp64, column vectors over this rank's texts only.

    Sums leave out the diagonal and masked cells. `extra` sums the logits of positives beside the diagonal, `logits`
    all logits (for smoothing); both are None where unused. Counts are of cells beside the diagonal.
    """

    positive_M: Tensor
    row_lse_M: Tensor
    col_lse_N: Tensor
    row_extra_M: Tensor | None
    col_extra_N: Tensor | None
    row_logits_M: Tensor | None
    col_logits_N: Tensor | None
    row_masked_M: Tensor
    col_masked_N: Tensor
    row_extras_M: Tensor
    col_extras_N: Tensor


class _Gradients(NamedTuple):
    """The gradient of every differentiable field of `_Sums`, in the same order."""

    positive_M: Tensor
    row_lse_M: Tensor
    col_lse_N: Tensor
    row_extra_M: Tensor | None
    col_extra_N: Tensor | None
    row_logits_M: Tensor | None
    col_logits_N: Tensor | None


class _Tiles:
    """Walks the logits tile by tile; holds the buffers that every tile reuses."""

    def __init__(
        self, text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, cells: _Cells, smooth: bool
    ) -> None:
        self.dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
        self.text_MD, self.cells, self.smooth = text_MD, cells, smooth
        self.scale = scale.detach().to(self.dtype).reshape(())
        # Features in the accumulation dtype are used where they lie; a product wants them contiguous.
        self.image_ND = image_ND.contiguous() if image_ND.dtype == self.dtype else image_ND
        self.bank_QD = bank_QD.contiguous() if bank_QD is not None and bank_QD.dtype == self.dtype else bank_QD
        self.offset, self.blocks, self.row_step = cells.offset, cells.blocks, cells.row_step
        widest = max((block.stop - block.start for block in self.blocks), default=0)
        tallest = min(self.row_step, len(text_MD))
        self.buffers = [self._new(tallest * widest) for _ in range(2)]
        self.scaled_RD = self._new(tallest, text_MD.shape[1])
        self.columns_CD = self._new(widest, text_MD.shape[1])

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

    def forward(self) -> _Sums:
        M, N = len(self.text_MD), len(self.image_ND)
        positive_M, row_lse_M, col_lse_N = self._vector(M), self._vector(M, -math.inf), self._vector(N, -math.inf)
        row_masked_M, col_masked_N, row_extras_M, col_extras_N = (self._vector(n) for n in (M, N, M, N))
        row_extra_M = col_extra_N = row_logits_M = col_logits_N = None
        if self.cells.as_positives:
            row_extra_M, col_extra_N = self._vector(M), self._vector(N)
        if self.smooth:
            row_logits_M, col_logits_N = self._vector(M), self._vector(N)
        shift = 0.0
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = torch.mul(self.text_MD[rows], self.scale, out=self.scaled_RD[: rows.stop - start])
            own_RD = self.image_ND[self.offset + start : self.offset + rows.stop]
            positive_M[rows] = (scaled_RD * own_RD).sum(1, dtype=torch.float64)
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
                row, col = self._one_exponential(tile, shift, cols is not None)
                if row is None:
                    tile = self._logits(scaled_RD, columns_CD)
                    self._fill(tile, start, block, masked, -math.inf)
                    row, col = self._two_exponentials(tile, cols is not None)
                    shift = _next_shift(row, col, shift)
                row_lse_M[rows] = torch.logaddexp(row_lse_M[rows], row)
                if cols is not None and col is not None:
                    col_lse_N[cols] = torch.logaddexp(col_lse_N[cols], col)
        return _Sums(
            positive_M, row_lse_M, col_lse_N, row_extra_M, col_extra_N, row_logits_M, col_logits_N,
            row_masked_M, col_masked_N, row_extras_M, col_extras_N,
        )  # fmt: skip

    def _one_exponential(self, tile: Tensor, shift: float, both: bool) -> tuple[Tensor | None, Tensor | None]:
        """Log-sum-exps of the tile's rows and columns from one e = exp(z - shift); None where that is unsafe."""
        e = (tile.sub_(shift) if shift else tile).exp_()
        sums = [e.sum(1), e.sum(0)] if both else [e.sum(1)]
        low = min(float(s.min()) for s in sums)
        high = max(float(s.max()) for s in sums)
        # Written so that a NaN is unsafe too.
        if not (low >= SUM_RANGE[0] and high <= SUM_RANGE[1]):
            return None, None
        row, *col = [s.double().log_().add_(shift) for s in sums]
        return row, (col[0] if both else None)

    def _two_exponentials(self, tile: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
        """The same with each row's and each column's own maximum: exact for any logits, -inf where all are masked."""

        def lse(dim: int, out: Tensor) -> Tensor:
            top = tile.amax(dim, keepdim=True)
            top.masked_fill_(top == -math.inf, 0)
            total = torch.sub(tile, top, out=out).exp_().sum(dim)
            return total.double().log_().add_(top.squeeze(dim))

        row = lse(1, self._spare(tile))
        return row, (lse(0, tile) if both else None)

    def backward(
        self, sums: _Sums, grads: _Gradients, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(d text_MD, d image_ND, d scale) in the accumulation dtype; d text also serves d scale."""
        M, N, D = *self.text_MD.shape[:1], *self.image_ND.shape
        d_text_MD = torch.zeros(M, D, dtype=self.dtype, device=self.text_MD.device) if need_text else None
        d_image_ND = torch.zeros(N, D, dtype=self.dtype, device=self.text_MD.device) if need_image else None
        d_scale = self._vector(1).squeeze(0)
        reach_rows = [_reach(part) for part in sums.row_lse_M.split(self.row_step)]
        reach_cols = [(math.inf, -math.inf) if b.bank else _reach(sums.col_lse_N[b.start : b.stop]) for b in self.blocks]
        for at, start in enumerate(range(0, M, self.row_step)):
            rows = slice(start, min(start + self.row_step, M))
            own = slice(self.offset + start, self.offset + rows.stop)
            scaled_RD = torch.mul(self.text_MD[rows], self.scale, out=self.scaled_RD[: rows.stop - start])
            d_RD = None if d_text_MD is None else d_text_MD[rows]
            for index, block in enumerate(self.blocks):
                columns_CD = self._columns(block)
                tile = self._logits(scaled_RD, columns_CD)
                masked, extra = self.cells.tile(start, rows.stop, index)
                self._fill(tile, start, block, masked, -math.inf)
                low, high = (f(a, b) for f, a, b in zip((min, max), reach_rows[at], reach_cols[index], strict=True))
                self._weigh(tile, rows, block, sums, grads, low, high)
                if grads.row_logits_M is not None and grads.col_logits_N is not None:
                    tile.add_(grads.row_logits_M[rows, None])
                    if not block.bank:
                        tile.add_(grads.col_logits_N[block.start : block.stop])
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
            g_R1 = grads.positive_M[rows, None].to(self.dtype)
            if d_image_ND is not None:
                d_image_ND[own].addcmul_(scaled_RD, g_R1)
            if d_RD is not None:
                d_RD.addcmul_(self.image_ND[own].to(self.dtype), g_R1)
                d_scale += (d_RD * self.text_MD[rows]).sum(dtype=torch.float64)
                d_RD.mul_(self.scale)
        return d_text_MD, d_image_ND, d_scale

    def _weigh(
        self, tile: Tensor, rows: slice, block: _Block, sums: _Sums, grads: _Gradients, low: float, high: float
    ) -> None:
        """Turns logits into g_row p_row + g_col p_col in place."""
        row_lse, g_row = sums.row_lse_M[rows], grads.row_lse_M[rows]
        cols = slice(block.start, block.stop)
        if low >= high - 2 * SHIFT_REACH:
            shift = 0.0 if max(high, -low) <= SHIFT_REACH else (low + high) / 2
            e = (tile.sub_(shift) if shift else tile).exp_()
            factor_R1 = _scaled(g_row, row_lse, shift, self.dtype)[:, None]
            if block.bank:
                e.mul_(factor_R1)
                return
            factor_C = _scaled(grads.col_lse_N[cols], sums.col_lse_N[cols], shift, self.dtype)
            e.mul_(torch.add(factor_R1, factor_C, out=self._spare(tile)))
            return
        # A fully masked row or column has -inf here, and only -inf logits.
        row_lse = row_lse.masked_fill(row_lse == -math.inf, 0).to(self.dtype)
        if block.bank:
            tile.sub_(row_lse[:, None]).exp_().mul_(g_row[:, None])
            return
        col_lse = sums.col_lse_N[cols]
        col_lse = col_lse.masked_fill(col_lse == -math.inf, 0).to(self.dtype)
        p_col = torch.sub(tile, col_lse, out=self._spare(tile)).exp_().mul_(grads.col_lse_N[cols])
        tile.sub_(row_lse[:, None]).exp_().mul_(g_row[:, None]).add_(p_col)


def _count(flat: Tensor, tile: Tensor, row_R: Tensor, col_C: Tensor | None) -> None:
    row_R += torch.bincount(flat // tile.shape[1], minlength=tile.shape[0])
    if col_C is not None:
        col_C += torch.bincount(flat % tile.shape[1], minlength=tile.shape[1])


def _scaled(grad: Tensor, lse: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """grad * exp(shift - lse), 0 where everything was masked."""
    return torch.where(lse == -math.inf, 0, grad * (shift - lse).exp()).to(dtype)


def _reach(lse: Tensor) -> tuple[float, float]:
    """The least and the greatest log-sum-exp of those that are not masked out; NaN if one is NaN."""
    real = lse[lse != -math.inf]
    return (float(real.min()), float(real.max())) if len(real) else (math.inf, -math.inf)


def _next_shift(row: Tensor, col: Tensor | None, shift: float) -> float:
    """A constant near the middle of the log-sum-exps just seen, for the tiles that follow."""
    low, high = _reach(row if col is None else torch.cat([row, col]))
    if not low <= high:
        return shift
    return 0.0 if max(high, -low) <= SHIFT_REACH else (low + high) / 2


# Autograd function


class _Contrast(torch.autograd.Function):
    """Text, image and scale to `_Sums`; `image_MD` is this rank's share of `image_ND` and takes its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        text_MD: Tensor,
        image_MD: Tensor,
        scale: Tensor,
        image_ND: Tensor,
        bank_QD: Tensor | None,
        cells: _Cells,
        ranks: _Ranks,
        smooth: bool,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(text_MD.device.type, enabled=False):
            sums = _Tiles(text_MD, image_ND, bank_QD, scale, cells, smooth).forward()
        ctx.save_for_backward(text_MD, image_ND, bank_QD, scale, *sums)
        ctx.cells, ctx.ranks, ctx.smooth = cells, ranks, smooth
        ctx.mark_non_differentiable(*sums[len(_Gradients._fields) :])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        text_MD, image_ND, bank_QD, scale, *sums = ctx.saved_tensors
        need_text, need_image, need_scale = ctx.needs_input_grad[:3]
        with torch.autocast(text_MD.device.type, enabled=False):
            tiles = _Tiles(text_MD, image_ND, bank_QD, scale, ctx.cells, ctx.smooth)
            d_text_MD, d_image_ND, d_scale = tiles.backward(
                _Sums(*sums), _Gradients(*grads[: len(_Gradients._fields)]), need_text or need_scale, need_image
            )
        return (
            d_text_MD.to(text_MD.dtype) if need_text and d_text_MD is not None else None,
            ctx.ranks.sum_rows(d_image_ND).to(image_ND.dtype) if d_image_ND is not None else None,
            d_scale.to(scale.dtype).reshape(scale.shape) if need_scale else None,
            None, None, None, None, None,
        )  # fmt: skip


class _JoinColumns(torch.autograd.Function):
    """This rank's column log-sum-exps and those of all ranks to the global ones; the gradient needs no exchange."""

    @staticmethod
    def forward(ctx: Any, own_N: Tensor, all_WN: Tensor) -> Tensor:
        lse_N = torch.logsumexp(all_WN, 0)
        ctx.save_for_backward(own_N, lse_N)
        return lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        own_N, lse_N = ctx.saved_tensors
        return torch.where(own_N == -math.inf, 0, grad_N * (own_N - lse_N).exp()), None


def _replace_value(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` with the gradient of `carrier`, whose own share of `value` it is."""
    return value + (carrier - carrier.detach())


# Public function


def contrastive_loss(
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
    label_smoothing: float = 0.0,
    direction_weights: tuple[float, float] = (0.5, 0.5),
    group: dist.ProcessGroup | None = None,
) -> ContrastiveOutput:
    """Symmetric InfoNCE of M text-image pairs on this rank, over the pairs of all ranks and a bank (CLIP, figure 3).

    Text i sees the N images of all ranks and the Q bank rows; image j sees the N texts of all ranks. With logits
    z = logit_scale * <text, image> + logit_bias and (a, b) = `direction_weights`,
    loss = sum_i w_i (a * row_loss_i + b * col_loss_i) / sum_i w_i over the global batch.

    Args:
        text_MD, image_MD, bank_QD: fp64, fp32, fp16 or bf16, one dtype and device; used as given, so normalise first.
            The bank is the same on every rank and takes no gradient.
        logit_scale: the multiplier (not its logarithm), a float or a tensor of one element.
        logit_bias: shifts every logit; the softmax does not see it, only `positive_logit_M` does.
        pair_weights: [M], at least 0; a pair of weight 0 still is a negative of others.
        positives: "pair" has the diagonal alone as positive and masks other pairs of equal id; "ids" takes those as
            positives too, with the mean over positives outside the logarithm (SupCon's L_out).
        image_ids, caption_ids, bank_ids: int64 [M], [M], [Q]; `bank_ids` are compared with `image_ids`.
        excluded: int64 (rows, columns) that are no negatives: row in [0, M), column in [0, N + Q), the pairs of all
            ranks first, then the bank. A pair's own column is never excluded.
        label_smoothing: in [0, 1), spread over the columns that are not masked.
        group: process group to gather over; every rank calls, M may differ. Returned gradients are W times this
            rank's share, so the average over ranks that data parallelism takes is the union batch's gradient.

    Returns:
        ContrastiveOutput. A row without negatives has loss 0; if all weights are 0 so is the loss.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is computed.
    """
    _check(
        text_MD, image_MD, bank_QD, pair_weights, positives, image_ids, caption_ids, bank_ids, label_smoothing,
        direction_weights,
    )  # fmt: skip
    device, accumulate = text_MD.device, _accumulation(text_MD.dtype)
    M, Q = len(text_MD), 0 if bank_QD is None else len(bank_QD)
    given = {
        "D": text_MD.shape[1],
        "image_ids": image_ids is not None,
        "caption_ids": caption_ids is not None,
        "Q": Q,
        "direction": hash(direction_weights) % (1 << 31),
    }
    ranks = _Ranks(group, given, M, device)
    N = ranks.total
    _check_excluded(excluded, M, N + Q)
    scale = logit_scale if isinstance(logit_scale, Tensor) else torch.tensor(float(logit_scale), device=device)
    ids_M = [ids for ids in (image_ids, caption_ids) if ids is not None]
    row_step = min(TILE_ROWS, max(M, 1))
    width = max(TILE_LOGITS // row_step, 1)
    blocks = [_Block(at, min(at + width, N), at, False) for at in range(0, N, width)]
    blocks += [_Block(at, min(at + width, Q), N + at, True) for at in range(0, Q, width)]
    cells = _Cells(
        blocks, ranks, ids_M, [ranks.gather_rows(ids) for ids in ids_M], bank_ids, excluded, positives == "ids", row_step
    )
    image_ND = ranks.gather_rows(image_MD.detach())
    bank = None if bank_QD is None else bank_QD.detach()
    sums = _Sums(*_Contrast.apply(text_MD, image_MD, scale, image_ND, bank, cells, ranks, label_smoothing > 0))

    positive_N = ranks.with_own(sums.positive_M)
    row_loss_M = _direction(
        sums.positive_M, sums.row_lse_M, sums.row_extra_M, sums.row_logits_M, sums.row_extras_M,
        N + Q - sums.row_masked_M, label_smoothing,
    )  # fmt: skip
    col_loss_N = _direction(
        positive_N, ranks.joined(sums.col_lse_N), ranks.summed(sums.col_extra_N), ranks.summed(sums.col_logits_N),
        ranks.summed(sums.col_extras_N), N - _given(ranks.summed(sums.col_masked_N)), label_smoothing,
    )  # fmt: skip
    weights_M = torch.ones(M, device=device, dtype=torch.float64) if pair_weights is None else pair_weights.double()
    weights_N = ranks.gather_rows(weights_M)
    total = torch.where(weights_N.sum() > 0, weights_N.sum(), 1.0)
    a, b = direction_weights
    rows = a * (weights_M * row_loss_M).sum() / total
    columns = b * (weights_N * col_loss_N).sum() / total
    own_share = rows + columns
    loss = _replace_value(_given(ranks.summed(rows)).detach() + columns.detach(), ranks.world * own_share)
    per_pair_loss_M = (a * row_loss_M + b * col_loss_N[ranks.own]).detach().to(accumulate)
    positive_logit_M = sums.positive_M.detach()
    if isinstance(logit_bias, Tensor):
        # A shift of all logits cancels in both softmaxes: its gradient is zero, not missing.
        loss = loss + 0 * logit_bias.sum()
    if logit_bias is not None:
        positive_logit_M = positive_logit_M + torch.as_tensor(logit_bias, device=device).detach().double().reshape(())
    return ContrastiveOutput(loss.to(accumulate), per_pair_loss_M, positive_logit_M.to(accumulate))


def explain(text_MD: Tensor) -> str:
    """Which path `contrastive_loss` takes for these features, and why."""
    why = "CPU tensors" if text_MD.device.type == "cpu" else f"no Triton kernel for {text_MD.device.type} tensors yet"
    return f"chunked torch: {why}; accumulates in {_accumulation(text_MD.dtype)}"


def _direction(
    positive: Tensor,
    lse: Tensor,
    extra: Tensor | None,
    logits: Tensor | None,
    extras: Tensor | None,
    columns: Tensor,
    smoothing: float,
) -> Tensor:
    """Loss of every row (or column) from its sums; `lse` leaves out the positive, `columns` counts unmasked cells."""
    if extra is None and logits is None:
        # The threshold above which torch takes softplus(x) for x; its default of 20 costs fp64 accuracy.
        return functional.softplus(lse - positive, threshold=40)
    count = 1 + (0 if extras is None else extras)
    mean_positive = (positive + (0 if extra is None else extra)) / count
    loss = torch.logaddexp(lse, positive) - (1 - smoothing) * mean_positive
    if logits is not None:
        loss = loss - smoothing * (positive + logits) / columns
    return torch.where(columns > count, loss, 0)


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("a sum that this call needs was not computed")
    return value


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    text_MD: Tensor,
    image_MD: Tensor,
    bank_QD: Tensor | None,
    pair_weights: Tensor | None,
    positives: str,
    image_ids: Tensor | None,
    caption_ids: Tensor | None,
    bank_ids: Tensor | None,
    label_smoothing: float,
    direction_weights: tuple[float, float],
) -> None:
    if text_MD.ndim != 2 or not text_MD.is_floating_point():
        raise ValueError(f"text_MD: expected a floating-point matrix [M, D], got {text_MD.dtype} {list(text_MD.shape)}")
    M, D = text_MD.shape
    if image_MD.shape != text_MD.shape:
        raise ValueError(f"image_MD: expected the shape of text_MD, {[M, D]}, got {list(image_MD.shape)}")
    if bank_QD is not None and (bank_QD.ndim != 2 or bank_QD.shape[1] != D):
        raise ValueError(f"bank_QD: expected [Q, {D}], got {list(bank_QD.shape)}")
    if not 1 <= D <= 1024:
        raise ValueError(f"text_MD: D is {D}, supported are 1 to 1024")
    for name, features in (("image_MD", image_MD), ("bank_QD", bank_QD)):
        if features is not None and features.dtype != text_MD.dtype:
            raise TypeError(f"{name}: {features.dtype}, but text_MD is {text_MD.dtype}; convert one of them")
    for name, ids, size in (
        ("image_ids", image_ids, M),
        ("caption_ids", caption_ids, M),
        ("bank_ids", bank_ids, 0 if bank_QD is None else len(bank_QD)),
    ):
        if ids is not None and (ids.shape != (size,) or ids.dtype != torch.int64):
            raise ValueError(f"{name}: expected int64 [{size}], got {ids.dtype} {list(ids.shape)}")
    if bank_ids is not None and image_ids is None:
        raise ValueError("bank_ids: are compared with image_ids, which is missing")
    if pair_weights is not None and (pair_weights.shape != (M,) or bool((pair_weights < 0).any())):
        raise ValueError(f"pair_weights: expected [{M}] numbers of at least 0, got shape {list(pair_weights.shape)}")
    for name, tensor in (
        ("image_MD", image_MD), ("bank_QD", bank_QD), ("pair_weights", pair_weights), ("image_ids", image_ids),
        ("caption_ids", caption_ids), ("bank_ids", bank_ids),
    ):  # fmt: skip
        if tensor is not None and tensor.device != text_MD.device:
            raise ValueError(f"{name}: lies on {tensor.device}, text_MD on {text_MD.device}; move one of them")
    if positives not in ("pair", "ids"):
        raise ValueError(f"positives: expected 'pair' or 'ids', got {positives!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if len(direction_weights) != 2 or min(direction_weights) < 0:
        raise ValueError(f"direction_weights: expected two numbers of at least 0, got {direction_weights}")


def _check_excluded(excluded: tuple[Tensor, Tensor] | None, rows: int, columns: int) -> None:
    if excluded is None:
        return
    for name, index, size in (("rows", excluded[0], rows), ("columns", excluded[1], columns)):
        if index.ndim != 1 or index.dtype != torch.int64 or len(index) != len(excluded[0]):
            raise ValueError(f"excluded {name}: expected int64 [{len(excluded[0])}], got {index.dtype} {list(index.shape)}")
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < size):
            raise ValueError(f"excluded {name}: expected 0 to {size - 1}, got {int(index.min())} to {int(index.max())}")
