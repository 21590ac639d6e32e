"""Parts of a store share no picture, near-duplicate or rare title, and hold what the store held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientclip.data.store import Store, edges
from efficientclip.fitting.split import NEAR_DUPLICATE, TITLE_PICTURES, groups_of, split
from efficientclip.prepare.writer import write_ids
from tests import tiny


def centred(features: Any) -> Any:
    """Rows less their mean, normalised."""
    rows = features.astype(np.float32) - features.astype(np.float32).mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of 80 pictures, of which every second one is nearly the one before; captions are of one picture, or of 20."""
    path = tiny.pair_store(tmp_path / "store", pairs=400, images=80)
    random = np.random.default_rng(3)
    features = np.fromfile(path / "features.bin", np.float16).reshape(80, -1).astype(np.float32)
    features[1::2] = features[::2] + 0.02 * random.standard_normal(features[::2].shape)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features.astype(np.float16).tofile(path / "features.bin")
    held = Store(path)
    captions = len(held.offsets) - 1
    caption_ids = np.where(np.arange(400) % 4 == 0, 0, 1 + np.arange(400) % (captions - 1))
    image_ids = (np.arange(400) // 4) % 80
    write_ids(path, image_ids, caption_ids, captions)
    tiny.finished_again(path)
    return Store(path)


def test_near_duplicates_and_rare_titles_stay_together(store: Store) -> None:
    groups, most = groups_of(store, seed=0)
    features = centred(store.features)
    assert (features[::2] * features[1::2]).sum(1).min() >= NEAR_DUPLICATE
    assert (groups[::2] == groups[1::2]).all()
    # The caption on every picture joins none, or there were one group.
    assert len(np.unique(groups)) > 1 and most <= TITLE_PICTURES


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_share_nothing_and_lose_nothing(store: Store, tmp_path: Path, seed: int) -> None:
    made = {
        name: Store(path) for name, path in split(store, tmp_path / "of", {"test": 40, "validation": 40}, seed).items()
    }
    assert sum(map(len, made.values())) == len(store)
    assert all(20 <= len(made[name]) <= 40 for name in ("test", "validation"))
    rows: dict[str, set[tuple[str, str]]] = {}
    for name, part in made.items():
        part.prove(anew=True)
        pairs = part.pairs()
        rows[name] = set(zip(pairs["key"].to_pylist(), pairs["caption"].to_pylist(), strict=True))
        # Each pair kept its picture and its tokens.
        whole = {key: at for at, key in enumerate(store.pairs()["key"].to_pylist())}
        for at, key in enumerate(pairs["key"].to_pylist()):
            row = whole[key]
            assert (part.features[part.image_ids[at]] == store.features[store.image_ids[row]]).all()
            mine, theirs = part.caption_ids[at], store.caption_ids[row]
            tokens = part.tokens[slice(*part.offsets[mine : mine + 2])]
            assert (tokens == store.tokens[slice(*store.offsets[theirs : theirs + 2])]).all()
        again = edges(part.caption_ids, part.image_ids, len(part.offsets) - 1)
        assert all((one == other).all() for one, other in zip(part.caption_edges, again, strict=True))
    assert set.union(*rows.values()) == set(
        zip(*(store.pairs()[name].to_pylist() for name in ("key", "caption")), strict=True)
    )
    test, train = np.split(
        centred(np.concatenate([made["test"].features, made["train"].features])), [len(made["test"].features)]
    )
    assert (test @ train.T).max() < NEAR_DUPLICATE + 0.02


def test_parts_that_stand_are_not_made_again(store: Store, tmp_path: Path) -> None:
    wanted = {"test": 40}
    first = split(store, tmp_path / "of", wanted, 0)["test"] / "manifest.json"
    before = first.stat().st_mtime_ns
    split(store, tmp_path / "of", wanted, 0)
    assert first.stat().st_mtime_ns == before
    split(store, tmp_path / "of", {"test": 30}, 0)
    assert first.stat().st_mtime_ns != before
