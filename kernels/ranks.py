"""Pairs of all ranks: where this rank's lie, gathering and the ring, and a loss's sums over all of their images.

Cost of the exchange a rank, for N images of all ranks, Q bank rows and width D:

- gather: N images in their own dtype in forward; in backward nothing when images are frozen, else a reduce-scatter of
  N x D in fp32, which `sigmoid_loss` holds from forward on. Memory O((N + Q) D).
- ring: the same N images in forward, block by block while the last one is computed on, and once more in backward;
  beside them N x D in fp32 when images are trained. Memory O((M + Q) D + N), for M the longest rank's: two blocks of
  images, and in backward three of their gradients. `sigmoid_loss` makes its gradients in backward then, by 4 products.
- either: at most 2 N ids and 3 N numbers gathered, by `contrastive_loss` at most 6 N numbers reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .contract import LossArguments, Options, accumulated, require_group
from .operators import Operators

# torch 2.13 renamed both and warns of the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """Where this rank's pairs lie in the global batch, and the exchanges; `group=None` is one rank."""

    def __init__(self, group: dist.ProcessGroup | None, exchange: str, given: LossArguments) -> None:
        require_group(group, exchange)
        size = len(given.text_MD)
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ring = exchange == "ring" and self.world > 1
        self.sizes = [size] * self.world
        if group is not None and not given.trusted:
            agreed = given.agreed() | {"whether exchange is 'ring'": exchange == "ring"}
            mine = torch.tensor([size, *agreed.values()], dtype=torch.float64, device=given.text_MD.device)
            sizes, *columns = self.gather(mine).T.tolist()
            for name, values in zip(agreed, columns, strict=True):
                if len(set(values)) > 1:
                    raise ValueError(f"{name} differs between ranks: {values} in rank order, expected one value")
            self.sizes = [int(size) for size in sizes]
        self.total = sum(self.sizes)
        self.parts = [slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1])) for rank in range(self.world)]
        self.own = self.parts[self.rank]
        self.offset = self.own.start
        given.check_excluded_range(self.total)

    def gather(self, flat: Tensor) -> Tensor:
        """The equally long tensors of all ranks, stacked: [W, *shape]."""
        if self.group is None:
            return flat[None]
        out = torch.empty(self.world * flat.numel(), dtype=flat.dtype, device=flat.device)
        all_gather(out, flat.reshape(-1), group=self.group)
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

    def options(self, given: LossArguments, smooth: bool = False) -> Options:
        """What operators are told over the columns of all ranks."""
        given_ids = [ids for ids in (given.image_ids, given.caption_ids) if ids is not None]
        ids_KM = torch.stack(given_ids) if given_ids else None
        ids_KN = None if ids_KM is None else self.gather_rows(ids_KM.T).T.contiguous()
        excluded_2E = None if given.excluded is None else torch.stack([*given.excluded])
        return Options(ids_KM, ids_KN, given.bank_ids, excluded_2E, self.offset, given.positives == "ids", smooth)

    def share(self, loss: Tensor) -> Tensor:
        """The loss as it is, its gradient times W: data parallelism takes the mean over ranks."""
        shared: Tensor = _ScaleGradient.apply(loss, self.world)
        return shared

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
        reduce_scatter(out, padded, group=self.group)
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


def sums_of_all(
    operators: Operators,
    given: LossArguments,
    scalars: Sequence[Tensor],
    options: Options,
    ranks: Ranks,
    constants: Sequence[Tensor] = (),
) -> Sequence[Tensor]:
    """The fields of `operators` for this rank's texts against the images of all ranks, differentiable."""
    features = given.text_MD, given.image_MD, given.bank_QD
    if ranks.group is None:
        sums: list[Tensor] = operators.sums(*features, *scalars, *constants, *options)
        return sums
    over_ranks: tuple[Tensor, ...] = _OverRanks.apply(*features, operators, options, ranks, *scalars, *constants)
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
        options: Options,
        ranks: Ranks,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        image = image_MD.contiguous() if ranks.ring else ranks.gather_rows(image_MD)
        blocks: dict[int, list[Tensor]] = {}
        for source, columns, image_CD in _blocks(image, ranks):
            own = source == ranks.rank
            if own or len(image_CD):
                of_block = options.of_block(columns, ranks.total, own)
                blocks[source] = operators.sums(text_MD, image_CD, bank_QD if own else None, *factors, *of_block)
        sums = _merge(operators.fields, [blocks[source] for source in sorted(blocks)])
        ctx.save_for_backward(text_MD, image, bank_QD, *factors, *operators.keep(sums))
        ctx.factors = len(factors)
        ctx.operators, ctx.options, ctx.ranks = operators, options, ranks
        ctx.mark_non_differentiable(*sums[operators.differentiable :])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        operators, ranks = ctx.operators, ctx.ranks
        text_MD, image, bank_QD, *saved = ctx.saved_tensors
        factors, kept = saved[: ctx.factors], saved[ctx.factors :]
        scalars = factors[: operators.scalars]
        (need_text, need_image), need_scalars = ctx.needs_input_grad[:2], ctx.needs_input_grad[6 : 6 + len(scalars)]
        need_rows = need_text or need_scalars[0]
        dtype = accumulated(text_MD.dtype)
        d_text_MD = text_MD.new_zeros(text_MD.shape, dtype=dtype)
        d_scalars = [text_MD.new_zeros((), dtype=torch.float64) for _ in scalars]
        d_image: Tensor | None = None
        works: list[dist.Work] = []
        for source, columns, image_CD in _blocks(image, ranks):
            own = source == ranks.rank
            d_CD = image_CD.new_empty((0, image_CD.shape[1]), dtype=dtype)
            if own or len(image_CD):
                d_MD, d_CD, *d_block = operators.gradients(
                    text_MD, image_CD, bank_QD if own else None, *factors,
                    *ctx.options.of_block(columns, ranks.total, own),
                    *_of_columns(operators.kept, kept, columns, own),
                    _of_columns(operators.fields, grads[: operators.differentiable], columns),
                    need_rows, need_image,
                )  # fmt: skip
                d_scalars = [total + part for total, part in zip(d_scalars, d_block, strict=True)]
                if need_rows:
                    d_text_MD += d_MD
            if need_image and ranks.ring:
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
            None, None, None, None,
            *operators.of_scalars(d_scalars, scalars, need_scalars),
            *[None] * (len(factors) - len(scalars)),
        )  # fmt: skip


def _blocks(image: Tensor, ranks: Ranks) -> Iterator[tuple[int, slice, Tensor]]:
    """The images of each rank with their columns, or all of them as this rank's."""
    if not ranks.ring:
        yield ranks.rank, slice(0, ranks.total), image
        return
    for source, image_CD in ranks.travel(image):
        yield source, ranks.parts[source], image_CD


def _of_columns(names: Sequence[str], parts: Sequence[Tensor], columns: slice, own: bool = True) -> list[Tensor]:
    """The part of each field that belongs to `columns`; what forward made of the rows goes with a rank's own."""
    found = [part[columns] if name.endswith("_N") else part for name, part in zip(names, parts, strict=False)]
    return [
        part if own or not name.endswith("_MD") else part.new_empty(0) for name, part in zip(names, found, strict=False)
    ]


def _merge(fields: Sequence[str], blocks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The fields over the columns of all blocks, in the order of ranks."""
    merged = []
    for name, *parts in zip(fields, *blocks, strict=True):
        if name.endswith("_N"):
            merged.append(torch.cat(parts))
        elif name == "row_mean_MD":
            # Each is weighted by its own block's softmax.
            lse_M, lses = merged[fields.index("row_lse_M")], [block[fields.index("row_lse_M")] for block in blocks]
            shares = [(of_block - lse_M).exp().nan_to_num_(0.0)[:, None] for of_block in lses]
            made = [part * share.to(part.dtype) for part, share in zip(parts, shares, strict=True) if part.numel()]
            merged.append(reduce(torch.add, made) if made else parts[0])
        else:
            merged.append(reduce(torch.logaddexp if name == "row_lse_M" else torch.add, parts))
    return merged


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
