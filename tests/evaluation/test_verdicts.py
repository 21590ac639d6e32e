from __future__ import annotations

import math

import numpy as np
import pytest

from efficientclip.evaluation.verdicts import Verdicts, detection, separation


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
