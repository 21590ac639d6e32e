from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from efficientclip.data.store import Store
from efficientclip.noise.neighbourhoods import cells, folds, near, pair_groups
from tests import tiny


@pytest.mark.parametrize("cosines", [1, 40, 1 << 22])
def test_folds_never_split_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cosines: int) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    monkeypatch.setattr("efficientclip.noise.neighbourhoods.COSINES", cosines)
    features = store.features.astype(np.float32)
    for threshold in (near(store.features, 0), 0.3):
        groups = pair_groups(store, threshold)
        assert sorted(set(groups)) == list(range(len(set(groups))))
        fold = folds(groups, seed=3)
        for one in range(len(store)):
            for other in range(one):
                if store.caption_ids[one] == store.caption_ids[other]:
                    cosine = features[store.image_ids[one]] @ features[store.image_ids[other]]
                    assert cosine < threshold or groups[one] == groups[other]
                else:
                    assert groups[one] != groups[other]
        assert all(len(set(fold[groups == group])) == 1 for group in set(groups))
        assert abs(fold.mean() - 0.5) < 0.1


def test_groups_are_the_pictures_that_near_ones_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains join; a caption of too many pictures is one group."""
    store = Store(tiny.pair_store(tmp_path / "store", pairs=900, images=60))
    counts = np.bincount(store.caption_ids)
    most = int(np.quantile(counts, 0.8))
    monkeypatch.setattr("efficientclip.noise.neighbourhoods.LARGEST_GROUP", most)
    groups, told = pair_groups(store, 0.35), 0
    for caption in np.unique(store.caption_ids):
        rows = np.flatnonzero(store.caption_ids == caption)
        features = store.features[store.image_ids[rows]].astype(np.float32)
        count, labels = connected_components(features @ features.T >= 0.35, directed=False)
        if len(rows) > most:
            count, labels = 1, np.zeros(len(rows), int)
        assert len({*zip(labels, groups[rows], strict=True)}) == len(set(groups[rows])) == count
        told += count
    assert told == len(set(groups)) and counts.max() > most > 2


def clustered(random: np.random.Generator, rows: int, clusters: int, width: int = 96) -> tuple[Any, Any]:
    """Features around `clusters` points, and the cluster of each."""
    centres = random.standard_normal((clusters, width))
    of = random.integers(0, clusters, rows)
    features = centres[of] + 0.2 * random.standard_normal((rows, width))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16), of


def purity(cell: Any, of: Any) -> float:
    """Share of rows in the commonest cluster of their cell."""
    both = np.zeros((cell.max() + 1, of.max() + 1), int)
    np.add.at(both, (cell, of), 1)
    return float(both.max(1).sum() / len(of))


def test_cells_of_a_store_larger_than_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows outside of the sample, and of the mini-batch, are laid where like ones lie."""
    monkeypatch.setattr("efficientclip.noise.neighbourhoods.SAMPLE", 3000)
    monkeypatch.setattr("efficientclip.noise.neighbourhoods.MINI_BATCH", 500)
    random = np.random.default_rng(0)
    features, of = clustered(random, 40_000, 60)
    cell = cells([features], seed=0, size=80)
    assert cell.dtype == np.int32 and cell.shape == (40_000,)
    counts = np.bincount(cell)
    assert 300 <= len(counts) <= 600
    # Hardly a row lies without others to testify.
    assert (counts[cell] >= 10).mean() > 0.95
    assert purity(cell, of) > 0.9 > 0.1 > purity(random.permutation(cell), of)
    np.testing.assert_array_equal(cell, cells([features], seed=0, size=80))
    assert len(set(cells([features], seed=0, size=80, most=16))) <= 24


def test_cells_hear_all_sides_and_few_rows() -> None:
    random = np.random.default_rng(1)
    (one, of_one), (other, of_other) = (clustered(random, 4000, 4) for _ in range(2))
    cell = cells([one, other], seed=0)
    assert purity(cell, of_one) > 0.9 and purity(cell, of_other) > 0.9
    for rows in (1, 2, 33):
        assert len(cells([one[:rows], other[:rows]], seed=0)) == rows
