from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from efficientclip.config import Confidence
from efficientclip.data.store import Store, edges
from efficientclip.errors import UserError
from efficientclip.noise.confidence import ConfidenceTable
from efficientclip.noise.neighbourhoods import folds, near, pair_groups
from efficientclip.noise.rate import (
    NEGLIGIBLE,
    ROUNDING,
    TESTIMONY,
    Competence,
    CrossFit,
    Docket,
    clean_log_odds,
    competence,
    noise_interval,
    noise_rate,
    null_captions,
    p_values,
    read_cross_fit,
    sources,
    write_cross_fit,
)
from tests import tiny


def unit(random: np.random.Generator, rows: int, width: int = 8) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(random.standard_normal((rows, width))).float(), dim=1)


@pytest.mark.parametrize("most_witnesses", [5, 1024])
def test_p_is_the_share_of_other_captions_that_fit_better(monkeypatch: pytest.MonkeyPatch, most_witnesses: int) -> None:
    monkeypatch.setattr("efficientclip.noise.rate.MOST_WITNESSES", most_witnesses)
    random = np.random.default_rng(0)
    text, image = unit(random, 30), unit(random, 12)
    text[7] = text[8]  # equal scores
    pairs = sorted({(int(random.integers(30)), int(random.integers(12))) for _ in range(90)})
    captions, images = np.array(pairs).T
    captions[:2], images[:2] = [7, 8], [3, 3]
    other_links = [(1, 3), (2, 5)]
    left, right = np.array([*zip(captions, images, strict=True), *other_links]).T
    null = null_captions(captions, seed=0)
    p, cosine = p_values(text.numpy(), image.numpy(), captions, images, edges(right, left, 12), null)
    linked = set(zip(left.tolist(), right.tolist(), strict=True))
    for row, (caption, picture) in enumerate(zip(captions, images, strict=True)):
        others = [k for k in range(30) if (k, picture) in linked and k != caption]
        weight = TESTIMONY if len(others) + 1 <= most_witnesses else 0.0
        shown = image[picture] + weight * sum((text[k] for k in others), torch.zeros(8)) / (len(others) + 1)
        shown = shown / shown.norm()
        scores = [float(text[k] @ shown) for k in captions if (k, picture) not in linked]
        own = float(text[caption] @ shown)
        above = sum(np.clip(0.5 + (score - own) / (2 * ROUNDING), 0, 1) for score in scores)
        assert cosine[row] == pytest.approx(float(text[caption] @ image[picture]), abs=1e-6)
        assert p[row] == pytest.approx((above + 0.5) / (len(scores) + 1), abs=1e-3)


def test_p_of_random_pairs_is_uniform_however_the_tower_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    text, image = unit(random, 400, 4), unit(random, 300, 4)
    # Captions of unequal frequency and a tower that likes some captions everywhere.
    text[:40] = torch.nn.functional.normalize(text[:40] * 0.3 + image.mean(0), dim=1)
    popularity = random.dirichlet(np.full(400, 0.3))
    for sampled in (False, True):
        monkeypatch.setattr("efficientclip.noise.rate.NULL_CAPTIONS", 150 if sampled else 4096)
        captions, images = random.choice(400, 6000, p=popularity), random.integers(0, 300, 6000)
        captions, images = np.unique([captions, images], axis=1)
        null, captions_of = null_captions(captions, seed=0), edges(images, captions, 300)
        p, _ = p_values(text.numpy(), image.numpy(), captions, images, captions_of, null)
        shares = np.histogram(p, 10, (0, 1))[0] / len(p)
        assert p.mean() == pytest.approx(0.5, abs=0.02)
        assert np.abs(shares - 0.1).max() < 0.02


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


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5])
def test_rate_is_found_though_the_towers_know_half(rate: float) -> None:
    found = []
    for seed in range(3):
        p, around, wrong, _ = scored_pairs(rate, seed)
        every = np.arange(len(p))
        found.append(noise_rate(p, around, every))
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
    found = [noise_rate(p, around, half) for half in rows]
    assert found == pytest.approx([wrong[half].mean() for half in rows], abs=0.05)
    assert noise_rate(p, around, np.arange(n)) < wrong.mean() - 0.1


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_an_interval_is_as_wide_as_chance_moves_the_rate(rate: float) -> None:
    """The counts of other pairs of the same kind would lie in it, 95 times of 100."""
    rates, intervals = [], []
    for seed in range(40):
        p, around, _, _ = scored_pairs(rate, seed, 4_000)
        every = np.arange(len(p))
        rates.append(noise_rate(p, around, every))
        intervals.append(noise_interval(p, around, every))
    assert all(low <= found <= high for found, (low, high) in zip(rates, intervals, strict=True) if found > 0)
    held = np.mean([low <= np.mean(rates) <= high for low, high in intervals])
    assert 0.8 <= held <= 1
    assert 2 * np.std(rates) < np.mean([high - low for low, high in intervals]) < 7 * np.std(rates)
    assert noise_interval(p, around, every) == noise_interval(p, around, every)


def test_captions_from_elsewhere_count_once() -> None:
    """They fit worse than the source's own: their p is not uniform, but near 1."""
    for rate in (0.1, 0.3):
        p, around, wrong, _ = scored_pairs(rate, 7)
        foreign = wrong & (np.random.default_rng(8).random(len(p)) < 0.5)
        p[foreign] = np.random.default_rng(9).uniform(0.97, 1, foreign.sum())
        assert noise_rate(p, around, np.arange(len(p))) == pytest.approx(wrong.mean(), abs=0.05)


def test_captions_are_compared_within_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientclip.noise.rate.LEAST_SOURCE", 60)
    store = Store(tiny.pair_store(tmp_path / "store"))
    name_sources(store, ["a"] * 100 + ["b"] * 140)
    random = np.random.default_rng(3)
    docket, groups = doubted(store, random)
    found = judge(docket, groups)
    assert found.rate > 0
    assert [(source.name, source.pairs) for source in found.sources] == [("b", 140), ("a", 100)]
    assert all(0 <= source.low <= source.rate <= source.high <= 1 for source in found.sources)
    told = sum(source.rate * source.pairs for source in found.sources if source.rate >= NEGLIGIBLE)
    assert told / 240 == pytest.approx(found.rate)
    write_cross_fit(tmp_path, store, found)
    assert read_cross_fit(tmp_path, store).sources == found.sources
    monkeypatch.setattr("efficientclip.noise.rate.NEGLIGIBLE", 1.1)
    assert judge(docket, groups).rate == 0
    for part in (np.arange(100), np.arange(100, 240)):
        rows = part[docket.fold[part] == 0]
        captions, images = store.caption_ids[rows], store.image_ids[rows]
        null = null_captions(captions, seed=0)
        alone, _ = p_values(docket.text_2KD[1], store.features, captions, images, docket.captions_of, null)
        np.testing.assert_allclose(found.p[rows], alone, atol=1e-4)


def doubted(store: Store, random: np.random.Generator) -> tuple[Docket, Any]:
    """The store's pairs before two towers that know nothing, and the groups of the pairs."""
    groups = pair_groups(store, near(store.features, 0))
    text_2KD = [unit(random, len(store.offsets) - 1, store.width).numpy() for _ in range(2)]
    return Docket(store, folds(groups, seed=3), text_2KD, seed=0), groups


def judge(docket: Docket, groups: Any) -> CrossFit:
    answers = np.concatenate([docket.answers(part) for part in range(len(docket.parts))])
    return docket.verdicts(answers, groups, visits=1)


def test_pairs_are_judged_alike_in_parts_and_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are cut at sources, towers and sizes; an image's captions may stand in several."""
    monkeypatch.setattr("efficientclip.noise.rate.LEAST_SOURCE", 60)
    monkeypatch.setattr("efficientclip.noise.rate.NULL_CAPTIONS", 40)
    store = Store(tiny.pair_store(tmp_path / "store", sources=("a", "b", "b")))
    whole, groups = doubted(store, np.random.default_rng(3))
    assert [end - begin for _, begin, end in whole.parts] == np.diff(whole.bounds).tolist() and len(whole.parts) == 4
    expected = judge(whole, groups)
    monkeypatch.setattr("efficientclip.noise.rate.PART", 17)
    monkeypatch.setattr("efficientclip.noise.rate.ROWS", 7)
    monkeypatch.setattr("efficientclip.noise.rate.BLOCK", {"cpu": 5 * 40})
    cut, _ = doubted(store, np.random.default_rng(3))
    assert len(cut.parts) > 12 and max(end - begin for _, begin, end in cut.parts) == 17
    # In another order, as ranks have them.
    answers = {part: cut.answers(part) for part in reversed(range(len(cut.parts)))}
    found = cut.verdicts(np.concatenate([answers[part] for part in sorted(answers)]), groups, visits=1)
    np.testing.assert_allclose(found.p, expected.p, atol=1e-4)
    np.testing.assert_allclose(found.score, expected.score, atol=1e-6)
    assert found.p.std() > 0.1
    assert [source.pairs for source in found.sources] == [source.pairs for source in expected.sources]


def test_the_tower_that_trained_on_a_pair_is_not_asked(tmp_path: Path) -> None:
    store = Store(tiny.pair_store(tmp_path / "store"))
    docket, _ = doubted(store, np.random.default_rng(3))
    answers = np.concatenate([docket.answers(part) for part in range(len(docket.parts))])
    for row, (_, cosine) in zip(docket.order, answers, strict=True):
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
        monkeypatch.setattr("efficientclip.noise.rate.LEAST_SOURCE", least)
        parts = sources(store)
        assert [len(rows) for _, rows in parts] == sizes
        assert sorted(np.concatenate([rows for _, rows in parts])) == list(range(240))
        few = f"source(s) of fewer than {least} pairs"
        names = {0: ["a", "b", "c", "(none)"], 60: ["a", "b", f"2 {few}"], 90: ["a", f"3 {few}"], 101: [f"4 {few}"]}
        assert [name for name, _ in parts] == names[least]
    monkeypatch.setattr("efficientclip.noise.rate.LEAST_SOURCE", 300)
    assert [name for name, _ in sources(store)] == ["a and 3 source(s) of fewer than 300 pairs"]
    name_sources(store, ["a"] * 240)
    assert [(name, len(rows)) for name, rows in sources(store)] == [("a", 240)]


def separation(upper: Any, lower: Any) -> float:
    return float((np.searchsorted(np.sort(lower), upper)).mean() / len(lower))


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
