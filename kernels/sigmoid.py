"""SigLIP's pairwise sigmoid loss over a batch, a bank of images and any number of ranks, with no M x N matrix.

No column has a normaliser, so that blocks of columns are simply added up. What the tiles cost stands in `chunked` and
`triton.sigmoid`, what the exchange costs in `ranks`.
"""

from __future__ import annotations

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
from .operators import Operators, Walk
from .paths import no_kernels, of_one_dtype, takes_kernels
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


def walk(
    text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, bias: Tensor, options: Options
) -> Walk:
    """What walks over the tiles."""
    if takes_kernels(text_MD, "sigmoid_loss", no_kernels(text_MD)):
        from .triton.sigmoid import TritonSigmoid

        text_MD, image_ND, bank_QD = of_one_dtype(text_MD, image_ND, bank_QD)
        return TritonSigmoid(text_MD, image_ND, bank_QD, scale, bias, options)
    return ChunkedSigmoid(text_MD, image_ND, bank_QD, scale, bias, options)


OPERATORS = Operators("sigmoid", walk, ["scale", "bias"], SigmoidSums, SigmoidKept, SigmoidGrads)


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
        text_MD, image_MD, bank_QD: [M, D], [M, D] and [Q, D] of one dtype, fp16, bf16, fp32 or fp64, D up to 1024.
        logit_scale, logit_bias: numbers, or tensors of shape () or (1,).
        pair_weights: [M] floats; image_ids, caption_ids: [M] int64; bank_ids: [Q] int64; excluded: two [E] int64.
        positives: as `contract.LossArguments` says, like all of these.
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
        excluded,
    )  # fmt: skip
    given.check()
    ranks = Ranks(group, exchange, given)
    scalars = [given.as_scalar(value) for value in (logit_scale, 0.0 if logit_bias is None else logit_bias)]
    loss_M, positive_M = sums_of_all(OPERATORS, given, scalars, ranks.options(given), ranks)

    own_M2 = torch.stack([loss_M, given.weights(torch.float64)], 1).detach()
    losses_N, weights_N = ranks.gather_rows(own_M2).unbind(1)
    loss = weighted_mean(ranks.place(loss_M, losses_N), weights_N)
    dtype = accumulated(text_MD.dtype)
    return ContrastiveOutput(ranks.share(loss).to(dtype), loss_M.detach().to(dtype), positive_M.detach().to(dtype))
