"""How many pairs are near misses: captions that fit their picture better than most, and are wrong all the same.

Towers cannot tell, since a near miss beats most other captions, as right ones do. Its company can: it never meets the
picture's other captions elsewhere. How often right captions do not either falls with the number of pictures on which
they could; how often captions from anywhere, and those of pictures that look alike, do not is seen by trying some.
Rare names of what a picture shows come alone, too: so these pairs are told, and none is dropped for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..data.store import Edges
from .answers import MOST_WITNESSES, Floats, sums
from .cooccurrence import Company, Ties
from .neighbourhoods import DIRECTIONS, ROWS, Features, Integers, best_device, cells
from .rate import DISPERSION, INTERVAL, RATES, design_effect, quantiles

DRAWN, TRIES = 1 << 17, 8  # pairs whose picture another caption is tried on, and how often where it has that one
SUBJECT = 12  # captions of pictures that look alike
# Strata of how many other captions a picture has, and on how many other pictures the caption is in company: of fewer,
# right ones come alone, too, where their others are wrong.
WITNESSES, SETTLED = np.array([4, 6]), np.array([2, 3, 4, 6, 10])
LEAST, COVERED = 50, 0.25  # pairs of a stratum; share of all pairs in these, below which nothing is said of the others
MORE = np.linspace(1, 1.3, 7)  # times as many captions are from anywhere as is told, perhaps
ALONE = np.linspace(0, 0.99, 100)  # chance that a right caption meets none on one such picture


class _Strata(NamedTuple):
    """Pairs of each stratum, those of them that come alone, and how many pictures of their captions have company on
    average, float64 [WITNESSES, SETTLED] each."""

    pairs: Floats
    alone: Floats
    settled: Floats


def near_miss_interval(
    ties: Ties,
    company: Company,
    settled: Integers,
    subject_of: Callable[[], Integers],
    rows: Integers,
    wrong: float,
    seed: int,
) -> list[float] | None:
    """Low end, rate and high end, as INTERVAL has them, of near misses among the pairs `rows`, of a source, beside a
    share of `wrong` whose captions are from anywhere in it, or more: rare captions come alone more often than those
    that are tried. None where too few pairs could be in company.

    company and settled: of all pairs; subject_of: of each caption, as `subjects` tells, asked only if needed. Captions
    of pictures that look alike may fit, and then keep company, so that too many near misses are told: the low end is
    for those that come alone as captions from anywhere do.
    """
    n, random = len(rows), np.random.default_rng([seed, 9])
    here = company.of(rows)
    found, tried = _strata(here, settled[rows]), []
    if found.pairs.sum() < COVERED * n:
        return None
    some = random.choice(rows, min(n, DRAWN), replace=False, shuffle=False)
    subject = subject_of()
    for key in (np.zeros_like(subject), subject):
        pair = _others(ties, key, rows, some, random)
        drawn = pair >= 0
        # Those that had no other one are taken to be like these.
        weight = n / max(int(np.count_nonzero(drawn)), 1)
        tried.append(_strata(ties.company(some[drawn], pair[drawn]), settled[pair[drawn]], weight))
    stratum = _stratum(here, settled[rows])
    dispersion = DISPERSION * design_effect(stratum, here.met == 0, stratum >= 0, ties.caption_ids[rows])
    least, told = (quantiles(_posterior(found, tried[0], one, wrong, dispersion), INTERVAL) for one in tried)
    return [min(least[0], told[0]), *told[1:]]


def _posterior(found: _Strata, anywhere: _Strata, near: _Strata, wrong: float, dispersion: float) -> Floats:
    """Probability of each of RATES to be the share of near misses, which come alone as `near` do.

    A right caption meets no other one on all of the d other pictures on which it has company with probability q^d,
    where q is the best for pictures with like many captions.
    """
    wrong_W11 = np.minimum(wrong * MORE, 1)[:, None, None]
    near_WR1 = np.minimum(RATES[:, None], 1 - wrong_W11)
    log_likelihood_WR = np.zeros((len(MORE), len(RATES)))
    for witnesses in range(len(WITNESSES)):
        told = np.zeros((len(MORE), len(RATES), len(ALONE)))
        for at in ((witnesses, other) for other in range(len(SETTLED))):
            if min(found.pairs[at], anywhere.pairs[at], near.pairs[at]) < LEAST:
                continue
            wrong_WR1 = wrong_W11 * anywhere.pairs[at] + near_WR1 * near.pairs[at]
            wrong_alone_WR1 = wrong_W11 * anywhere.alone[at] + near_WR1 * near.alone[at]
            right_WR1 = np.maximum(found.pairs[at] - wrong_WR1, 0)
            alone_WRQ = (wrong_alone_WR1 + right_WR1 * ALONE ** found.settled[at]) / (wrong_WR1 + right_WR1)
            alone_WRQ = np.clip(alone_WRQ, 1e-6, 1 - 1e-6)
            told += found.alone[at] * np.log(alone_WRQ)
            told += (found.pairs[at] - found.alone[at]) * np.log1p(-alone_WRQ)
        log_likelihood_WR += told.max(2)
    log_likelihood = log_likelihood_WR.max(0) / dispersion
    probability = np.exp(log_likelihood - log_likelihood.max())
    return np.asarray(probability / probability.sum())


def subjects(features: Features, pictures_of: Edges, seed: int, device: torch.device | None = None) -> Integers:
    """Of each caption a number, int32 [captions]; those with the same have pictures that look alike, or too many.

    features: [pictures, width], may be a mapped file; pictures_of: caption -> pictures.
    """
    device, (starts, tied) = device or best_device(), pictures_of
    width, captions = features.shape[1], len(starts) - 1
    random = np.random.default_rng([seed, 10])
    # Distances stay as they are but for a tenth (Johnson and Lindenstrauss 1984), the means of many captions in memory.
    axes = torch.from_numpy(random.standard_normal((width, min(width, 2 * DIRECTIONS)), np.float32)).to(device)
    mean = np.empty((captions, axes.shape[1]), np.float16)
    for begin in range(0, captions, ROWS):
        end = min(begin + ROWS, captions)
        degree = np.diff(starts[begin : end + 1])
        total = sums(features, tied, starts[begin:end], np.where(degree <= MOST_WITNESSES, degree, 0), device)
        mean[begin:end] = torch.nn.functional.normalize(total @ axes, dim=1).cpu().numpy()
    return cells([mean], seed, device, size=SUBJECT)


def _stratum(company: Company, settled: Integers) -> Integers:
    """Number of each pair's stratum, -1 for none."""
    witnesses, others = np.digitize(company.witnesses, WITNESSES) - 1, np.digitize(settled, SETTLED) - 1
    return np.where((witnesses >= 0) & (others >= 0), witnesses * len(SETTLED) + others, -1)


def _strata(company: Company, settled: Integers, weight: float = 1.0) -> _Strata:
    stratum = _stratum(company, settled)
    at, shape = stratum >= 0, (len(WITNESSES), len(SETTLED))
    weights = (np.ones(len(stratum)), company.met == 0, settled)
    summed = [np.bincount(stratum[at], one[at], shape[0] * shape[1]).reshape(shape) for one in weights]
    pairs, alone, total = (np.asarray(one, np.float64) for one in summed)
    return _Strata(weight * pairs, weight * alone, total / np.maximum(pairs, 1))


def _others(ties: Ties, key: Integers, rows: Integers, some: Integers, random: np.random.Generator) -> Integers:
    """For each of `some` of the pairs `rows` another one of these with the same key of its caption, which the picture
    has not; -1 where there is none."""
    of = key[ties.caption_ids[rows]]
    by_key = np.argsort(of, kind="stable")
    low, high = (np.searchsorted(of[by_key], key[ties.caption_ids[some]], side) for side in ("left", "right"))
    found = np.full(len(some), -1, np.int64)
    for _ in range(TRIES):
        missing = np.flatnonzero(found < 0)
        drawn = rows[by_key[random.integers(low[missing], high[missing])]]
        free = ~ties.hold(ties.image_ids[some[missing]], ties.caption_ids[drawn])
        found[missing[free]] = drawn[free]
    return found
