"""How many pairs of a source are wrong, and which: read off without labels, from p of towers that trained on others.

The p of wrong pairs is uniform. That of right ones is small, but only where the towers are competent, which other pairs
of the same caption and picture tell; how often a mismatched pair looks as competent is known too. So strata of like
competence are mixtures of a known shape and the right pairs' own, in shares that one rate settles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import norm

from .answers import Floats
from .neighbourhoods import Integers

Bools = npt.NDArray[np.bool_]

HIT = 0.05  # a pair with a smaller p shows competence
FOREIGN = 0.95  # what lies beyond, and would not if p were uniform, is no caption of this source
FEW = 50  # pairs of the most competent stratum, below which those beyond FOREIGN tell nothing
BACKING = 2.0  # pairs' worth of belief in the wider neighbourhood's rate
STRATA = 5  # of like competence, for the rate
ODDS_STRATA = 10
CONVERGED = 1e-9
ROUNDS, PRIOR = 2, 2.0  # of learning what a second witness tells, and pairs a stratum that fall as all do
# Bins of p below FOREIGN: one is finer than a hit, so that it tells how far right pairs lie from the others.
BINS = np.array([0, 0.005, HIT, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, FOREIGN])
RATES = np.linspace(0, 1, 201)
# Of right pairs' normal deviates, -Phi^-1(p), where those of mismatches have mean 0 and deviation 1.
MEANS, DEVIATIONS = np.linspace(-0.2, 5, 53), np.linspace(1, 1.8, 9)
DISPERSION = 2.0  # pairs tell as much as half as many would, were right ones of a stratum just so distributed
BELIEVED = 100  # pairs a stratum, of what other sources tell
# Share of right pairs that towers miss as if they were wrong, at most: of the least competent stratum to the most.
LAPSES = np.linspace(0.1, 0.01, STRATA)
INTERVAL = (0.05, 0.5, 0.95)  # low end, what is told, high end


def side_competence(hit: Bools, ids: Integers, cell: Integers, apart: Integers | None) -> Floats:
    """Log-odds of a hit around each pair, from the pairs of its id, backed by those of its cell.

    `ids`, `cell` and `apart` are integers [pairs]; pairs of the same `apart` do not testify for each other, and without
    it all do.
    """
    rate = (hit.sum() + 0.5) / (len(hit) + 1)
    for key in (cell, ids):
        hits, total = np.bincount(key, hit)[key], np.bincount(key)[key].astype(np.float64)
        if apart is not None:
            _, both = np.unique(key.astype(np.int64) * (int(apart.max()) + 1) + apart, return_inverse=True)
            hits, total = hits - np.bincount(both, hit)[both], total - np.bincount(both)[both]
        rate = (hits + BACKING * rate) / (total + BACKING)
    return np.log(rate) - np.log1p(-rate)


@dataclass(frozen=True)
class Competence:
    """Of each pair, by its caption's and its image's other pairs, and both sides as a random mismatched pair has them.

    Such a pair's caption is tied to foreign images, so all pairs of the caption testify; its image lacks one pair.
    """

    caption_ids: Integers
    frequency: Integers  # [captions], of these pairs
    pair: Floats
    mismatched_caption: Floats
    mismatched_image: Floats

    def mismatched_above(self, thresholds: Floats, rows: Integers) -> Floats:
        """Share of all combinations of a caption with an image of the pairs `rows` that are at least so competent.

        Captions are as frequent as in the whole store: one that noise has brought to `rows` counts no more for it.
        """
        captions, at = np.unique(self.caption_ids[rows], return_index=True)
        value = self.mismatched_caption[rows[at]]
        order = np.argsort(value, kind="stable")
        below = np.concatenate([[0], np.cumsum(self.frequency[captions[order]])])
        # Ascending, the needles find one another's place in the cache.
        wanting = -np.sort(self.mismatched_image[rows])[::-1]
        shares = [below[np.searchsorted(value[order], one + wanting)].mean() for one in thresholds]
        return np.asarray(1 - np.array(shares) / below[-1])


def competence(
    hit: Bools,
    caption_ids: Integers,
    image_ids: Integers,
    caption_cell: Integers,
    image_cell: Integers,
    groups: Integers,
) -> Competence:
    """Competence around the pairs; all arguments are [pairs], `hit` tells where p is small."""
    return Competence(
        caption_ids,
        np.bincount(caption_ids),
        side_competence(hit, caption_ids, caption_cell, groups) + side_competence(hit, image_ids, image_cell, groups),
        side_competence(hit, caption_ids, caption_cell, None),
        side_competence(hit, image_ids, image_cell, np.arange(len(hit))),
    )


@dataclass(frozen=True)
class _Source:
    """Of a source's pairs in strata of like competence."""

    counts_SB: Floats  # how many lie in each of BINS, those of a group taken as fewer
    foreign_S: Floats  # beyond
    expected_S: Floats  # how many wrong pairs would be there, were all of the source wrong

    def shares_SR(self) -> Floats:
        """Of wrong ones among the counted pairs, at each of RATES."""
        below = np.maximum(self.counts_SB.sum(1), 1e-9)
        return np.minimum(FOREIGN * RATES * (self.expected_S / below)[:, None], _mixtures()[0][-1])

    def posterior(self, belief_SDM: Floats) -> Floats:
        """Probability of each of RATES, where it is believed (logarithms) how right pairs lie."""
        masses, log_masses = _mixtures()
        likelihood_RD = np.zeros((len(RATES), len(DEVIATIONS)))
        for counts, shares, belief, most in zip(self.counts_SB, self.shares_SR(), belief_SDM, LAPSES, strict=True):
            # The best mean, not all of them: a flat belief in means would be one in skill.
            told = (log_masses @ counts + belief).max(2)
            # Missed ones and wrong ones alike.
            uniform_R5 = shares[:, None] + (1 - shares[:, None]) * np.linspace(0, most, 5)
            likelihood_RD += np.stack([np.interp(uniform_R5, masses, one).max(1) for one in told.T], 1)
        likelihood = likelihood_RD.max(1)
        probability = np.exp(likelihood - likelihood.max())
        return np.asarray(probability / probability.sum())

    def right_pairs(self, rate: float) -> Floats:
        """What this source tells of how right pairs lie, if `rate` of it is wrong: as belief [S, D, M], of no more than
        BELIEVED pairs a stratum."""
        masses, log_masses = _mixtures()
        at = np.rint(self.shares_SR()[:, np.searchsorted(RATES, rate)] * len(masses)).astype(np.int64)
        told = np.stack([log_masses[one] @ counts for one, counts in zip(at, self.counts_SB, strict=True)])
        below = np.maximum(self.counts_SB.sum(1), 1e-9)
        return np.asarray(told * np.minimum(1, BELIEVED / below)[:, None, None])


def rate_posteriors(p: Floats, found: Competence, groups: Integers, sources: Sequence[Integers]) -> list[Floats]:
    """Of each source, which are rows of pairs, the probability of each of RATES to be the share of its wrong pairs; p,
    competence and groups are those of all pairs.

    Binormal mixtures (Metz 1986, of ROC curves): towers without skill give right pairs the wrong ones' uniform p, and
    then any rate fits. Noise is spread evenly within a source: where captions and pictures are competent, as many
    mismatches are expected as `mismatched_above` tells. Pairs of a group answer alike, and count accordingly. Sources
    tell each other how right pairs of like competence lie, or one that is all noise would look like one not understood.
    """
    bounds = np.quantile(found.pair, np.linspace(0, 1, STRATA + 1))
    bounds[0], bounds[-1] = -np.inf, np.inf
    read = [_source(p[rows], found, bounds, rows, groups[rows]) for rows in sources]
    nothing = np.zeros((STRATA, len(DEVIATIONS), len(MEANS)))
    alone = [source.posterior(nothing) for source in read]
    told = [source.right_pairs(quantiles(one, (0.5,))[0]) for source, one in zip(read, alone, strict=True)]
    # Each believes the others' mean.
    beliefs = [(sum(told) - one) / max(len(told) - 1, 1) for one in told]
    return [_with_what_p_leaves_out(source, source.posterior(one)) for source, one in zip(read, beliefs, strict=True)]


def _source(p: Floats, found: Competence, bounds: Floats, rows: Integers, groups: Integers) -> _Source:
    stratum = np.searchsorted(bounds, found.pair[rows], side="right") - 1
    bins, at = len(BINS) - 1, np.digitize(p, BINS[1:], right=True)
    found_SB = np.bincount(stratum * (bins + 1) + at, minlength=STRATA * (bins + 1)).reshape(STRATA, bins + 1)
    counts = found_SB.astype(np.float64) / (DISPERSION * design_effect(stratum, at == bins - 1, at < bins, groups))
    mismatched = found.mismatched_above(bounds, rows)
    return _Source(counts[:, :bins], counts[:, bins], counts.sum() * (mismatched[:-1] - mismatched[1:]))


def _with_what_p_leaves_out(source: _Source, probability: Floats) -> Floats:
    """The posterior with captions from elsewhere, which are wrong, too."""
    # Where towers are most competent: as many as a uniform p would not leave there.
    expected = source.expected_S[-1]
    beyond = max(0.0, source.foreign_S[-1] - (1 - FOREIGN) * (RATES @ probability) * expected)
    # Of few, the one or two that chance leaves there would make all pairs wrong.
    elsewhere = beyond / expected if expected >= FEW else 0.0
    at = np.rint(np.minimum(RATES + elsewhere, 1) * (len(RATES) - 1)).astype(np.int64)
    return np.asarray(np.bincount(at, probability, len(RATES)), np.float64)


def quantiles(probability: Floats, shares: tuple[float, ...]) -> list[float]:
    """Rates below which such a posterior has these shares."""
    at = np.searchsorted(np.cumsum(probability), shares)
    return [float(RATES[min(one, len(RATES) - 1)]) for one in at]


@functools.cache
def _mixtures() -> tuple[Floats, Floats]:
    """Shares of wrong pairs [W], and with each of them the logarithm of the bins' masses [W, DEVIATIONS, MEANS, B]."""
    shares = np.linspace(0, 1, 201)[:-1]
    beyond = norm.sf(-norm.ppf(BINS), MEANS[:, None], DEVIATIONS[:, None, None])
    right = np.diff(beyond)
    right /= right.sum(-1, keepdims=True)
    wrong = np.diff(BINS) / FOREIGN
    part = shares[:, None, None, None]
    return shares, np.log(part * wrong + (1 - part) * right + 1e-12)


def design_effect(stratum: Integers, failed: Bools, seen: Bools, groups: Integers) -> float:
    """Variance of how many pairs that were `seen` failed, over what it were without groups; at least 1. All [pairs]."""
    of, failed = stratum[seen], failed[seen].astype(np.float64)
    size = np.maximum(np.bincount(of), 1)
    rest = failed - (np.bincount(of, failed) / size)[of]
    together = np.bincount(np.unique(groups[seen], return_inverse=True)[1], rest)
    return max(1.0, float((together**2).sum() / max((rest**2).sum(), 1e-9)))


def clean_log_odds(p: Floats, found: Competence, rows: Integers, rate: float, witness: Floats | float = 0.0) -> Floats:
    """Log-odds that each of the pairs `rows` is right, float64 [rows].

    Pairs of like competence share a mixture: the uniform p of wrong ones, whose weight is known, and the Beta(a, 1) of
    right ones, whose a is fitted. Where the tower is not competent a large p says little. `witness`, float64 [rows]:
    log of how much likelier a right pair is than a wrong one by what else is known of it.
    """
    witness = np.broadcast_to(witness, len(rows))
    odds, competent = np.zeros(len(rows)), found.pair[rows]
    bounds = np.quantile(competent, np.linspace(0, 1, ODDS_STRATA + 1))
    bounds[0], bounds[-1] = -np.inf, np.inf
    mismatched = found.mismatched_above(bounds, rows)
    for low, high, more, less in zip(bounds[:-1], bounds[1:], mismatched[:-1], mismatched[1:], strict=True):
        chosen = np.flatnonzero((competent >= low) & (competent < high))
        if len(chosen) == 0:
            continue
        wrong = float(np.clip(rate * (more - less) * len(rows) / len(chosen), 1e-3, 1 - 1e-3))
        log_p, told, a = np.log(p[rows[chosen]]), witness[chosen], 0.5
        for _ in range(100):
            density = (1 - wrong) * a * np.exp((a - 1) * log_p + told)
            right = density / (density + wrong)
            before, a = a, min(right.sum() / max(-(right * log_p).sum(), 1e-9), 1.0)
            if abs(a - before) < CONVERGED:
                break
        odds[chosen] = np.log1p(-wrong) - np.log(wrong) + np.log(a) + (a - 1) * log_p + told
    return odds


def second_witness(
    p: Floats, found: Competence, rows: Integers, rate: float, bin_N: Integers, stratum: Integers
) -> Floats:
    """What the bins of another observation tell of the pairs `rows`, log of right over wrong, float64 [rows].

    Right and wrong pairs are believed to fall into a stratum's bins whatever their p: how the posteriors by p, and then
    by both, spread over them is how these do (Dawid and Skene 1979, of raters without a truth, cut short). What p knows
    to be no sign of a wrong pair tells nothing. Bin 0 tells nothing either.
    """
    bins, here = len(stratum), bin_N[rows]
    count = np.bincount(here, minlength=bins)
    prior = PRIOR * count / np.maximum(np.bincount(stratum, count)[stratum], 1)
    # A bin without any of these pairs has a logarithm, too.
    prior = np.maximum(prior, np.finfo(float).tiny)
    log_ratio = np.zeros(bins)
    for _ in range(ROUNDS):
        right = expit(clean_log_odds(p, found, rows, rate, log_ratio[here]))
        log_share = []
        for part in (right, 1 - right):
            mass = np.bincount(here, part, bins) + prior
            log_share.append(np.log(mass / np.bincount(stratum, mass)[stratum]))
        log_ratio = np.where(np.arange(bins) > 0, log_share[0] - log_share[1], 0)
    return np.asarray(log_ratio[here])
