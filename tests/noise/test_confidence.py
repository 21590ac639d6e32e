from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from efficientclip.config import Confidence
from efficientclip.errors import UserError
from efficientclip.noise import confidence
from efficientclip.noise.confidence import ConfidenceTable, clean_probability, lowest


def observed(table: ConfidenceTable, epoch: int, score: Any) -> None:
    n = len(score)
    for rows in np.array_split(np.arange(n), 4):
        table.observe(epoch, rows, score[rows], np.ones(len(rows), bool))


def scores(n: int = 1000, noise: float = 0.3) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    noisy = np.arange(n) < noise * n
    random.shuffle(noisy)
    return noisy, random.normal(np.where(noisy, 0.1, 0.5), 0.1)


def test_scores_are_z_scored_within_the_batch_and_averaged_over_visits() -> None:
    table = ConfidenceTable(6, Confidence(warmup_epochs=0))
    rows = np.array([4, 1, 3])
    table.observe(0, rows, np.array([1.0, 2.0, 3.0]), np.ones(3, bool))
    table.observe(1, rows, np.array([10.0, 20.0, 90.0]), np.ones(3, bool))
    z = [(np.array(x) - np.mean(x)) / np.std(x) for x in ([1, 2, 3], [10, 20, 90])]
    np.testing.assert_allclose(table.mean_score[rows], np.mean(z, axis=0))
    assert np.isnan(table.mean_score[[0, 2, 5]]).all()


def test_reauditioned_pairs_are_scored_by_the_trained_pairs_moments() -> None:
    table = ConfidenceTable(4, Confidence(warmup_epochs=0))
    table.observe(0, np.arange(4), np.array([1.0, 3.0, 2.0, 100.0]), np.array([True, True, False, False]))
    np.testing.assert_allclose(table.mean_score, [-1, 1, 0, 98])


def test_warmup_scores_drop_nothing() -> None:
    table = ConfidenceTable(1000, Confidence(selection="schedule", warmup_epochs=1))
    observed(table, 0, scores()[1])
    table.select(0)
    assert table.kept.all() and (table.times_seen == 0).all()


def test_published_drops_a_tenth_for_ever() -> None:
    table = ConfidenceTable(1000, Confidence(selection="published", warmup_epochs=0))
    _, score = scores()
    sizes, before = [], table.kept
    for epoch in range(6):
        observed(table, epoch, score)
        table.select(epoch)
        assert not (table.kept & ~before).any()
        before = table.kept
        sizes.append(int(table.kept.sum()))
    assert sizes == [900, 810, 729, 656, 590, 531]
    assert (table.dropped_epoch[~table.kept] >= 0).all() and (table.dropped_epoch[table.kept] == -1).all()


def test_a_batch_is_always_left() -> None:
    """A long run by the published rule went on dropping until no batch could be made, and ended there."""
    table = ConfidenceTable(1000, Confidence(selection="published", warmup_epochs=0), least=700)
    _, score = scores()
    for epoch in range(6):
        observed(table, epoch, score)
        table.select(epoch)
    assert table.kept.sum() == 729
    assert (table.dropped_epoch[~table.kept] >= 0).all() and (table.dropped_epoch[table.kept] == -1).all()


def test_schedule_stops_after_its_drops_and_lets_pairs_return() -> None:
    table = ConfidenceTable(1000, Confidence(selection="schedule", warmup_epochs=0, drops=4))
    noisy, score = scores()
    for epoch in range(6):
        observed(table, epoch, score)
        table.select(epoch)
    assert table.kept.sum() == 656
    assert (~table.kept[noisy]).mean() > 0.95
    wrongly = np.flatnonzero(~table.kept & ~noisy)[:5]
    for _ in range(40):
        table.observe(6, np.arange(1000), np.where(np.isin(np.arange(1000), wrongly), 2.0, score), np.ones(1000, bool))
    table.select(6)
    assert table.kept[wrongly].all() and table.kept.sum() == 656


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])
def test_mixture_separates_two_gaussians(rate: float) -> None:
    _, score = scores(4000, rate)
    table = ConfidenceTable(4000, Confidence(selection="mixture", warmup_epochs=0))
    observed(table, 0, score)
    table.select(0)
    assert abs((~table.kept).mean() - rate) < 0.03


def test_probability_of_being_clean_grows_with_the_score() -> None:
    score = scores()[1]
    assert (np.diff(clean_probability(score)[np.argsort(score)]) >= 0).all()
    assert (clean_probability(np.full(5, 0.3)) == 1).all()


def test_the_lowest_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng()
    score = rng.integers(-3, 4, 500).astype(float)
    score[rng.random(500) < 0.1] = np.inf
    score[rng.random(500) < 0.1] = -np.inf
    for count in (0, 1, 37, 250, 499, 500):
        expected = np.zeros(500, bool)
        expected[np.argsort(score, kind="stable")[:count]] = True
        np.testing.assert_array_equal(lowest(score, count), expected)


def test_a_mixture_of_many_scores_is_fitted_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    score = scores(20_000)[1]
    whole = clean_probability(score)
    monkeypatch.setattr(confidence, "FITTED", 4000)
    some = clean_probability(score)
    assert 0 < np.abs(some - whole).max() < 0.1
    assert ((some >= 0.5) != (whole >= 0.5)).mean() < 0.01


def test_state_round_trip() -> None:
    config = Confidence(selection="schedule", warmup_epochs=0)
    table, other = ConfidenceTable(1000, config), ConfidenceTable(1000, config)
    observed(table, 0, scores()[1])
    table.select(0)
    other.restore(table.state())
    for name, value in table.state().items():
        np.testing.assert_array_equal(value, other.state()[name])


def test_an_earlier_versions_state_is_refused() -> None:
    table = ConfidenceTable(10, Confidence())
    state = table.state()
    del state["epoch_sum"]
    with pytest.raises(UserError, match="start a new run"):
        table.restore(state)


def test_an_epochs_scores_are_its_own() -> None:
    table = ConfidenceTable(3, Confidence(warmup_epochs=0))
    table.observe(0, np.arange(2), np.array([1.0, 3.0]), np.ones(2, bool))
    np.testing.assert_array_equal(table.epoch_score, np.array([-1, 1, np.nan], np.float32))
    table.start_epoch()
    assert np.isnan(table.epoch_score).all()
    table.observe(1, np.arange(2), np.array([4.0, 2.0]), np.ones(2, bool))
    table.observe(1, np.arange(2), np.array([1.0, 2.0]), np.ones(2, bool))
    np.testing.assert_array_equal(table.epoch_score, np.array([0, 0, np.nan], np.float32))
    np.testing.assert_allclose(table.mean_score, [-1 / 3, 1 / 3, np.nan])
