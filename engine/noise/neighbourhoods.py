"""Which pairs of a store stand together: near-duplicates that no fold may split, and cells of like captions or images.

Features may be mapped files: they are read in parts, and what is learned of them is learned from a bounded sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ..data.store import Store

Integers = npt.NDArray[np.integer[Any]]
Features = npt.NDArray[np.floating[Any]]

LARGEST_GROUP = 4096
# Of one product: rows are read, and cosines held, for so many at a time.
ROWS, COSINES = 1 << 14, 1 << 22
SAMPLE = 1 << 16  # rows that cells are learned from
DIRECTIONS = 64  # of the sample's most variance; cells of the full width tell no better
PASSES = 4  # of k-means over the sample
MINI_BATCH = 4096
# Below it a bar would only flicker.
LONG = 1 << 19


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_of(features: Features, rows: Integers | slice, device: torch.device) -> torch.Tensor:
    """Some rows float32 on `device`."""
    return torch.from_numpy(np.require(features[rows], requirements=["C", "W"])).to(device).float()


def near(features: npt.NDArray[np.float16], seed: int, samples: int = 1 << 20, chance: float = 0.01) -> float:
    """Cosine that a random pair of pictures exceeds with probability `chance`: what is nearer may be a duplicate."""
    random, cpu = np.random.default_rng(seed), torch.device("cpu")
    one, other = random.integers(0, len(features), (2, min(samples, 64 * len(features))))
    one, other = one[one != other], other[one != other]
    # Taken at once: small results between large ones would keep the allocator from giving these back.
    cosine = np.empty(len(one), np.float32)
    for begin in range(0, len(one), ROWS):
        here = slice(begin, begin + ROWS)
        cosine[here] = (rows_of(features, one[here], cpu) * rows_of(features, other[here], cpu)).sum(1).numpy()
    return float(np.quantile(cosine, 1 - chance)) if len(one) else 1.0


def pair_groups(store: Store, threshold: float, device: torch.device | None = None) -> npt.NDArray[np.int64]:
    """Group of each pair, int64 [pairs]: one caption on one picture and its near-duplicates (cosine >= `threshold`).

    A caption on more than LARGEST_GROUP pictures is one group.
    """
    counts = np.bincount(store.caption_ids, minlength=len(store.offsets) - 1)
    single = counts[store.caption_ids] == 1
    groups = np.empty(len(store), np.int64)
    groups[single] = np.arange(single.sum())
    recurring = np.flatnonzero(~single)
    recurring = recurring[np.argsort(store.caption_ids[recurring], kind="stable")]
    sizes = counts[counts > 1]
    # Of each recurring pair the place of its group's first one.
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    for places_BS in _alike(sizes):
        labels_BS = _components(store, recurring[places_BS], threshold, device or best_device())
        _, at, label = np.unique(labels_BS, return_index=True, return_inverse=True)
        first[places_BS] = places_BS.ravel()[at][label].reshape(places_BS.shape)
    groups[recurring] = single.sum() + np.unique(first, return_inverse=True)[1]
    return groups


def _alike(sizes: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Places [captions, size] of the pairs of captions of the same size, which lie one caption after the other."""
    starts, order = np.cumsum(sizes) - sizes, np.argsort(sizes, kind="stable")
    for size in np.unique(sizes[sizes <= LARGEST_GROUP]):
        low, high = np.searchsorted(sizes[order], [size, size + 1])
        at_once = max(1, min(COSINES // size**2, ROWS // size))
        for begin in range(low, high, at_once):
            yield starts[order[begin : min(begin + at_once, high)], None] + np.arange(size)


def _components(store: Store, pairs_BS: Integers, threshold: float, device: torch.device) -> npt.NDArray[np.int32]:
    """Labels [captions, size] of pairs that near pictures join, each within its caption."""
    B, S = pairs_BS.shape
    picture_BSD = rows_of(store.features, store.image_ids[pairs_BS.ravel()], device).view(B, S, -1)
    joined = (picture_BSD @ picture_BSD.mT >= threshold).triu(1).nonzero().cpu().numpy()
    one, other = joined[:, 0] * S + joined[:, 1], joined[:, 0] * S + joined[:, 2]
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(B * S, B * S))
    labels: npt.NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels.reshape(B, S)


def folds(groups: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int8]:
    """Fold 0 or 1 of each pair; a group is never split, and the folds are as equal as groups allow."""
    sizes = np.bincount(groups)
    order = np.random.default_rng([seed, 5]).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    fold = np.empty(len(sizes), np.int8)
    fold[order] = before >= len(groups) / 2
    return fold[groups]


@torch.no_grad()
def cells(
    sides: Sequence[Features], seed: int, device: torch.device | None = None, size: int = 32, most: int = 4096
) -> npt.NDArray[np.int32]:
    """Cell int32 [rows] of each row by k-means on the features of all `sides`, each [rows, width]: about `size` rows a
    cell, about `most` cells at most.

    Mini-batch k-means (Sculley 2010) from random rows, on the DIRECTIONS of at most SAMPLE rows, on two levels: a row
    is compared with the means of about √cells regions, and with those of its own region.
    """
    device, n, random = device or best_device(), len(sides[0]), np.random.default_rng([seed, 7])
    k = min(max(1, n // size), most)

    def together(rows: Integers | slice) -> torch.Tensor:
        return torch.cat([rows_of(features, rows, device) for features in sides], 1)

    sample = together(np.sort(random.choice(n, min(n, SAMPLE), replace=False, shuffle=False)))
    # Eigenvalues ascend.
    directions = torch.linalg.eigh(sample.T @ sample)[1][:, -DIRECTIONS:]
    sample = sample @ directions
    regions = _k_means(sample, round(k**0.5), random)
    region = _nearest(sample, regions)
    inside = [sample[region == number] for number in range(len(regions))]
    means = [_k_means(rows, -(-k * len(rows) // len(sample)), random) if len(rows) else rows for rows in inside]
    first = np.cumsum([0, *map(len, means)])
    cell = np.empty(n, np.int32)
    for begin in tqdm(range(0, n, ROWS), "cells", unit_scale=ROWS, unit="row", disable=n < LONG):
        rows = together(slice(begin, begin + ROWS)) @ directions
        region = _nearest(rows, regions)
        for number in region.unique().tolist():
            at = (region == number).nonzero()[:, 0]
            # The nearest region of a row may have had none of the sample.
            found = _nearest(rows[at], means[number]) if len(means[number]) else torch.zeros_like(at)
            cell[begin + at.cpu().numpy()] = first[number] + found.cpu().numpy()
    return cell


def _k_means(sample_SD: torch.Tensor, k: int, random: np.random.Generator) -> torch.Tensor:
    """Means [k, D]: each is that of the rows which it was nearest to, when their mini-batch came."""
    means_KD = sample_SD[torch.from_numpy(random.choice(len(sample_SD), k, replace=False))]
    counts_K1 = torch.zeros(k, 1, device=sample_SD.device)
    for _ in range(PASSES):
        for batch in torch.from_numpy(random.permutation(len(sample_SD))).split(MINI_BATCH):
            rows_BD = sample_SD[batch]
            nearest, order = _nearest(rows_BD, means_KD).sort(stable=True)
            here_K1 = torch.bincount(nearest, minlength=k)[:, None]
            counts_K1 += here_K1
            sum_KD = torch.segment_reduce(rows_BD[order], "sum", lengths=here_K1[:, 0], axis=0)
            means_KD = means_KD + (sum_KD - here_K1 * means_KD) / counts_K1.clamp(min=1)
    return means_KD


def _nearest(rows_BD: torch.Tensor, means_KD: torch.Tensor) -> torch.Tensor:
    """The nearest mean of each row, int64 [rows]."""
    return torch.addmm(-means_KD.square().sum(1) / 2, rows_BD, means_KD.T).argmax(1)
