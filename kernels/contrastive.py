"""Symmetric InfoNCE (CLIP) over a batch, a bank of images and any number of ranks, with no M x N matrix.

Cost model, for M texts on this rank, N images of all ranks, Q bank rows and width D:

- compute: 4 products of M (N + Q) D multiply-adds, one in forward and three in backward (the recompute, d
  text, d image), 3 when images are frozen. A logit costs one exponential a pass, two where logits spread too
  far.
- memory beside the inputs: two tiles of `TILE_LOGITS` logits, vectors of length M + N, the equal ids of one
  tile, fp32 M x D for d text and fp32 N x D for d image; for half-precision features also one block of
  columns in fp32.
- exchange a rank, gather: N images in their own dtype in forward; in backward nothing when images are frozen, else
  a reduce-scatter of N x D in fp32. Memory O((N + Q) D).
- exchange a rank, ring: the same N images in forward, block by block while the last one is computed on, and once
  more in backward; beside them N x D in fp32 when images are trained. Memory O((M + Q) D + N), for M the longest
  rank's: two blocks of images, and in backward three of their gradients.
- either: at most 2 N ids and 3 N numbers gathered, at most 6 N numbers reduced.

On CUDA the tiles are walked by the kernels of `fused`, which has its own cost model; this one is for plain torch.

Shapes: M this rank's pairs, N pairs of all ranks, Q bank rows, D width, R x C one tile, W ranks.

The diagonal (each pair's own logit) never enters a log-sum-exp. With n the log-sum-exp of a row's other
logits and z its own logit, the loss is softplus(n - z) and its slope sigmoid(n - z): precise where p - 1
would cancel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from .fused import FusedTiles

Positives = Literal["pair", "ids"]
Exchange = Literal["gather", "ring"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# 8 MB in fp32: a tile stays in the last-level cache between its product and the passes over it.
TILE_LOGITS = 1 << 21
TILE_ROWS = 512

# A tile shifted by one constant is trusted when its sums lie in this range: no term overflowed, and those
# that underflowed (below e^-87 in fp32) are at most C * 2^-46 of any sum.
SUM_RANGE = (2.0**-80, 1e34)
# In backward one exponential serves p_row and p_col while all log-sum-exps lie this near the shift.
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


def positive_and_masked(
    logits: Tensor,
    positives: Positives,
    image_ids: Tensor | None,
    caption_ids: Tensor | None,
    bank_ids: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What ids and exclusions make of the cells of all `logits` [M, M + Q], as bool: positives, and masked ones."""
    M = len(logits)
    own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
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
        masked = masked.index_put(excluded, torch.tensor(True, device=logits.device))
    return positive, masked


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
    """The definition of `contrastive_loss` on one rank: the whole matrix in plain torch, under autograd."""
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    M, device = len(text_MD), text_MD.device
    columns = image_MD if bank_QD is None else torch.cat([image_MD, bank_QD])
    bias = 0.0 if logit_bias is None else logit_bias
    logits = logit_scale * (text_MD.to(dtype) @ columns.to(dtype).T) + bias

    positive, masked = positive_and_masked(logits, positives, image_ids, caption_ids, bank_ids, excluded)
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

# torch 2.13 renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Ranks:
    """Where this rank's pairs lie in the global batch, and the exchanges; `group=None` is one rank."""

    def __init__(
        self, group: dist.ProcessGroup | None, size: int, agreed: dict[str, float], device: torch.device
    ) -> None:
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sizes = [size]
        if group is not None:
            mine = torch.tensor([size, *agreed.values()], dtype=torch.float64, device=device)
            sizes, *columns = self.gather(mine).T.tolist()
            for name, values in zip(agreed, columns, strict=True):
                if len(set(values)) > 1:
                    raise ValueError(f"{name} differs between ranks: {values} in rank order, expected one value")
            self.sizes = [int(size) for size in sizes]
        self.total = sum(self.sizes)
        self.parts = [slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1])) for rank in range(self.world)]
        self.own = self.parts[self.rank]
        self.offset = self.own.start

    def gather(self, flat: Tensor) -> Tensor:
        """The equally long tensors of all ranks, stacked: [W, *shape]."""
        if self.group is None:
            return flat[None]
        out = torch.empty(self.world * flat.numel(), dtype=flat.dtype, device=flat.device)
        _all_gather(out, flat.reshape(-1), group=self.group)
        return out.view(self.world, *flat.shape)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order: [N, ...]; ranks may hold different numbers of rows."""
        if self.group is None:
            return rows
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return self.gather(rows).flatten(0, 1)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = self.gather(padded)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])

    def place(self, own_M: Tensor, all_N: Tensor) -> Tensor:
        """`all_N` with this rank's part taken from `own_M`, so that gradients reach it."""
        return torch.cat([all_N[: self.offset], own_M, all_N[self.offset + len(own_M) :]])

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Sums [N, ...] over the ranks and returns this rank's rows of the sum."""
        if self.group is None:
            return rows
        longest = max(self.sizes)
        padded = rows
        if min(self.sizes) < longest:
            padded = rows.new_zeros((self.world * longest, *rows.shape[1:]))
            for part, own in zip(padded.split(longest), rows.split(self.sizes), strict=True):
                part[: len(own)] = own
        out = rows.new_empty((longest, *rows.shape[1:]))
        _reduce_scatter(out, padded, group=self.group)
        return out[: self.sizes[self.rank]]

    def pass_on(self, rows: Tensor, source: int) -> tuple[Tensor, list[dist.Work]]:
        """Starts to send `source`'s rows to the next rank; the rows that arrive in turn, once the works are done."""
        incoming = rows.new_empty((self.sizes[source - 1], *rows.shape[1:]))
        ends = ((dist.isend, rows, self.rank + 1), (dist.irecv, incoming, self.rank - 1))
        operations = [
            dist.P2POp(end, part, group=self.group, group_peer=peer % self.world)
            for end, part, peer in ends
            if part.numel()
        ]
        return incoming, dist.batch_isend_irecv(operations) if operations else []

    def travel(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each rank and its rows, own first; the next ones are under way while the caller works on these."""
        for step in range(self.world):
            source = (self.rank - step) % self.world
            last = step + 1 == self.world
            incoming, works = (rows, []) if last else self.pass_on(rows, source)
            yield source, rows
            for work in works:
                work.wait()
            rows = incoming


# Chunked path


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

    def __init__(
        self,
        blocks: Sequence[_Block],
        offset: int,
        rows_M: Sequence[Tensor],
        columns_N: Sequence[Tensor],
        bank_ids_Q: Tensor | None,
        excluded: tuple[Tensor, Tensor] | None,
        as_positives: bool,
        row_step: int,
    ) -> None:
        self.blocks = blocks
        self.offset = offset
        self.rows_M = rows_M
        self.as_positives = as_positives
        self.row_step = row_step
        self.sorted: list[list[tuple[Tensor, Tensor]]] = []
        for block in blocks:
            sources = columns_N
            if block.bank:
                # rows_M[0] holds the image ids wherever bank ids are given.
                sources = [bank_ids_Q] if bank_ids_Q is not None else []
            self.sorted.append([_sorted(ids[block.start : block.stop]) for ids in sources])
        self.excluded: tuple[Tensor, Tensor] | None = None
        if excluded is not None and len(excluded[0]):
            rows, columns = (part.contiguous() for part in excluded)
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

    All leave out the diagonal. `extra` sums the logits of positives, `logits` those of all unmasked cells;
    both are None where unused. `masked` and `extras` count masked cells and positives.
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


class _LogSumExps(NamedTuple):
    """What backward needs of `_Sums`; those of the rows may cover more columns than are walked."""

    row_lse_M: Tensor
    col_lse_N: Tensor


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
    """Walks the logits tile by tile, in buffers that all tiles share: autocast leaves such products alone."""

    def __init__(
        self,
        text_MD: Tensor,
        image_ND: Tensor,
        bank_QD: Tensor | None,
        scale: Tensor,
        cells: _Cells,
        smooth: bool,
    ) -> None:
        self.dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
        self.text_MD, self.cells, self.smooth = text_MD, cells, smooth
        self.scale = scale.detach().to(self.dtype).reshape(())
        # Features in the accumulation dtype are used where they lie; a product wants them contiguous.
        self.image_ND = image_ND.contiguous() if image_ND.dtype == self.dtype else image_ND
        self.bank_QD = bank_QD.contiguous() if bank_QD is not None and bank_QD.dtype == self.dtype else bank_QD
        self.offset, self.blocks, self.row_step = cells.offset, cells.blocks, cells.row_step
        self.diagonal = 0 <= self.offset <= len(image_ND) - len(text_MD)
        widest = max((block.stop - block.start for block in self.blocks), default=0)
        tallest = min(self.row_step, len(text_MD))
        self.buffers = [self._new(tallest * widest) for _ in range(2)]
        self.scaled_RD = self._new(tallest, text_MD.shape[1])
        self.columns_CD = self._new(widest if text_MD.dtype != self.dtype else 0, text_MD.shape[1])

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

    def forward(self) -> _Sums:
        M, N = len(self.text_MD), len(self.image_ND)
        positive_M = self._vector(M)
        row_lse_M, col_lse_N = self._vector(M, -math.inf), self._vector(N, -math.inf)
        row_masked_M, col_masked_N, row_extras_M, col_extras_N = (self._vector(n) for n in (M, N, M, N))
        row_extra_M = col_extra_N = row_logits_M = col_logits_N = None
        if self.cells.as_positives:
            row_extra_M, col_extra_N = self._vector(M), self._vector(N)
        if self.smooth:
            row_logits_M, col_logits_N = self._vector(M), self._vector(N)
        shift = 0.0
        for start in range(0, M, self.row_step):
            rows = slice(start, min(start + self.row_step, M))
            scaled_RD = self._scaled_rows(rows)
            if self.diagonal:
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
        """Log-sum-exps of the tile's rows and columns from one e = exp(z - shift); None if that is unsafe."""
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
        """The same for any logits, by each row's and each column's own maximum; -inf where all is masked."""

        def lse(dim: int, out: Tensor) -> Tensor:
            top = tile.amax(dim, keepdim=True)
            top.masked_fill_(top == -math.inf, 0)
            total = torch.sub(tile, top, out=out).exp_().sum(dim)
            return total.double().log_().add_(top.squeeze(dim))

        row = lse(1, self._spare(tile))
        return row, (lse(0, tile) if both else None)

    def backward(
        self, sums: _LogSumExps, grads: _Gradients, need_text: bool, need_image: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(d text_MD, d image_ND, d scale) in the accumulation dtype; d text also serves d scale."""
        M, N, D = *self.text_MD.shape[:1], *self.image_ND.shape
        d_text_MD = torch.zeros(M, D, dtype=self.dtype, device=self.text_MD.device) if need_text else None
        d_image_ND = torch.zeros(N, D, dtype=self.dtype, device=self.text_MD.device) if need_image else None
        d_scale = self._vector(1).squeeze(0)
        reach_rows = [_reach(part) for part in sums.row_lse_M.split(self.row_step)]
        nothing = sums.col_lse_N[:0]
        reach_cols = [
            _reach(nothing if block.bank else sums.col_lse_N[block.start : block.stop]) for block in self.blocks
        ]
        for at, start in enumerate(range(0, M, self.row_step)):
            rows = slice(start, min(start + self.row_step, M))
            own = slice(self.offset + start, self.offset + rows.stop)
            scaled_RD = self._scaled_rows(rows)
            d_RD = None if d_text_MD is None else d_text_MD[rows]
            for index, block in enumerate(self.blocks):
                columns_CD = self._columns(block)
                tile = self._logits(scaled_RD, columns_CD)
                masked, extra = self.cells.tile(start, rows.stop, index)
                self._fill(tile, start, block, masked, -math.inf)
                low = min(reach_rows[at][0], reach_cols[index][0])
                high = max(reach_rows[at][1], reach_cols[index][1])
                self._weigh(tile, rows, block, sums, grads, (low, high))
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
            g_R1 = grads.positive_M[rows, None].to(self.dtype)
            if d_image_ND is not None and self.diagonal:
                d_image_ND[own].addcmul_(scaled_RD, g_R1)
            if d_RD is not None and self.diagonal:
                d_RD.addcmul_(self.image_ND[own].to(self.dtype), g_R1)
            if d_RD is not None:
                d_scale += (d_RD * self.text_MD[rows]).sum(dtype=torch.float64)
                d_RD.mul_(self.scale)
        return d_text_MD, d_image_ND, d_scale

    def _weigh(
        self,
        tile: Tensor,
        rows: slice,
        block: _Block,
        sums: _LogSumExps,
        grads: _Gradients,
        reach: tuple[float, float],
    ) -> None:
        """Turns logits into g_row p_row + g_col p_col in place; `reach` spans the tile's log-sum-exps."""
        row_lse, g_row = sums.row_lse_M[rows], grads.row_lse_M[rows]
        cols = slice(block.start, block.stop)
        low, high = reach
        if low >= high - 2 * SHIFT_REACH:
            shift = _shift(low, high)
            e = (tile.sub_(shift) if shift else tile).exp_()
            factor_R1 = _scaled(g_row, row_lse, shift, self.dtype)[:, None]
            if block.bank:
                e.mul_(factor_R1)
                return
            factor_C = _scaled(grads.col_lse_N[cols], sums.col_lse_N[cols], shift, self.dtype)
            e.mul_(torch.add(factor_R1, factor_C, out=self._spare(tile)))
            return
        row_lse, g_row = _rounded(row_lse, g_row, self.dtype)
        if block.bank:
            tile.sub_(row_lse[:, None]).exp_().mul_(g_row[:, None])
            return
        col_lse, g_col = _rounded(sums.col_lse_N[cols], grads.col_lse_N[cols], self.dtype)
        by_col = torch.sub(tile, col_lse, out=self._spare(tile)).exp_().mul_(g_col)
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


def _next_shift(row: Tensor, col: Tensor | None, shift: float) -> float:
    """A constant near the middle of the log-sum-exps just seen, for the tiles that follow."""
    low, high = _reach(row if col is None else torch.cat([row, col]))
    return _shift(low, high) if low <= high else shift


def _shift(low: float, high: float) -> float:
    """A constant amid log-sum-exps, 0 near 0; exact in fp32, as it leaves tiles in fp32 and comes back in fp64."""
    return 0.0 if max(high, -low) <= SHIFT_REACH else float(torch.tensor((low + high) / 2, dtype=torch.float32))


# Choice of the path

# Set by tests that run the kernels in Triton's interpreter.
FUSED_ON_CPU = False


def _no_kernels(text_MD: Tensor) -> str | None:
    """Why the fused kernels do not run on such texts; None if they do."""
    if text_MD.device.type != "cuda" and not FUSED_ON_CPU:
        return f"{text_MD.device.type.upper()} tensors"
    if find_spec("triton") is None:
        return "Triton is not installed, which the fused kernels need: pip install triton"
    # Triton takes a while to load, and CPU tensors do without.
    from .fused import refusal

    return refusal(text_MD)


def _may_read(tensor: Tensor) -> bool:
    """Whether the host may look at values: not while torch.compile traces or a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class _Place(NamedTuple):
    """Which of `total` columns hold the diagonal; columns beyond them where all are other ranks' images."""

    own: slice
    total: int


class _Options(NamedTuple):
    """What both operators are told beside features, in their order; K kinds of ids, cells as (row, column)."""

    ids_KM: Tensor | None
    ids_KN: Tensor | None
    bank_ids_Q: Tensor | None
    excluded_2E: Tensor | None
    offset: int
    as_positives: bool
    smooth: bool

    def of_cells(self) -> tuple[list[Tensor], list[Tensor], Tensor | None, tuple[Tensor, Tensor] | None, bool]:
        """As the lists of cells take them: ids of rows and of columns by kind, the bank's, cells, `as_positives`."""
        ids_M, ids_N = ([] if ids is None else list(ids) for ids in (self.ids_KM, self.ids_KN))
        excluded = None if self.excluded_2E is None else (self.excluded_2E[0], self.excluded_2E[1])
        return ids_M, ids_N, self.bank_ids_Q, excluded, self.as_positives

    @property
    def burden(self) -> int:
        """What a tile needs beside products: 0 nothing, 1 ids, cells or all logits, 2 positives by ids and these."""
        if self.ids_KM is not None and self.as_positives and self.smooth:
            return 2
        return int(self.ids_KM is not None or self.excluded_2E is not None or self.smooth)

    def of_block(self, columns: slice, total: int, own: bool) -> _Options:
        """The same for `columns` of the batch alone, and the bank behind them if it is this rank's own block."""
        if columns == slice(0, total):
            return self
        excluded_2E = self.excluded_2E
        if excluded_2E is not None:
            col_E = excluded_2E[1]
            here_E = (col_E >= columns.start) & (col_E < columns.stop)
            moved_E = col_E - columns.start
            if own:
                here_E |= col_E >= total
                moved_E = torch.where(col_E >= total, col_E - total + columns.stop - columns.start, moved_E)
            excluded_2E = torch.stack([excluded_2E[0], moved_E])[:, here_E]
        return self._replace(
            ids_KN=None if self.ids_KN is None else self.ids_KN[:, columns],
            bank_ids_Q=self.bank_ids_Q if own else None,
            excluded_2E=excluded_2E,
            offset=self.offset - columns.start,
        )


def _options(
    ranks: _Ranks,
    image_ids: Tensor | None,
    caption_ids: Tensor | None,
    bank_ids: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    as_positives: bool,
    smooth: bool = False,
) -> _Options:
    """What operators are told over the columns of all ranks."""
    given_ids = [ids for ids in (image_ids, caption_ids) if ids is not None]
    ids_KM = torch.stack(given_ids) if given_ids else None
    ids_KN = None if ids_KM is None else ranks.gather_rows(ids_KM.T).T.contiguous()
    excluded_2E = None if excluded is None else torch.stack([*excluded])
    return _Options(ids_KM, ids_KN, bank_ids, excluded_2E, ranks.offset, as_positives, smooth)


def _tiles(
    text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: _Options
) -> _Tiles | FusedTiles:
    """What walks over the tiles."""
    M, N, Q = len(text_MD), len(image_ND), 0 if bank_QD is None else len(bank_QD)
    # Without texts or images there is no tile, and nothing to walk over.
    if M and N and _no_kernels(text_MD) is None:
        from .fused import FusedCells, FusedTiles, tile_config

        config = tile_config(text_MD, options.burden)
        place = _Place(slice(options.offset, options.offset + M), N)
        fused = FusedCells(place, Q, *options.of_cells(), config, text_MD.device)
        return FusedTiles(text_MD, image_ND, bank_QD, scale, fused, options.smooth)
    row_step, blocks = _plan(M, N, Q)
    cells = _Cells(blocks, options.offset, *options.of_cells(), row_step)
    return _Tiles(text_MD, image_ND, bank_QD, scale, cells, options.smooth)


# Operators


class Operators(NamedTuple):
    """A loss's two operators, whose arguments begin alike: text_MD, image_ND, bank_QD, `scalars`, `options`.

    `sums` returns `fields`, those that end in _N by column. `gradients` is told beside the same arguments what was
    `kept` of them, a list of the gradients of the first `differentiable`, and whether d text (which d scale, the
    first scalar's, comes with) and d image are needed; it returns d text, d image, and every scalar's in fp64.
    """

    sums: Any
    gradients: Any
    fields: tuple[str, ...]
    kept: tuple[str, ...]
    differentiable: int
    scalars: int
    options: int
    """How many of `_Options` both take."""

    def keep(self, sums: Sequence[Tensor]) -> list[Tensor]:
        return [part for name, part in zip(self.fields, sums, strict=True) if name in self.kept]

    def register_autograd(self) -> None:
        scalars = slice(3, 3 + self.scalars)
        # Those three, the scalars, and of the options ids and excluded cells.
        tensors = scalars.stop + 4

        def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
            ctx.save_for_backward(*inputs[:tensors], *self.keep(output))
            ctx.options = inputs[tensors:]

        def backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
            given, kept = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
            need_text, need_image = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            need_scalars = ctx.needs_input_grad[scalars]
            d_text_MD, d_image_ND, *d_scalars = self.gradients(
                *given, *ctx.options, *kept, grads[: self.differentiable], need_text or need_scalars[0], need_image
            )
            return (
                d_text_MD.to(given[0].dtype) if need_text else None,
                d_image_ND.to(given[1].dtype) if need_image else None,
                None,
                *_of_scalars(d_scalars, given[scalars], need_scalars),
                *[None] * self.options,
            )

        self.sums.register_autograd(backward, setup_context=save)


def _of_scalars(grads: Sequence[Tensor], scalars: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        grad.to(scalar.dtype).reshape(scalar.shape) if need else None
        for grad, scalar, need in zip(grads, scalars, needed, strict=True)
    ]


def _or_empty(part: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors only: an empty one for None."""
    return like.new_empty(0) if part is None else part


def _used(parts: Sequence[Tensor], as_positives: bool, smooth: bool) -> list[Any]:
    """Fields of `_Sums` or `_Gradients` that came through an operator: None for the empty ones."""
    used = dict.fromkeys(_Sums._fields, True)
    used |= {"row_extra_M": as_positives, "col_extra_N": as_positives, "row_logits_M": smooth, "col_logits_N": smooth}
    return [part if here else None for part, here in zip(parts, used.values(), strict=False)]


def fake_gradients(scalars: int, text_MD: Tensor, image_ND: Tensor, need_text: bool, need_image: bool) -> list[Tensor]:
    """What the operators of gradients return, but for the values."""
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    d_scalars = [text_MD.new_empty((), dtype=torch.float64) for _ in range(scalars)]
    parts = [
        features.new_empty(features.shape, dtype=dtype) if need else text_MD.new_empty(0, dtype=torch.float64)
        for features, need in ((text_MD, need_text), (image_ND, need_image))
    ]
    return [*parts, *d_scalars]


@torch.library.custom_op("efficientclip::contrastive_sums", mutates_args=())
def contrastive_sums(
    text_MD: Tensor,
    image_ND: Tensor,
    bank_QD: Tensor | None,
    scale: Tensor,
    ids_KM: Tensor | None,
    ids_KN: Tensor | None,
    bank_ids_Q: Tensor | None,
    excluded_2E: Tensor | None,
    offset: int,
    as_positives: bool,
    smooth: bool,
) -> list[Tensor]:
    """The fields of `_Sums` in their order, fp64; row i's own image is `offset` + i, or none of these.

    Without `as_positives` or `smooth` the fields that they ask for are empty. Arguments are as `contrastive_loss`
    describes and checks them, with `bank_ids_Q` compared with `ids_KM[0]`.
    """
    reason = _no_kernels(text_MD)
    if reason is not None and text_MD.is_cuda and text_MD.dtype != torch.float64:
        warnings.warn(f"contrastive_loss falls back to chunked torch on CUDA: {reason}", stacklevel=2)
    options = _Options(ids_KM, ids_KN, bank_ids_Q, excluded_2E, offset, as_positives, smooth)
    sums = _tiles(text_MD, image_ND, bank_QD, scale, options).forward()
    return [_or_empty(part, sums.positive_M) for part in sums]


@contrastive_sums.register_fake
def _(text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, *options: Any) -> list[Tensor]:
    sizes = {"M": text_MD.shape[0], "N": image_ND.shape[0]}
    parts = [text_MD.new_empty(sizes[name[-1]], dtype=torch.float64) for name in _Sums._fields]
    as_positives, smooth = options[-2:]
    return [_or_empty(part, parts[0]) for part in _used(parts, as_positives, smooth)]


@torch.library.custom_op("efficientclip::contrastive_gradients", mutates_args=())
def contrastive_gradients(
    text_MD: Tensor,
    image_ND: Tensor,
    bank_QD: Tensor | None,
    scale: Tensor,
    ids_KM: Tensor | None,
    ids_KN: Tensor | None,
    bank_ids_Q: Tensor | None,
    excluded_2E: Tensor | None,
    offset: int,
    as_positives: bool,
    smooth: bool,
    row_lse_M: Tensor,
    col_lse_N: Tensor,
    grads: list[Tensor],
    need_text: bool,
    need_image: bool,
) -> list[Tensor]:
    """[d text_MD, d image_ND, d scale] in fp32 (fp64 for fp64 features), d scale in fp64 and without shape.

    `grads` are those of the first fields of `_Sums`, as far as `_Gradients` goes. A gradient that is not needed is
    empty; d scale needs `need_text`. Where the rows have more columns than these, `row_lse_M` is over all of them.
    """
    options = _Options(ids_KM, ids_KN, bank_ids_Q, excluded_2E, offset, as_positives, smooth)
    tiles = _tiles(text_MD, image_ND, bank_QD, scale, options)
    given = _Gradients(*_used(grads, as_positives, smooth))
    parts = tiles.backward(_LogSumExps(row_lse_M, col_lse_N), given, need_text, need_image)
    # Rows without gaps, as the exchanges want them.
    return [_or_empty(part, parts[2]).contiguous() for part in parts]


@contrastive_gradients.register_fake
def _(text_MD: Tensor, image_ND: Tensor, *given: Any) -> list[Tensor]:
    return fake_gradients(1, text_MD, image_ND, *given[-2:])


CONTRASTIVE = Operators(
    contrastive_sums,
    contrastive_gradients,
    _Sums._fields,
    kept=_LogSumExps._fields,
    differentiable=len(_Gradients._fields),
    scalars=1,
    options=len(_Options._fields),
)
CONTRASTIVE.register_autograd()


def sums_of_all(
    operators: Operators,
    text_MD: Tensor,
    image_MD: Tensor,
    bank_QD: Tensor | None,
    scalars: Sequence[Tensor],
    options: _Options,
    ranks: _Ranks,
    exchange: Exchange,
) -> Sequence[Tensor]:
    """The fields of `operators` for this rank's texts against the images of all ranks, differentiable."""
    if ranks.group is None:
        sums: list[Tensor] = operators.sums(text_MD, image_MD, bank_QD, *scalars, *options[: operators.options])
        return sums
    ring = exchange == "ring" and ranks.world > 1
    over_ranks: tuple[Tensor, ...] = _OverRanks.apply(
        text_MD, image_MD, bank_QD, operators, options, ranks, ring, *scalars
    )
    return over_ranks


class _OverRanks(torch.autograd.Function):
    """Sums over the images of all ranks: gathered, or block by block as they come round the ring."""

    @staticmethod
    def forward(
        ctx: Any,
        text_MD: Tensor,
        image_MD: Tensor,
        bank_QD: Tensor | None,
        operators: Operators,
        options: _Options,
        ranks: _Ranks,
        ring: bool,
        *scalars: Tensor,
    ) -> tuple[Tensor, ...]:
        image = image_MD.contiguous() if ring else ranks.gather_rows(image_MD)
        blocks: dict[int, list[Tensor]] = {}
        for source, columns, image_CD in _blocks(image, ranks, ring):
            own = source == ranks.rank
            if own or len(image_CD):
                of_block = options.of_block(columns, ranks.total, own)[: operators.options]
                blocks[source] = operators.sums(text_MD, image_CD, bank_QD if own else None, *scalars, *of_block)
        sums = _merge(operators.fields, [blocks[source] for source in sorted(blocks)])
        ctx.save_for_backward(text_MD, image, bank_QD, *scalars, *operators.keep(sums))
        ctx.operators, ctx.options, ctx.ranks, ctx.ring = operators, options, ranks, ring
        ctx.mark_non_differentiable(*sums[operators.differentiable :])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        operators, ranks = ctx.operators, ctx.ranks
        text_MD, image, bank_QD, *saved = ctx.saved_tensors
        scalars, kept = saved[: operators.scalars], saved[operators.scalars :]
        (need_text, need_image), need_scalars = ctx.needs_input_grad[:2], ctx.needs_input_grad[7:]
        need_rows = need_text or need_scalars[0]
        dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
        d_text_MD = text_MD.new_zeros(text_MD.shape, dtype=dtype)
        d_scalars = [text_MD.new_zeros((), dtype=torch.float64) for _ in scalars]
        d_image: Tensor | None = None
        works: list[dist.Work] = []
        for source, columns, image_CD in _blocks(image, ranks, ctx.ring):
            own = source == ranks.rank
            d_CD = image_CD.new_empty((0, image_CD.shape[1]), dtype=dtype)
            if own or len(image_CD):
                d_MD, d_CD, *d_factors = operators.gradients(
                    text_MD, image_CD, bank_QD if own else None, *scalars,
                    *ctx.options.of_block(columns, ranks.total, own)[: operators.options],
                    *_of_columns(operators.kept, kept, columns),
                    _of_columns(operators.fields, grads[: operators.differentiable], columns),
                    need_rows, need_image,
                )  # fmt: skip
                d_scalars = [total + part for total, part in zip(d_scalars, d_factors, strict=True)]
                if need_rows:
                    d_text_MD += d_MD
            if need_image and ctx.ring:
                # A block's gradient follows it a step behind: what came so far arrives during the product above.
                for work in works:
                    work.wait()
                sent = d_CD if d_image is None else d_image.add_(d_CD)
                d_image, works = ranks.pass_on(sent, source)
            elif need_image:
                d_image = ranks.sum_rows(d_CD)
        for work in works:
            work.wait()
        return (
            d_text_MD.to(text_MD.dtype) if need_text else None,
            None if d_image is None else d_image.to(image.dtype),
            None, None, None, None, None,
            *_of_scalars(d_scalars, scalars, need_scalars),
        )  # fmt: skip


def _blocks(image: Tensor, ranks: _Ranks, ring: bool) -> Iterator[tuple[int, slice, Tensor]]:
    """The images of each rank with their columns, or all of them as this rank's."""
    if not ring:
        yield ranks.rank, slice(0, ranks.total), image
        return
    for source, image_CD in ranks.travel(image):
        yield source, ranks.parts[source], image_CD


def _of_columns(names: Sequence[str], parts: Sequence[Tensor], columns: slice) -> list[Tensor]:
    """The part of each field that belongs to `columns`."""
    return [part[columns] if name.endswith("_N") else part for name, part in zip(names, parts, strict=False)]


def _merge(fields: Sequence[str], blocks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The fields over the columns of all blocks, in the order of ranks."""
    merged = []
    for name, *parts in zip(fields, *blocks, strict=True):
        if name.endswith("_N"):
            merged.append(torch.cat(parts))
        else:
            merged.append(reduce(torch.logaddexp if name == "row_lse_M" else torch.add, parts))
    return merged


class _JoinColumns(torch.autograd.Function):
    """This rank's column log-sum-exps to the global ones, given too; the gradient needs no exchange."""

    @staticmethod
    def forward(ctx: Any, own_N: Tensor, lse_N: Tensor) -> Tensor:
        ctx.save_for_backward(own_N, lse_N)
        return lse_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        own_N, lse_N = ctx.saved_tensors
        return torch.where(own_N == -math.inf, 0, grad_N * (own_N - lse_N).exp()), None


# Loss from the sums


def _as_scalar(value: Tensor | float, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


class _ScaleGradient(torch.autograd.Function):
    """The value as it is, its gradient times `factor`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _direction_loss(
    positive: Tensor,
    lse: Tensor,
    extra: Tensor | None,
    extras: Tensor,
    logits: Tensor | None,
    others: Tensor,
    smoothing: float,
) -> Tensor:
    """Loss of each row (or column) from sums over the `others` unmasked cells beside the diagonal."""
    loss = -functional.logsigmoid(positive - lse)
    if extra is not None:
        loss = loss + (1 - smoothing) * (extras * positive - extra) / (1 + extras)
    if logits is not None:
        loss = loss + smoothing * (others * positive - logits) / (1 + others)
    return torch.where(others > extras, loss, 0)


def _pair_losses(
    sums: _Sums,
    ranks: _Ranks,
    weights_M: Tensor,
    bank: int,
    smoothing: float,
    directions: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Losses and weights of all N pairs, on every rank; gradients reach this rank's sums only."""
    N = ranks.total
    row_loss_M = _direction_loss(
        sums.positive_M, sums.row_lse_M, sums.row_extra_M, sums.row_extras_M, sums.row_logits_M,
        N + bank - 1 - sums.row_masked_M, smoothing,
    )  # fmt: skip
    if ranks.group is None:
        positive_N, row_loss_N, weights_N, columns = sums.positive_M, row_loss_M, weights_M, sums
    else:
        own_M3 = torch.stack([sums.positive_M, row_loss_M, weights_M], 1).detach()
        positive_N, row_loss_N, weights_N = ranks.gather_rows(own_M3).unbind(1)
        positive_N, row_loss_N = ranks.place(sums.positive_M, positive_N), ranks.place(row_loss_M, row_loss_N)
        columns = _join_columns(sums, ranks)
    col_loss_N = _direction_loss(
        positive_N, columns.col_lse_N, columns.col_extra_N, columns.col_extras_N, columns.col_logits_N,
        N - 1 - columns.col_masked_N, smoothing,
    )  # fmt: skip
    return directions[0] * row_loss_N + directions[1] * col_loss_N, weights_N


def _join_columns(sums: _Sums, ranks: _Ranks) -> _Sums:
    """`sums` with the column vectors over the texts of all ranks."""
    names = ["col_masked_N", "col_extras_N", "col_extra_N", "col_logits_N"]
    parts = {name: part for name in names if (part := getattr(sums, name)) is not None}
    top_N = sums.col_lse_N.detach().clone()
    dist.all_reduce(top_N, dist.ReduceOp.MAX, group=ranks.group)
    top_N.masked_fill_(top_N == -math.inf, 0)
    total_KN = torch.stack([(sums.col_lse_N - top_N).exp(), *parts.values()]).detach()
    dist.all_reduce(total_KN, group=ranks.group)
    joined = {"col_lse_N": _JoinColumns.apply(sums.col_lse_N, total_KN[0].log() + top_N)}
    for (name, part), total_N in zip(parts.items(), total_KN[1:], strict=True):
        # The other ranks' share is a constant here.
        joined[name] = total_N + (part - part.detach())
    return sums._replace(**joined)


# Validation


def _require_tensor(name: str, value: Any, like: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor of shape {shape}: {meaning}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}: {meaning}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device}, where text_MD is")


def _require_features(text_MD: Tensor, image_MD: Tensor, bank_QD: Tensor | None) -> None:
    if not isinstance(text_MD, Tensor):
        raise TypeError(f"text_MD is a {type(text_MD).__name__}, expected a tensor [M, D]")
    if text_MD.dim() != 2 or not 1 <= text_MD.shape[1] <= 1024:
        raise ValueError(f"text_MD has shape {tuple(text_MD.shape)}, expected [M, D] with D from 1 to 1024")
    if text_MD.dtype not in DTYPES:
        raise TypeError(f"text_MD is {text_MD.dtype}, expected float16, bfloat16, float32 or float64")
    M, D = text_MD.shape
    _require_tensor("image_MD", image_MD, text_MD, (M, D), "one image a text")
    if bank_QD is not None:
        if not isinstance(bank_QD, Tensor):
            raise TypeError(f"bank_QD is a {type(bank_QD).__name__}, expected a tensor [Q, {D}]")
        if bank_QD.dim() != 2:
            raise ValueError(f"bank_QD has shape {tuple(bank_QD.shape)}, expected [Q, {D}]")
        _require_tensor("bank_QD", bank_QD, text_MD, (len(bank_QD), D), "Q rows as wide as text_MD")
        if bank_QD.requires_grad:
            raise ValueError("bank_QD requires grad, expected constants: pass bank_QD.detach()")
    for name, features in (("image_MD", image_MD), ("bank_QD", bank_QD)):
        if features is not None and features.dtype != text_MD.dtype:
            raise TypeError(f"{name} is {features.dtype} and text_MD is {text_MD.dtype}: cast them to one dtype")


def _require_scalar(name: str, value: Any, like: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected () or (1,)")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}, expected a floating-point tensor")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, expected {like.device}, where text_MD is")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number or a 1-element tensor")
    elif not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def _require_ids(name: str, ids: Tensor | None, like: Tensor, size: int, meaning: str) -> None:
    if ids is None:
        return
    _require_tensor(name, ids, like, (size,), meaning)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} is {ids.dtype}, expected int64: {meaning}")


def _require_options(
    text_MD: Tensor,
    pair_weights: Tensor | None,
    positives: str,
    label_smoothing: float,
    directions: Sequence[float],
) -> None:
    if positives not in ("pair", "ids"):
        raise ValueError(f"positives is {positives!r}, expected 'pair' or 'ids'")
    if not isinstance(label_smoothing, int | float):
        raise TypeError(f"label_smoothing is a {type(label_smoothing).__name__}, expected a number in [0, 1)")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1)")
    pair = isinstance(directions, tuple | list) and len(directions) == 2
    if not pair or not all(isinstance(part, int | float) for part in directions):
        raise TypeError(f"direction_weights is {directions!r}, expected two numbers (text->image, image->text)")
    if not (min(directions) >= 0 and 0 < sum(directions) < math.inf):
        raise ValueError(f"direction_weights is {directions!r}, expected numbers >= 0 with a positive sum")
    if pair_weights is not None:
        _require_tensor("pair_weights", pair_weights, text_MD, (len(text_MD),), "one weight a pair")
        if not pair_weights.is_floating_point():
            raise TypeError(f"pair_weights is {pair_weights.dtype}, expected a floating-point tensor")
        if _may_read(pair_weights) and not bool(((pair_weights >= 0) & (pair_weights < math.inf)).all()):
            raise ValueError("pair_weights has negative or non-finite entries, expected finite numbers >= 0")


def _require_excluded(excluded: Any, text_MD: Tensor) -> None:
    if excluded is None:
        return
    if not isinstance(excluded, tuple | list) or len(excluded) != 2:
        raise TypeError(f"excluded is a {type(excluded).__name__}, expected two int64 tensors (rows, columns)")
    for at, (name, part) in enumerate(zip(("rows", "columns"), excluded, strict=True)):
        if not isinstance(part, Tensor):
            raise TypeError(f"excluded[{at}] ({name}) is a {type(part).__name__}, expected an int64 tensor [E]")
        if part.dim() != 1:
            raise ValueError(f"excluded[{at}] ({name}) has shape {tuple(part.shape)}, expected [E]")
        _require_ids(f"excluded[{at}]", part, text_MD, len(excluded[0]), f"{name}, one a cell")


def _require_excluded_range(excluded: tuple[Tensor, Tensor] | None, rows: int, columns: int) -> None:
    if excluded is None or not len(excluded[0]) or not _may_read(excluded[0]):
        return
    for name, part, stop in (("[0] (rows)", excluded[0], rows), ("[1] (columns)", excluded[1], columns)):
        low, high = (int(end) for end in part.aminmax())
        if low < 0 or high >= stop:
            raise ValueError(f"excluded{name} spans {low} to {high}, expected 0 to {stop - 1}")


def _require_arguments(
    text_MD: Tensor,
    image_MD: Tensor,
    bank_QD: Tensor | None,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    image_ids: Tensor | None,
    caption_ids: Tensor | None,
    bank_ids: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    pair_weights: Tensor | None,
    positives: str,
    group: dist.ProcessGroup | None,
    exchange: str,
    label_smoothing: float = 0.0,
    direction_weights: Sequence[float] = (0.5, 0.5),
) -> dict[str, float]:
    """Raises for what the losses refuse on one rank; returns what all ranks must agree on, by its description."""
    _require_features(text_MD, image_MD, bank_QD)
    M, Q = len(text_MD), 0 if bank_QD is None else len(bank_QD)
    _require_scalar("logit_scale", logit_scale, text_MD)
    if logit_bias is not None:
        _require_scalar("logit_bias", logit_bias, text_MD)
    _require_ids("image_ids", image_ids, text_MD, M, "one id a pair")
    _require_ids("caption_ids", caption_ids, text_MD, M, "one id a pair")
    if bank_ids is not None and bank_QD is None:
        raise ValueError("bank_ids is given without bank_QD, whose rows it names: pass both")
    _require_ids("bank_ids", bank_ids, text_MD, Q, "one id a bank row")
    if bank_ids is not None and image_ids is None:
        raise ValueError("bank_ids is given without image_ids, which it is compared with: pass both")
    _require_excluded(excluded, text_MD)
    _require_options(text_MD, pair_weights, positives, label_smoothing, direction_weights)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}, expected a ProcessGroup that this rank belongs to")
    if exchange not in ("gather", "ring"):
        raise ValueError(f"exchange is {exchange!r}, expected 'gather' or 'ring'")
    return {
        "the width D of text_MD": text_MD.shape[1],
        "the dtype of text_MD (its index)": DTYPES.index(text_MD.dtype),
        "whether image_MD requires grad": image_MD.requires_grad,
        "the number Q of bank rows": Q,
        "whether image_ids is given": image_ids is not None,
        "whether caption_ids is given": caption_ids is not None,
        "whether positives is 'ids'": positives == "ids",
        "whether exchange is 'ring'": exchange == "ring",
    }


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
    exchange: Exchange = "gather",
) -> ContrastiveOutput:
    """Symmetric InfoNCE between the texts and images of all ranks, with a bank of further images.

    Logits are z_ij = logit_scale * <text_i, column_j> + logit_bias, on the features as given (normalise them
    first); columns are the N images of all ranks in rank order, then the Q bank rows. Pair i loses

        a * (lse_j z_ij - mean_{p in P(i)} z_ip) + b * (lse_k z_ki - mean_{p in P'(i)} z_pi)

    with j over the unmasked columns of row i, k over the unmasked texts of all ranks in column i, P and P'
    the positives there and (a, b) = direction_weights. The loss is the mean over the pairs of all ranks,
    weighted by `pair_weights`. With one positive and a = b = 1/2 this is CLIP's loss (Radford et al. 2021,
    figure 3); with several it is SupCon's L_out (Khosla et al. 2020, equation 2): log-probabilities are
    averaged over the positives, and the positives stay in the denominator.

    Args:
        text_MD: [M, D] fp16, bf16, fp32 or fp64, D up to 1024; this rank's texts. M may differ between ranks
            or be 0.
        image_MD: [M, D], same dtype; image i belongs to text i. Without `requires_grad` its gradient, and the
            exchange that it needs, are skipped.
        bank_QD: [Q, D], same dtype, constant, the same rows on every rank: more negatives from text to image.
        logit_scale: the multiplier itself, not its logarithm: a number or a tensor of shape () or (1,).
        logit_bias: added to every logit, likewise. A softmax does not see it: it shifts `positive_logit_M`,
            and its gradient is exactly 0.
        pair_weights: [M] floats >= 0, constants. A pair of weight 0 costs nothing and still is a negative of
            others; if all weights are 0, so are the loss and all gradients.
        positives: "pair": a pair's one positive is its own cell, and cells of equal ids are masked. "ids":
            cells of equal ids are positives too.
        image_ids: [M] int64; a cell has equal ids when the image ids of its row and its column agree,
        caption_ids: [M] int64; or when their caption ids agree.
        bank_ids: [Q] int64, image ids of the bank; needs `image_ids`. Without it no bank cell has equal ids.
        excluded: (rows, columns), two int64 tensors [E]; row in [0, M), column in [0, N + Q). These cells are
            masked in both directions, except where they are positives.
        label_smoothing: in [0, 1); this share of the target is spread evenly over unmasked cells, positives
            included.
        direction_weights: (a, b), each >= 0; not divided by their sum.
        group: the ranks that share the batch, each of which must call; None means this process alone.
        exchange: how images reach other ranks: "gather" holds those of all ranks at once; "ring" passes them from
            rank to rank while it computes, with no more than two ranks' images held, for batches whose N x D is
            too much. The numbers are the same up to rounding.

    Compiles without a graph break (`group=None`) and, on the fused path, is captured in CUDA graphs. Neither reads
    values: that `pair_weights` are finite and >= 0 and `excluded` is in range is then up to the caller.

    Returns:
        ContrastiveOutput in fp32 (fp64 for fp64 features); `per_pair_loss_M` and `positive_logit_M` are
        detached. A row or column without negatives has loss 0. The loss is the same on all ranks. Gradients
        are W times this rank's share of it, so that the mean over W ranks which data parallelism takes is the
        gradient of one rank holding the whole batch. Second derivatives are not supported.

    Raises:
        TypeError, ValueError: before any compute, an argument of the wrong kind, shape, device, dtype or
        range.
    """
    agreed = _require_arguments(
        text_MD, image_MD, bank_QD, logit_scale, logit_bias, image_ids, caption_ids, bank_ids, excluded,
        pair_weights, positives, group, exchange, label_smoothing, direction_weights,
    )  # fmt: skip
    M, Q = len(text_MD), 0 if bank_QD is None else len(bank_QD)

    device = text_MD.device
    agreed |= {
        "label_smoothing": label_smoothing,
        "direction_weights[0]": direction_weights[0],
        "direction_weights[1]": direction_weights[1],
    }
    ranks = _Ranks(group, M, agreed, device)
    _require_excluded_range(excluded, M, ranks.total + Q)
    as_positives, smooth = positives == "ids", label_smoothing > 0
    options = _options(ranks, image_ids, caption_ids, bank_ids, excluded, as_positives, smooth)
    scale = _as_scalar(logit_scale, device)
    parts = sums_of_all(CONTRASTIVE, text_MD, image_MD, bank_QD, [scale], options, ranks, exchange)
    sums = _Sums(*_used(parts, as_positives, smooth))

    weights_M = torch.ones_like(sums.row_masked_M) if pair_weights is None else pair_weights.detach().double()
    losses_N, weights_N = _pair_losses(sums, ranks, weights_M, Q, label_smoothing, direction_weights)
    total = weights_N.sum()
    loss = (weights_N * losses_N).sum() / torch.where(total > 0, total, 1)
    positive_M = sums.positive_M.detach()
    if logit_bias is not None:
        bias = _as_scalar(logit_bias, device).reshape(())
        # Keeps the bias in the graph, so that data parallelism sees its gradient of 0.
        loss = loss + 0 * bias
        positive_M = positive_M + bias.detach()
    dtype = torch.float64 if text_MD.dtype == torch.float64 else torch.float32
    return ContrastiveOutput(
        _ScaleGradient.apply(loss, ranks.world).to(dtype),
        losses_N[ranks.own].detach().to(dtype),
        positive_M.to(dtype),
    )


def explain(text_MD: Tensor) -> str:
    """The path that `contrastive_loss` takes for such texts, and why."""
    reason = _no_kernels(text_MD)
    if reason is not None:
        return f"chunked torch: {reason}"
    return f"fused Triton kernels: {text_MD.dtype} tensors on {text_MD.device}"
