"""SigLIP's pairwise sigmoid loss over a batch, a bank of images and any number of ranks, with no M x N matrix.

No column has a normaliser: blocks of columns are simply added up, and the slope of a logit is known as soon as the
logit is. So the gradients of the weighted loss are made in forward, and backward multiplies them by a number. What the
tiles cost stands in `chunked` and `triton.sigmoid`, what the exchange costs in `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .chunked import ChunkedSigmoid
from .contract import (
    ContrastiveOutput,
    Exchange,
    LossArguments,
    Options,
    Positives,
    SigmoidGrads,
    SigmoidKept,
    SigmoidSums,
    accumulated,
    weighted_mean,
)
from .operators import Operators
from .paths import no_kernels, takes_kernels
from .ranks import Ranks, sums_of_all


def sigmoid_loss_naive(
    text_MD: Tensor, image_MD: Tensor, bank_QD: Tensor | None = None, **options: Any
) -> ContrastiveOutput:
    """The definition of `sigmoid_loss`, with its options, on one rank: the whole matrix, under autograd."""
    given = LossArguments(text_MD, image_MD, bank_QD, **options)
    logits, positive, masked = given.whole_matrix()
    cell_loss = -functional.logsigmoid(torch.where(positive, logits, -logits))
    pair_loss = cell_loss.masked_fill(masked, 0).sum(1)
    loss = weighted_mean(pair_loss, given.weights(logits.dtype))
    return ContrastiveOutput(loss, pair_loss.detach(), logits.diagonal()[: len(text_MD)].detach().clone())


class SigmoidWalk:
    """What walks over the tiles, by whichever path; makes gradients with the sums, or else when they are asked for."""

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
        self.features, self.factors, self.options = (text_MD, image_ND, bank_QD), (scale, bias, share_M), options

    def forward(self) -> SigmoidSums:
        if takes_kernels(self.features[0], "sigmoid_loss", no_kernels(self.features[0])):
            from .triton.sigmoid import TritonSigmoid

            return TritonSigmoid(*self.features, *self.factors, self.options).forward()
        return ChunkedSigmoid(*self.features, *self.factors, self.options).forward()

    def backward(
        self, kept: SigmoidKept, grads: SigmoidGrads, need_text: bool, need_image: bool
    ) -> Sequence[Tensor | None]:
        """What was made, times the gradient of the loss."""
        wanted = need_text + 2 * need_image
        if wanted & ~self.options.made_in_forward or kept.d_bias is None:
            # The scalars' come with d text.
            self.options = self.options._replace(made_in_forward=wanted or 1)
            sums = self.forward()
            kept = SigmoidKept(sums.d_text_MD, sums.d_image_ND, sums.d_scale, sums.d_bias)
        needed = (need_text, need_image, True, True)
        return [
            part * grads.loss.to(part.dtype) if need and part is not None else None
            for need, part in zip(needed, kept, strict=True)
        ]


def _absent(options: Options) -> list[str]:
    """The fields of `SigmoidSums` that these ask not for."""
    made = options.made_in_forward
    wanted = {"d_text_MD": made & 1, "d_image_ND": made & 2, "d_scale": made, "d_bias": made}
    return [name for name, asked in wanted.items() if not asked]


OPERATORS = Operators(
    "sigmoid", SigmoidWalk, ["scale", "bias"], SigmoidSums, SigmoidKept, SigmoidGrads, _absent, ["share_M"]
)


def _made_in_forward(given: LossArguments, scalars: Sequence[Tensor], ranks: Ranks) -> int:
    """Round the ring nothing: d image of a block is added up while it travels, which backward does."""
    if ranks.ring or not torch.is_grad_enabled():
        return 0
    rows = any(part.requires_grad for part in (given.text_MD, *scalars))
    return rows + 2 * given.image_MD.requires_grad


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
    trusted: bool = False,
) -> ContrastiveOutput:
    """SigLIP's loss between the texts and images of all ranks, with a bank of further images.

    Logits are z_ij = logit_scale * <text_i, column_j> + logit_bias, on the features as given (normalise them
    first); columns are the N images of all ranks in rank order, then the Q bank rows. Pair i loses

        sum_j softplus(-y_ij z_ij)

    over the unmasked columns j, with y = +1 for positives and -1 else, and the loss is the mean over the pairs of
    all ranks, weighted by `pair_weights` (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    fp16, bf16 and fp32 on CUDA take Triton kernels (fp32 by 3xTF32, and so texts and columns of different dtypes;
    slopes rounded to the dtype of both before their products), everything else chunks of torch. Both are deterministic.

    Args:
        text_MD, image_MD, bank_QD: [M, D], [M, D] and [Q, D] in fp16, bf16 or fp32 each, or all in fp64, D up to 1024.
        logit_scale, logit_bias: numbers, or tensors of shape () or (1,).
        pair_weights: [M] floats; image_ids, caption_ids: [M] int64; bank_ids: [Q] int64; excluded: two [E] int64.
        positives, trusted: as `contract.LossArguments` says, like all of these.
        group, exchange: as for `contrastive_loss`.

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
    given = LossArguments(
        text_MD, image_MD, bank_QD, logit_scale, logit_bias, pair_weights, positives, image_ids, caption_ids, bank_ids,
        excluded, trusted=trusted,
    )  # fmt: skip
    given.check()
    ranks = Ranks(group, exchange, given)
    scalars = [given.as_scalar(value) for value in (logit_scale, 0.0 if logit_bias is None else logit_bias)]
    weights_M = given.weights(torch.float64)
    total = ranks.gather(weights_M.sum()).sum()
    share_M = weights_M / torch.where(total > 0, total, 1)
    options = ranks.options(given)._replace(made_in_forward=_made_in_forward(given, scalars, ranks))
    loss, loss_M, positive_M, *_ = sums_of_all(OPERATORS, given, scalars, options, ranks, [share_M])
    losses_W = ranks.gather(loss.detach())
    # This rank's own is the one that gradients reach.
    loss = torch.cat([losses_W[: ranks.rank], loss[None], losses_W[ranks.rank + 1 :]]).sum()
    dtype = accumulated(text_MD.dtype)
    return ContrastiveOutput(ranks.share(loss).to(dtype), loss_M.detach().to(dtype), positive_M.detach().to(dtype))
