"""What towers say about pairs that they did not train on: the p of a pair is the share of its source's other captions
that fit its picture at least as well.

What the picture shows is told by its features and by its other captions. A wrong caption that the source itself mixed
up is one of these others, so its p is uniform: the null is exact however good the tower is. One from elsewhere fits
worse than they do. What a caption means is told by its words, and in a second p by its other pictures too: that one
tells single pairs better apart, but believes a wrong caption that stands on all pictures of a subject.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ..data.store import Edges, ranges
from .neighbourhoods import ROWS, Features, Integers, best_device, rows_of

Floats = npt.NDArray[np.float64]

NULL_CAPTIONS = 4096
TESTIMONY = 1.0  # weight of a picture's other captions, and of a caption's other pictures, beside its own features
MOST_WITNESSES = 1024  # what has more captions or pictures stands for no subject: they do not testify
ROUNDING = 1e-5  # of scores: nearer ones beat each other in part
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores at a time, of a device


class Answers(NamedTuple):
    """Of pairs, float64 [pairs] each: p by the caption's words, by its other pictures too, and the pair's cosine."""

    p: Floats
    p_with_pictures: Floats
    cosine: Floats


def null_captions(caption_ids: Integers, seed: int) -> tuple[Integers, Integers]:
    """The distinct captions of some pairs, ascending, and how often these hold them.

    Of more than NULL_CAPTIONS as many pairs are drawn: p = .05 is then known to .0034.
    """
    null, weights = np.unique(caption_ids, return_counts=True)
    if len(null) > NULL_CAPTIONS:
        drawn = np.random.default_rng([seed, 6]).integers(0, len(caption_ids), NULL_CAPTIONS)
        null, weights = np.unique(caption_ids[drawn], return_counts=True)
    return null, weights


@torch.no_grad()
def answers(
    text_KD: Features,
    image_VD: Features,
    caption_ids: Integers,
    image_ids: Integers,
    captions_of: Edges,
    images_of: Edges,
    null: tuple[Integers, Integers],
    device: torch.device | None = None,
) -> Answers:
    """What a tower says of the pairs (caption, image); features may be mapped files.

    p is the share of the `null` captions, as `null_captions` tells and weighs them, that score higher on the pair's
    image; equal scores count half, captions that `captions_of` (image -> captions, these pairs among them) ties to the
    image do not count, but testify, all but the pair's own, to what the image shows. So do the other images that
    `images_of` (caption -> images) ties to a caption, to what it means, in the second p: all but the pair's own, and
    one of each null caption's; a caption without others is judged by its words. Two products, [pairs, null captions],
    in blocks that stay in a cache.
    """
    device, n = device or best_device(), len(caption_ids)
    null_ids, weights = null
    weights_M = torch.from_numpy(weights).to(device, torch.float32)
    null_MD = rows_of(text_KD, null_ids, device)
    # As of the pair's own caption one image is left out, or a wrong one would be no draw from these.
    rest = images_of[0][null_ids] + 1, images_of[0][null_ids + 1]
    pictured_MD, heard_M = _testimony(image_VD, images_of[1], *rest, device)
    # The column takes a pair's own score off: what is left tells a better caption by 1, an equal by .5, others by 0.
    nulls_ME = [F.pad(side, (0, 1), value=1.0) for side in (null_MD, _told(null_MD, pictured_MD, heard_M))]
    images, place = np.unique(image_ids, return_inverse=True)
    captions, caption_place = np.unique(caption_ids, return_inverse=True)
    testimony_ID, heard_I = _testimony(text_KD, captions_of[1], *_ends(captions_of, images), device, own=1)
    pictured_CD, heard_C = _testimony(image_VD, images_of[1], *_ends(images_of, captions), device, own=1)
    alone = np.diff(_ends(images_of, caption_ids), axis=0)[0] == 1
    column, columns, first = _linked_columns(captions_of, images, null_ids)
    found = np.empty((3, n))
    at_once = max(1, BLOCK[device.type] // len(null_ids))
    for begin in range(0, n, at_once):
        rows = slice(begin, begin + at_once)
        of, named = (torch.from_numpy(side[rows]).to(device) for side in (place, caption_place))
        image_PD = rows_of(image_VD, image_ids[rows], device)
        text_PD = rows_of(text_KD, caption_ids[rows], device)
        shown_PD = _told(image_PD, testimony_ID[of] - text_PD, heard_I[of])
        meant_PD = _told(text_PD, pictured_CD[named] - image_PD, heard_C[named])
        linked = columns[place[rows]]
        pair, at = np.repeat(np.arange(len(linked)), linked), column[ranges(first[place[rows]], linked)]
        counted = weights.sum() - np.bincount(pair, weights[at], minlength=len(linked))
        tied = torch.from_numpy(pair).to(device), torch.from_numpy(at).to(device)
        for number, (own_PD, null_ME) in enumerate(zip((text_PD, meant_PD), nulls_ME, strict=True)):
            own_P1 = (own_PD * shown_PD).sum(1, keepdim=True)
            asked_PE = torch.cat([shown_PD / (2 * ROUNDING), 0.5 - own_P1 / (2 * ROUNDING)], 1)
            beats_PM = (asked_PE @ null_ME.T).clamp_(0, 1)
            beats_PM[tied] = 0
            # The half keeps p above 0: nobody beats a caption by less than one draw.
            found[number, rows] = ((beats_PM @ weights_M).double().cpu().numpy() + 0.5) / (counted + 1)
        found[2, rows] = (text_PD * image_PD).sum(1).double().cpu().numpy()
    found[1, alone] = found[0, alone]
    return Answers(*found)


def _told(features_PD: torch.Tensor, others_PD: torch.Tensor, heard_P: torch.Tensor) -> torch.Tensor:
    return F.normalize(features_PD + heard_P[:, None] * others_PD, dim=1)


def _ends(ties: Edges, ids: Integers) -> tuple[Integers, Integers]:
    """Where the ties of each of `ids` begin and end."""
    return ties[0][ids], ties[0][ids + 1]


def _testimony(
    features: Features, tied: Integers, starts: Integers, ends: Integers, device: torch.device, own: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each run in `tied` the sum of its features, float32 [runs, width], and the weight, float32 [runs], of what is
    left of it when the pair's `own` is taken off."""
    heard = ends - starts <= MOST_WITNESSES
    total = sums(features, tied, starts, np.where(heard, ends - starts, 0), device)
    # One more than testify, so that a single one does not speak for all.
    return total, torch.from_numpy(TESTIMONY * heard / (ends - starts - own + 1)).to(device, torch.float32)


def sums(features: Features, tied: Integers, starts: Integers, counts: Integers, device: torch.device) -> torch.Tensor:
    """Of each run in `tied` the sum of its features, float32 [runs, width]; `counts` may be 0."""
    found, ends = [], np.cumsum(counts)
    bounds = np.unique(np.searchsorted(ends, np.arange(0, counts.sum() + ROWS, ROWS)))
    for low, high in itertools.pairwise(np.unique([0, *bounds, len(counts)])):
        some = ranges(starts[low:high], counts[low:high])
        lengths = torch.from_numpy(counts[low:high]).to(device)
        found.append(torch.segment_reduce(rows_of(features, tied[some], device), "sum", lengths=lengths, axis=0))
    return torch.cat(found)


def _linked_columns(captions_of: Edges, images: Integers, null_ids: Integers) -> tuple[Integers, Integers, Integers]:
    """Columns of `null_ids` that the captions of `images` stand in, one image after the other; how many are each
    image's, and where its first is."""
    starts, tied = captions_of
    degree = starts[images + 1] - starts[images]
    captions, image = tied[ranges(starts[images], degree)], np.repeat(np.arange(len(images)), degree)
    at = np.minimum(np.searchsorted(null_ids, captions), len(null_ids) - 1)
    there = null_ids[at] == captions
    # A pair may stand twice in a store.
    there[1:] &= (captions[1:] != captions[:-1]) | (image[1:] != image[:-1])
    columns = np.bincount(image[there], minlength=len(images))
    return at[there], columns, np.cumsum(columns) - columns
