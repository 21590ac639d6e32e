"""Symmetric InfoNCE (CLIP) over a batch, a bank of images and any number of ranks, with no M x N matrix.

The diagonal (each pair's own logit) never enters a log-sum-exp. With n the log-sum-exp of a row's other
logits and z its own logit, the loss is softplus(n - z) and its slope sigmoid(n - z): precise where p - 1
would cancel. What the tiles cost stands in `chunked` and `triton.contrastive`, what the exchange costs in `ranks`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .chunked import ChunkedContrastive
from .contract import (
    ContrastiveArguments,
    ContrastiveGrads,
    ContrastiveKept,
    ContrastiveOutput,
    ContrastiveSums,
    Exchange,
    Options,
    Positives,
    accumulated,
    weighted_mean,
)
from .operators import Operators, Walk
from .paths import no_kernels, takes_kernels
from .ranks import Ranks, sums_of_all

# Naive reference


def contrastive_loss_naive(
    text_MD: Tensor, image_MD: Tensor, bank_QD: Tensor | None = None, **options: Any
) -> ContrastiveOutput:
    """The definition of `contrastive_loss`, with its options, on one rank: the whole matrix, under autograd."""
    given = ContrastiveArguments(text_MD, image_MD, bank_QD, **options)
    M, smoothing = len(text_MD), given.label_smoothing
    logits, positive, masked = given.whole_matrix()
    kept = ~masked

    def direction(logits: Tensor, kept: Tensor, positive: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.masked_fill(~kept, -math.inf), dim=1).masked_fill(~kept, 0)
        target = (1 - smoothing) * positive.to(logits.dtype) / positive.sum(1, keepdim=True)
        target = target + smoothing * kept.to(logits.dtype) / kept.sum(1, keepdim=True)
        return torch.where((kept & ~positive).any(1), -(target * log_p).sum(1), 0)

    row_loss = direction(logits, kept, positive)
    col_loss = direction(logits[:, :M].T, kept[:, :M].T, positive[:, :M].T)
    pair_loss = given.direction_weights[0] * row_loss + given.direction_weights[1] * col_loss
    loss = weighted_mean(pair_loss, given.weights(logits.dtype))
    return ContrastiveOutput(loss, pair_loss.detach(), logits.diagonal()[:M].detach().clone())


# Choice of the path


def walk(text_MD: Tensor, image_ND: Tensor, bank_QD: Tensor | None, scale: Tensor, options: Options) -> Walk:
    """What walks over the tiles."""
    # Without texts or images there is no tile, and nothing to walk over.
    if takes_kernels(text_MD, "contrastive_loss", no_kernels(text_MD)) and len(text_MD) and len(image_ND):
        from .triton.contrastive import TritonContrastive

        return TritonContrastive(text_MD, image_ND, bank_QD, scale, options)
    return ChunkedContrastive(text_MD, image_ND, bank_QD, scale, options)


def _absent(options: Options) -> list[str]:
    extra, logits = ["row_extra_M", "col_extra_N"], ["row_logits_M", "col_logits_N"]
    means = [] if options.made_in_forward else ["row_mean_MD"]
    return ([] if options.as_positives else extra) + ([] if options.smooth else logits) + means


def _made_in_forward(given: ContrastiveArguments) -> int:
    """See `Options`. Kernels keep a tile's sums in registers, where a row as wide as D has no room beside them."""
    scale, image_MD = given.logit_scale, given.image_MD
    wanted = given.text_MD.requires_grad or (isinstance(scale, Tensor) and scale.requires_grad)
    plain = given.positives == "pair" and not given.label_smoothing
    if not (wanted and plain and torch.is_grad_enabled()) or no_kernels(given.text_MD) is None:
        return 0
    if given.direction_weights[1] == 0 and not image_MD.requires_grad:
        return 2
    return int(given.bank_rows > 0)


OPERATORS = Operators("contrastive", walk, ["scale"], ContrastiveSums, ContrastiveKept, ContrastiveGrads, _absent)


# Loss from the sums


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


def _pair_losses(sums: ContrastiveSums, ranks: Ranks, given: ContrastiveArguments) -> tuple[Tensor, Tensor]:
    """Losses and weights of all N pairs, on every rank; gradients reach this rank's sums only."""
    smoothing, directions, weights_M = given.label_smoothing, given.direction_weights, given.weights(torch.float64)
    N = ranks.total
    row_loss_M = _direction_loss(
        sums.positive_M, sums.row_lse_M, sums.row_extra_M, sums.row_extras_M, sums.row_logits_M,
        N + given.bank_rows - 1 - sums.row_masked_M, smoothing,
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


def _join_columns(sums: ContrastiveSums, ranks: Ranks) -> ContrastiveSums:
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


# Public functions


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
    trusted: bool = False,
) -> ContrastiveOutput:
    """Symmetric InfoNCE between the texts and images of all ranks, with a bank of further images.

    Logits are z_ij = logit_scale * <text_i, column_j> + logit_bias, on the features as given (normalise them
    first); columns are the N images of all ranks in rank order, then the Q bank rows. Pair i loses

        a * (lse_j z_ij - mean_{p in P(i)} z_ip) + b * (lse_k z_ki - mean_{p in P'(i)} z_pi)

    with j over the unmasked columns of row i, k over the unmasked texts of all ranks in column i, P and P'
    the positives there and (a, b) = direction_weights. The loss is the mean over the pairs of all ranks,
    weighted by `pair_weights`. With one positive and a = b = 1/2 this is CLIP's loss (Radford et al. 2021,
    figure 3); with several it is SupCon's L_out (Khosla et al. 2020, equation 2): log-probabilities are
    averaged over the positives, and the positives stay in the denominator. `logit_bias` shifts `positive_logit_M`
    alone, as a softmax does not see it, and its gradient is exactly 0.

    Args:
        text_MD, image_MD, bank_QD: [M, D], [M, D] and [Q, D] of one dtype, fp16, bf16, fp32 or fp64, D up to 1024.
        logit_scale, logit_bias: numbers, or tensors of shape () or (1,).
        pair_weights: [M] floats; image_ids, caption_ids: [M] int64; bank_ids: [Q] int64; excluded: two [E] int64.
        positives, label_smoothing, direction_weights, trusted: as `contract.ContrastiveArguments` says, like all.
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
    given = ContrastiveArguments(
        text_MD, image_MD, bank_QD, logit_scale, logit_bias, pair_weights, positives, image_ids, caption_ids, bank_ids,
        excluded, label_smoothing, direction_weights, trusted=trusted,
    )  # fmt: skip
    given.check()
    ranks = Ranks(group, exchange, given)
    options = ranks.options(given, smooth=label_smoothing > 0)
    options = options._replace(one_way=direction_weights[1] == 0, made_in_forward=_made_in_forward(given))
    parts = sums_of_all(OPERATORS, given, [given.as_scalar(logit_scale)], options, ranks)
    sums = ContrastiveSums(*OPERATORS.used(options, OPERATORS.fields, parts))
    losses_N, weights_N = _pair_losses(sums, ranks, given)
    loss, positive_M = weighted_mean(losses_N, weights_N), sums.positive_M.detach()
    if logit_bias is not None:
        bias = given.as_scalar(logit_bias).reshape(())
        # Keeps the bias in the graph, so that data parallelism sees its gradient of 0.
        loss = loss + 0 * bias
        positive_M = positive_M + bias.detach()
    dtype = accumulated(text_MD.dtype)
    return ContrastiveOutput(ranks.share(loss).to(dtype), losses_N[ranks.own].detach().to(dtype), positive_M.to(dtype))


def explain(text_MD: Tensor) -> str:
    """The path that losses and scores take for such features, and why."""
    reason = no_kernels(text_MD)
    if reason is not None:
        return f"chunked torch: {reason}"
    return f"fused Triton kernels: {text_MD.dtype} tensors on {text_MD.device}"
