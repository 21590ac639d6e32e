from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.config import Confidence
from efficientclip.data.store import Store
from efficientclip.errors import UserError
from efficientclip.noise.answers import Answers, answers, null_captions
from efficientclip.noise.confidence import ConfidenceTable
from efficientclip.noise.cross_fit import UNTOLD, CrossFit, SourceRate, read_cross_fit, read_near, write_cross_fit
from efficientclip.noise.docket import Docket, sources
from efficientclip.noise.neighbourhoods import folds, near, pair_groups
from tests import tiny


def test_captions_are_compared_within_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientclip.noise.docket.LEAST_SOURCE", 60)
    monkeypatch.setattr("efficientclip.noise.cross_fit.UNTOLD", 1.1)
    store = Store(tiny.pair_store(tmp_path / "store"))
    name_sources(store, ["a"] * 100 + ["b"] * 140)
    random = np.random.default_rng(3)
    docket, groups = doubted(store, random)
    found = judge(docket, groups)
    assert found.rate > 0
    assert [(source.name, source.pairs) for source in found.sources] == [("b", 140), ("a", 100)]
    assert all(0 <= source.low <= source.rate <= source.high <= 1 for source in found.sources)
    assert sum(source.droppable * source.pairs for source in found.sources) / 240 == pytest.approx(found.rate)
    assert found.whole is not None and found.whole.pairs == 240
    assert found.whole.low <= found.whole.rate <= found.whole.high
    write_cross_fit(tmp_path, store, found)
    read = read_cross_fit(tmp_path, store)
    assert read.sources == found.sources and read.whole == found.whole and read.near == found.near
    assert read.company is not None and np.array_equal(read.company, found.company)
    monkeypatch.setattr("efficientclip.noise.cross_fit.NEGLIGIBLE", 1.1)
    assert judge(docket, groups).rate == 0
    for part in (np.arange(100), np.arange(100, 240)):
        rows = part[docket.fold[part] == 0]
        captions, images = store.caption_ids[rows], store.image_ids[rows]
        null, ties = null_captions(captions, seed=0), (docket.captions_of, store.caption_edges)
        alone = answers(docket.text_2KD[1], store.features, captions, images, *ties, null)
        np.testing.assert_allclose(found.p[rows], alone.p, atol=1e-4)


def test_a_rate_that_towers_cannot_tell_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers that know nothing: any rate fits, and none is a ground, nor is one of near misses told beside it."""
    monkeypatch.setattr("efficientclip.noise.docket.near_miss_interval", lambda *_: [0.2, 0.25, 0.3])
    docket, groups = doubted(Store(tiny.pair_store(tmp_path / "store")), np.random.default_rng(3))
    found = judge(docket, groups)
    assert found.whole is not None and found.whole.high - found.whole.low > UNTOLD
    assert found.sources[0].open and found.sources[0].droppable == 0 and found.rate == 0
    assert found.near is None
    assert 0.5 <= found.sources[0].skill < 0.65


def test_a_rate_is_a_ground_where_it_is_told_and_not_negligible() -> None:
    assert SourceRate("a", 9, 0.3, 0.28, 0.32).droppable == 0.3
    assert SourceRate("a", 9, 0.02, 0.01, 0.03).droppable == 0
    assert SourceRate("a", 9, 0.3, 0.1, 0.5).droppable == 0
    assert SourceRate("a", 9, 0.07, 0.01, 0.14).droppable == 0


def test_what_earlier_versions_wrote_is_read(tmp_path: Path) -> None:
    """Without near misses and company, with a digest of what there was."""
    store, ones = Store(tiny.pair_store(tmp_path / "store")), np.ones(240)
    whole = SourceRate("all", 240, 0.3, 0.28, 0.32, 0.9)
    write_cross_fit(tmp_path, store, CrossFit(0.3, 7, ones.astype(np.int8), ones, ones, ones, ones, whole=whole))
    table = pq.read_table(tmp_path / "cross_fit.parquet")
    told = {key: one for key, one in table.schema.metadata.items() if key not in (b"near", b"sha256", b"ARROW:schema")}
    assert len(told) == len(table.schema.metadata) - 2 and "company" not in table.column_names
    digest = hashlib.sha256(b"".join(len(one).to_bytes(8, "little") + one for one in told.values())).hexdigest()
    pq.write_table(table.replace_schema_metadata(told | {b"sha256": digest}), tmp_path / "cross_fit.parquet")
    found = read_cross_fit(tmp_path, store)
    assert found.near is None and found.company is None and found.whole == whole and read_near(tmp_path) == ""


def unit(random: np.random.Generator, rows: int, width: int) -> Any:
    found = random.standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def doubted(store: Store, random: np.random.Generator) -> tuple[Docket, Any]:
    """The store's pairs before two towers that know nothing, and the groups of the pairs."""
    groups = pair_groups(store, near(store.features, 0))
    text_2KD = [unit(random, len(store.offsets) - 1, store.width) for _ in range(2)]
    return Docket(store, folds(groups, seed=3), text_2KD, seed=0), groups


def judge(docket: Docket, groups: Any) -> CrossFit:
    told = np.concatenate([docket.answers(part) for part in range(len(docket.parts))])
    return docket.verdicts(told, groups, visits=1)


def test_pairs_are_judged_alike_in_parts_and_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are cut at sources, towers and sizes; an image's captions may stand in several."""
    monkeypatch.setattr("efficientclip.noise.docket.LEAST_SOURCE", 60)
    monkeypatch.setattr("efficientclip.noise.answers.NULL_CAPTIONS", 40)
    store = Store(tiny.pair_store(tmp_path / "store", sources=("a", "b", "b")))
    whole, groups = doubted(store, np.random.default_rng(3))
    assert [end - begin for _, begin, end in whole.parts] == np.diff(whole.bounds).tolist() and len(whole.parts) == 4
    expected = judge(whole, groups)
    monkeypatch.setattr("efficientclip.noise.docket.PART", 17)
    monkeypatch.setattr("efficientclip.noise.answers.ROWS", 7)
    monkeypatch.setattr("efficientclip.noise.answers.BLOCK", {"cpu": 5 * 40})
    cut, _ = doubted(store, np.random.default_rng(3))
    assert len(cut.parts) > 12 and max(end - begin for _, begin, end in cut.parts) == 17
    # In another order, as ranks have them.
    told = {part: cut.answers(part) for part in reversed(range(len(cut.parts)))}
    found = cut.verdicts(np.concatenate([told[part] for part in sorted(told)]), groups, visits=1)
    np.testing.assert_allclose(found.p, expected.p, atol=1e-4)
    np.testing.assert_allclose(found.score, expected.score, atol=1e-6)
    assert found.p.std() > 0.1
    assert [source.pairs for source in found.sources] == [source.pairs for source in expected.sources]


def test_the_tower_that_trained_on_a_pair_is_not_asked(tmp_path: Path) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    docket, _ = doubted(store, np.random.default_rng(3))
    told = np.concatenate([docket.answers(part) for part in range(len(docket.parts))])
    for row, cosine in zip(docket.order, Answers(*told.T).cosine, strict=True):
        text = docket.text_2KD[1 - docket.fold[row]][store.caption_ids[row]]
        assert cosine == pytest.approx(float(text @ store.features[store.image_ids[row]].astype(np.float32)), abs=1e-5)


def name_sources(store: Store, names: list[str | None]) -> None:
    pairs = store.pairs()
    place = pairs.column_names.index("source")
    file = store.path / "pairs.parquet"
    pq.write_table(pairs.set_column(place, "source", pa.array(names)), file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def test_small_sources_are_taken_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    name_sources(store, ["a"] * 100 + ["b"] * 60 + ["c"] * 50 + [None] * 30)
    for least, sizes in ((0, [100, 60, 50, 30]), (60, [100, 60, 80]), (90, [100, 140]), (101, [240])):
        monkeypatch.setattr("efficientclip.noise.docket.LEAST_SOURCE", least)
        parts = sources(store)
        assert [len(rows) for _, rows in parts] == sizes
        assert sorted(np.concatenate([rows for _, rows in parts])) == list(range(240))
        few = f"source(s) of fewer than {least} pairs"
        names = {0: ["a", "b", "c", "(none)"], 60: ["a", "b", f"2 {few}"], 90: ["a", f"3 {few}"], 101: [f"4 {few}"]}
        assert [name for name, _ in parts] == names[least]
    monkeypatch.setattr("efficientclip.noise.docket.LEAST_SOURCE", 300)
    assert [name for name, _ in sources(store)] == ["a and 3 source(s) of fewer than 300 pairs"]
    name_sources(store, ["a"] * 240)
    assert [(name, len(rows)) for name, rows in sources(store)] == [("a", 240)]


def judged(folder: Path, rate: float, odds: Any) -> Confidence:
    """A config whose cross-fit folder holds these verdicts."""
    store = Store(tiny.pair_store(folder / "store"))
    found = CrossFit(rate, 7, np.zeros(len(store), np.int8), odds, odds, odds, odds)
    write_cross_fit(folder, store, found)
    return Confidence(selection="calibrated", cross_fit=folder, warmup_epochs=0)


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, 0), (0.031, 7), (0.3, 72)])
def test_as_many_pairs_go_as_are_wrong(tmp_path: Path, rate: float, dropped: int) -> None:
    table = ConfidenceTable(240, judged(tmp_path, rate, np.arange(240.0)))
    assert np.flatnonzero(~table.kept).tolist() == list(range(dropped))


def test_later_evidence_clears_and_convicts(tmp_path: Path) -> None:
    odds = np.random.default_rng(0).standard_normal(240)
    table = ConfidenceTable(240, judged(tmp_path, 0.25, odds))
    first = table.kept.copy()
    score = np.where(np.arange(240) == odds.argmin(), 20.0, np.where(np.arange(240) == odds.argmax(), -20.0, 0.0))
    for epoch in range(3):
        table.observe(epoch, np.arange(240), score, np.ones(240, bool))
        table.select(epoch)
    assert not first[odds.argmin()] and table.kept[odds.argmin()]
    assert first[odds.argmax()] and not table.kept[odds.argmax()]
    assert table.kept.sum() == first.sum() == 180


def test_verdicts_are_read_back_and_only_for_their_store(tmp_path: Path) -> None:
    odds = np.random.default_rng(0).standard_normal(240)
    judged(tmp_path, 0.25, odds)
    found = read_cross_fit(tmp_path, Store(tmp_path / "store"))
    assert (found.rate, found.visits) == (0.25, 7)
    np.testing.assert_array_equal(found.clean_log_odds, odds)
    with pytest.raises(UserError, match="judges other pairs"):
        read_cross_fit(tmp_path, Store(tiny.pair_store(tmp_path / "other", seed=1)))
    with pytest.raises(UserError, match="run `efficientclip cross-fit CONFIG` first"):
        read_cross_fit(tmp_path / "nowhere")
