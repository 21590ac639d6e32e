from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from efficientclip.data.store import Store
from efficientclip.evaluation.verdicts import (
    Verdicts,
    beside_baseline,
    caption_centroid_scores,
    detection,
    separation,
)
from tests import tiny


@pytest.mark.parametrize("values", [3, 1000])
def test_separation_equals_counting_all_pairs(values: int) -> None:
    random = np.random.default_rng(0)
    upper, lower = (random.integers(0, values, n).astype(float) for n in (40, 30))
    wins = [(u > v) + (u == v) / 2 for u in upper for v in lower]
    assert separation(upper, lower) == pytest.approx(np.mean(wins))


def test_separation_without_one_side_is_unknown() -> None:
    assert math.isnan(separation(np.empty(0), np.ones(3)))


def test_detection_counts_what_was_dropped() -> None:
    noise = np.array([True, True, False, False, False])
    kept = np.array([False, True, True, True, False])
    verdicts = Verdicts(np.array([-2.0, np.nan, 1.0, 3.0, -1.0]), kept, noise)
    found = detection(verdicts)
    assert found is not None
    assert (found.noisy, found.clean) == (2, 3)
    assert (found.noise_dropped, found.clean_lost) == (1 / 2, pytest.approx(1 / 3))
    assert found.auc == 1
    assert verdicts.surest(kept=True, count=5).tolist() == [3, 2]
    assert verdicts.surest(kept=False, count=1).tolist() == [0]
    assert detection(Verdicts(verdicts.score, kept, None)) is None


@pytest.mark.parametrize("at_once", [1, 7, 1 << 14])
def test_caption_centroid_equals_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("efficientclip.evaluation.verdicts.FEATURES_AT_ONCE", at_once)
    store = Store(tiny.pair_store(tmp_path / "store", pairs=150, images=60))
    expected = []
    for image, caption in zip(store.image_ids, store.caption_ids, strict=True):
        others = [
            store.features[other].astype(np.float64)
            for other, named in zip(store.image_ids, store.caption_ids, strict=True)
            if named == caption and other != image
        ]
        mean, own = np.mean(others, axis=0) if others else np.nan, store.features[image].astype(np.float64)
        expected.append(own @ mean / np.linalg.norm(own) / np.linalg.norm(mean) if others else np.nan)
    assert 0 < np.isnan(expected).sum() < len(expected)
    np.testing.assert_allclose(caption_centroid_scores(store), expected, atol=1e-5)


def test_the_baseline_drops_as_many_of_the_pairs_that_both_judge() -> None:
    noise = np.array([True, True, False, False, False, True])
    kept = np.array([False, True, True, True, False, False])
    verdicts = Verdicts(np.array([-2.0, 0.5, 1.0, 3.0, -1.0, np.nan]), kept, noise)
    baseline = np.array([0.1, 0.2, 0.9, 0.8, 0.7, 0.0], np.float32)
    compared = beside_baseline(verdicts, baseline)
    assert compared is not None
    ecl, other = compared
    assert (ecl.noisy, ecl.clean) == (other.noisy, other.clean) == (2, 3)
    assert (ecl.noise_dropped, ecl.clean_lost) == (0.5, pytest.approx(1 / 3)) and ecl.auc == pytest.approx(5 / 6)
    assert (other.noise_dropped, other.clean_lost, other.auc) == (1, 0, 1)
    assert beside_baseline(verdicts, np.full(6, np.nan, np.float32)) is None


def test_the_border_lies_where_as_many_are_below_as_were_dropped() -> None:
    score = np.array([5.0, 1.0, 2.0, np.nan, 3.0, 4.0, 9.0])
    kept = np.array([True, False, False, True, True, True, False])
    verdicts = Verdicts(score, kept, None)
    assert verdicts.borderline(2).tolist() == [4, 2]
    assert verdicts.borderline(5).tolist() == [4, 5, 2, 1, 6]
    assert Verdicts(score, np.ones(7, bool), None).borderline(2).tolist() == []
