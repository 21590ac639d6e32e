"""The training loss: contrast over all ranks and the bank, regression to the frozen rows, masked-language modelling.

Data parallelism averages gradients over W ranks, so every mean here is global sum / global count x W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from efficientclip.kernels import contrastive_loss

from ..config import MaskedLanguageModelling, Objective
from ..data.batches import Batch


@dataclass
class Losses:
    """`total` (0-dim) is to be differentiated; the parts are detached: `contrastive` global, the sums this rank's."""

    total: torch.Tensor
    contrastive: torch.Tensor
    regression_sum: torch.Tensor
    cosine_M: torch.Tensor
    log_probability_M: torch.Tensor
    """Minus the unweighted contrastive loss of each of this rank's pairs; 0 without contrast."""


def pair_losses(features_MD: torch.Tensor, logit_scale: torch.Tensor, batch: Batch, objective: Objective) -> Losses:
    """Loss of this rank's M pairs in the union batch of all ranks, and what ECL may score them by."""
    world_size = dist.get_world_size()
    zero = features_MD.sum() * 0
    frozen_MD = batch.frozen_MD
    if frozen_MD is None:
        raise ValueError("this batch has no frozen rows: both_sides_loss is its loss")
    # A cosine in fp16 has three digits.
    target_MD = frozen_MD.float()
    contrastive, cosine_M = zero, (features_MD.detach() * target_MD).sum(1)
    log_probability_M = torch.zeros_like(cosine_M)
    if objective.contrastive_weight > 0:
        contrast = contrastive_loss(
            features_MD,
            frozen_MD,
            batch.bank_QD,
            logit_scale=logit_scale,
            pair_weights=batch.weights_M,
            excluded=batch.excluded,
            label_smoothing=objective.label_smoothing,
            direction_weights=objective.direction_weights,
            group=dist.group.WORLD,
            exchange=objective.exchange,
            trusted=True,
        )
        contrastive, log_probability_M = contrast.loss, -contrast.per_pair_loss_M
    distance_M = (1 - F.cosine_similarity(features_MD, target_MD)) * batch.weights_M
    regression = distance_M.sum() * (world_size / max(float(batch.weights_N.sum()), 1.0))
    total = objective.contrastive_weight * contrastive + objective.regression_weight * regression
    return Losses(total, contrastive.detach(), distance_M.sum().detach(), cosine_M, log_probability_M)


@dataclass
class Keys:
    """What momentum copies (WenLan's BriVL, arXiv 2103.06561) make of a batch [M, D], and queues of it [Q, D]."""

    text_MD: torch.Tensor
    image_MD: torch.Tensor
    text_queue_QD: torch.Tensor
    image_queue_QD: torch.Tensor


def both_sides_loss(
    text_MD: torch.Tensor,
    image_MD: torch.Tensor,
    logit_scale: torch.Tensor,
    batch: Batch,
    objective: Objective,
    keys: Keys | None = None,
) -> Losses:
    """Loss where both towers train: CLIP's, symmetric over the union batch of all ranks; or, with `keys`, BriVL's.

    There each side is told from the keys of the other: the batch's and, as further negatives, the queue's.
    """
    shared: dict[str, Any] = {
        "logit_scale": logit_scale,
        "caption_ids": batch.caption_ids_M,
        "image_ids": batch.image_ids_M,
        "label_smoothing": objective.label_smoothing,
        "group": dist.group.WORLD,
        "exchange": objective.exchange,
        "trusted": True,
    }
    if keys is None:
        loss, loss_M, _ = contrastive_loss(text_MD, image_MD, direction_weights=objective.direction_weights, **shared)
    else:
        to_image, to_text = objective.direction_weights
        image, text = (
            contrastive_loss(side_MD, key_MD, queue_QD, direction_weights=(weight, 0.0), **shared)
            for side_MD, key_MD, queue_QD, weight in (
                (text_MD, keys.image_MD, keys.image_queue_QD, to_image),
                (image_MD, keys.text_MD, keys.text_queue_QD, to_text),
            )
        )
        loss, loss_M = image.loss + text.loss, image.per_pair_loss_M + text.per_pair_loss_M
    cosine_M = (text_MD.detach() * image_MD.detach()).sum(1)
    return Losses(objective.contrastive_weight * loss, loss.detach(), loss.new_zeros(()), cosine_M, -loss_M)


def mlm_loss(mlm_loss_sum: torch.Tensor, masked_everywhere: torch.Tensor, mlm: MaskedLanguageModelling) -> torch.Tensor:
    """Weighted mean over the masked positions of all ranks, from this rank's sum."""
    factor = mlm.weight * dist.get_world_size() / masked_everywhere.clamp(min=1)
    return mlm_loss_sum * factor.to(mlm_loss_sum.dtype)
