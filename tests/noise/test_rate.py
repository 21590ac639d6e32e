from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from efficientclip.noise.rate import (
    INTERVAL,
    RATES,
    Competence,
    clean_log_odds,
    competence,
    quantiles,
    rate_posteriors,
    second_witness,
)


def test_competence_is_what_other_pairs_tell() -> None:
    random = np.random.default_rng(2)
    n = 60
    captions, images = random.integers(0, 9, n), random.integers(0, 11, n)
    hit, apart = random.random(n) < 0.6, random.integers(0, 40, n)

    def naive(ids: Any, excluded: Any) -> Any:
        found = []
        for row in range(n):
            rate = (hit.sum() + 0.5) / (n + 1)
            for key in (ids // 3, ids):
                others = [hit[j] for j in range(n) if key[j] == key[row] and not excluded(j, row)]
                rate = (sum(others) + 2 * rate) / (len(others) + 2)
            found.append(np.log(rate / (1 - rate)))
        return np.array(found)

    found = competence(hit, captions, images, captions // 3, images // 3, apart)
    grouped = [naive(ids, lambda j, row: apart[j] == apart[row]) for ids in (captions, images)]
    np.testing.assert_allclose(found.pair, sum(grouped))
    caption, image = naive(captions, lambda j, row: False), naive(images, lambda j, row: j == row)
    both = caption[:, None] + image
    for threshold in (-0.5, 0.0, 0.7):
        assert found.mismatched_above(np.array([threshold, 99.0]), np.arange(n)) == pytest.approx(
            [(both >= threshold).mean(), 0]
        )
        some = np.array([3, 17, 41])
        there = np.isin(captions, captions[some])
        expected = (both[there][:, some] >= threshold).mean()
        assert found.mismatched_above(np.array([threshold]), some) == pytest.approx([expected])


def scored_pairs(rate: Any, seed: int, n: int = 20_000) -> tuple[Any, Competence, Any, Any]:
    """p, competence, truth and images of pairs of which the towers know about half; right pairs fail elsewhere.

    `rate` is of all pairs, or float [n // 10] by image.
    """
    random = np.random.default_rng(seed)
    captions, images = random.integers(0, n // 10, (2, n))
    known_caption, known_image = random.random(n // 10) < 0.7, random.random(n // 10) < 0.7
    wrong = random.random(n) < np.broadcast_to(rate, n // 10)[images]
    known = known_caption[captions] & known_image[images] & ~wrong
    p = np.where(known, random.beta(0.2, 12, n), np.where(wrong, random.random(n), random.beta(0.7, 1, n)))
    cell = np.zeros(n, int)
    return p, competence(p < 0.05, captions, images, cell, cell, np.arange(n)), wrong, images


def estimated(p: Any, found: Competence, rows: Any, groups: Any = None) -> tuple[float, float, float]:
    """Low end, median and high end of the rate."""
    groups = np.arange(len(p)) if groups is None else groups
    low, rate, high = quantiles(rate_posteriors(p, found, groups, [rows])[0], INTERVAL)
    return low, rate, high


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5])
def test_rate_is_found_though_the_towers_know_half(rate: float) -> None:
    found = []
    for seed in range(3):
        p, around, wrong, _ = scored_pairs(rate, seed)
        every = np.arange(len(p))
        found.append(estimated(p, around, every)[1])
        if rate:
            # Where the towers know nothing, a large p is no ground.
            odds = clean_log_odds(p, around, every, rate)
            assert separation(odds[~wrong], odds[wrong]) > separation(-p[~wrong], -p[wrong])
    assert abs(np.mean(found) - rate) < 0.05


def test_noise_of_one_source_is_found_there() -> None:
    """The most competent pairs stand where noise is rare: taken together, the sources would show its rate."""
    n = 40_000
    p, around, wrong, images = scored_pairs(np.where(np.arange(n // 10) % 2 == 0, 0.02, 0.6), 5, n)
    rows = [np.flatnonzero(images % 2 == source) for source in range(2)]
    found = [estimated(p, around, half)[1] for half in rows]
    assert found == pytest.approx([wrong[half].mean() for half in rows], abs=0.05)
    assert estimated(p, around, np.arange(n))[1] < wrong.mean() - 0.1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("pairs", [1_000, 4_000])
def test_the_interval_holds_the_rate(rate: float, pairs: int) -> None:
    held, widths = [], []
    for seed in range(20):
        p, around, wrong, _ = scored_pairs(rate, seed, pairs)
        low, found, high = estimated(p, around, np.arange(len(p)))
        assert low <= found <= high
        held.append(low <= wrong.mean() <= high)
        widths.append(high - low)
    assert np.mean(held) >= 0.85
    assert np.mean(widths) < {1_000: 0.3, 4_000: 0.15}[pairs]


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_towers_without_skill_leave_the_rate_open(rate: float) -> None:
    """Their p is uniform, whatever the pairs are: any rate fits."""
    random = np.random.default_rng(0)
    captions, images = random.integers(0, 200, (2, 2_000))
    p, cell, apart = random.random(2_000), np.zeros(2_000, int), np.arange(2_000)
    low, _, high = estimated(p, competence(p < 0.05, captions, images, cell, cell, apart), apart)
    assert low < 0.15 and high > 0.8


@pytest.mark.parametrize("pairs", [8, 20, 40])
def test_few_pairs_by_towers_without_skill_are_never_told_wrong(pairs: int) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        p, apart, alike = random.random(pairs), np.arange(pairs), np.zeros(pairs, int)
        captions, images = random.integers(0, pairs, (2, pairs))
        low, _, high = estimated(p, competence(p < 0.05, captions, images, alike, alike, apart), apart)
        assert high - low > 0.25


def test_pairs_of_a_group_tell_less() -> None:
    """Each pair three times over is no more evidence than once."""
    p, around, _, _ = scored_pairs(0.3, 0, 3_000)
    thrice = Competence(*(np.tile(side, 3) if len(side) == len(p) else 3 * side for side in vars(around).values()))
    every, groups = np.arange(3 * len(p)), np.tile(np.arange(len(p)), 3)
    once = estimated(p, around, np.arange(len(p)))
    grouped, apart = estimated(np.tile(p, 3), thrice, every, groups), estimated(np.tile(p, 3), thrice, every)
    assert grouped[2] - grouped[0] == pytest.approx(once[2] - once[0], abs=0.02)
    assert apart[2] - apart[0] < 0.8 * (grouped[2] - grouped[0])


def test_a_posterior_is_a_distribution_over_rates() -> None:
    p, around, _, _ = scored_pairs(0.3, 0, 2_000)
    [probability] = rate_posteriors(p, around, np.arange(len(p)), [np.arange(len(p))])
    assert probability.shape == RATES.shape and probability.min() >= 0
    assert probability.sum() == pytest.approx(1)
    assert quantiles(np.array([0.2, 0.3, 0.5] + [0.0] * (len(RATES) - 3)), (0.1, 0.45, 0.9)) == RATES[:3].tolist()


def test_captions_from_elsewhere_count_once() -> None:
    """They fit worse than the source's own: their p is not uniform, but near 1."""
    for rate in (0.1, 0.3):
        p, around, wrong, _ = scored_pairs(rate, 7)
        foreign = wrong & (np.random.default_rng(8).random(len(p)) < 0.5)
        p[foreign] = np.random.default_rng(9).uniform(0.97, 1, foreign.sum())
        assert estimated(p, around, np.arange(len(p)))[1] == pytest.approx(wrong.mean(), abs=0.05)


def separation(upper: Any, lower: Any) -> float:
    return float((np.searchsorted(np.sort(lower), upper)).mean() / len(lower))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_a_second_witness_is_learned_from_the_first(rate: float) -> None:
    """Without labels, and less sharply than with them; one that knows nothing of wrong pairs is not believed."""
    p, found, wrong, _ = scored_pairs(rate, seed=7)
    random, rows = np.random.default_rng(8), np.arange(len(p))
    # The last two bins hold none of these pairs.
    stratum = np.array([0, 1, 1, 1, 1, 2])
    share_of = np.array([[0.5, 0.3, 0.2], [0.05, 0.15, 0.8]])
    bins = 1 + (random.random(len(p))[:, None] > np.cumsum(share_of[(~wrong).astype(int)], 1)).sum(1)
    bins[::5] = 0
    told = second_witness(p, found, rows, rate, bins, stratum)
    assert not told[::5].any()
    of_bin = np.array([told[bins == one].mean() for one in (1, 2, 3)])
    with_labels = np.log(share_of[1] / share_of[0])
    assert (np.diff(of_bin) > 0).all() and of_bin[0] < -0.9 and of_bin[2] > 0.2
    assert (np.abs(of_bin) < np.abs(with_labels) + 0.1).all()
    alone, both = (clean_log_odds(p, found, rows, rate, witness) for witness in (0.0, told))
    assert separation(both[~wrong], both[wrong]) > separation(alone[~wrong], alone[wrong]) + 0.05
    # The posterior stays one: as many are believed wrong as are.
    assert expit(-both).mean() == pytest.approx(rate, abs=0.05)
    mute = second_witness(p, found, rows, rate, random.integers(1, 4, len(p)), stratum)
    assert np.abs(mute).max() < 0.15
