from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from efficientclip.data.store import edges
from efficientclip.noise import cooccurrence, near_misses
from efficientclip.noise.answers import sums
from efficientclip.noise.cooccurrence import Company, Ties
from efficientclip.noise.cross_fit import TOLD_FROM_NONE, SourceRate
from efficientclip.noise.near_misses import near_miss_interval, subjects


@pytest.mark.parametrize("ties_at_once", [7, 1 << 22])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_company_is_what_counting_finds(monkeypatch: pytest.MonkeyPatch, ties_at_once: int, elsewhere: bool) -> None:
    monkeypatch.setattr(cooccurrence, "TIES", ties_at_once)
    monkeypatch.setattr(cooccurrence, "MOST_WITNESSES", 12)
    random = np.random.default_rng(1)
    # Pairs that stand twice, a caption and a picture with more than 12 ties.
    images = np.concatenate([random.integers(0, 30, 150), np.full(20, 4), random.integers(0, 30, 20)])
    captions = np.concatenate([random.integers(0, 25, 150), random.integers(0, 25, 20), np.full(20, 6)])
    tied = {*zip(images.tolist(), captions.tolist(), strict=True)}
    pictures = {caption: {i for i, other in tied if other == caption} for caption in range(25)}
    named = {image: {c for other, c in tied if other == image} for image in range(30)}
    full = {image for image in named if len(named[image]) > 12}
    heard = {caption for caption in pictures if 1 < len(pictures[caption]) <= 12}
    donors = random.integers(0, len(images), len(images)) if elsewhere else np.arange(len(images))
    found = Ties(images, captions).company(np.arange(len(images)), donors if elsewhere else None)
    for row, (image, replaced) in enumerate(zip(images, captions, strict=True)):
        caption, without = captions[donors[row]], images[donors[row]]
        others = pictures[caption] - {without} if caption in heard else set()
        if elsewhere and caption in named[image]:
            continue
        assert found.others[row] == len(others)
        if not others:
            continue
        witnesses = (named[image] - {caption, replaced}) & heard if image not in full else set()
        met = [len(others & pictures[witness] - full - {image}) for witness in witnesses]
        expected = [len(others) * (len(pictures[witness]) - 1) / 30 for witness in witnesses]
        assert found.witnesses[row] == len(witnesses) and found.met[row] == sum(met)
        lift = np.log1p(np.array(met) / np.array(expected)).mean() if met else 0
        assert found.lift[row] == pytest.approx(lift)


def test_bins_hold_pairs_of_like_many_others() -> None:
    random = np.random.default_rng(2)
    others, witnesses = random.integers(0, 20, 4000), random.integers(0, 4, 4000)
    others[:50] = 700
    found = Company(others, witnesses, witnesses, random.random(4000))
    bins, stratum = found.bins()
    assert ((bins == 0) >= ~found.known).all() and (bins[(others > 0) & (others < 17) & (witnesses > 0)] > 0).all()
    for number in np.unique(bins[bins > 0]):
        within = found.others[bins == number]
        assert np.unique(np.digitize(within, cooccurrence.OTHERS)).tolist() == [stratum[number]]
    for number in np.unique(stratum[1:]):
        of = np.flatnonzero(stratum == number)
        lifts = [found.lift[bins == one] for one in of]
        assert all(one.max() <= two.min() for one, two in itertools.pairwise(lifts))
    # Too few of like company tell nothing.
    few = Company(np.array([3, 3]), np.array([2, 2]), np.array([0, 1]), np.array([0.0, 1.0]))
    assert few.bins()[0].tolist() == [0, 0]


def shop(near: float, anywhere: float, seed: int, subjects_: int = 400) -> tuple[Any, Any, Any, Any]:
    """Pictures of 400 subjects in 40 families, six of each, with six names each: (features, images, captions, wrong).

    A share `near` of the captions is another subject's of the family, a share `anywhere` any subject's.
    """
    random = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects_), 6)
    family = random.standard_normal((subjects_ // 10, 32))
    own = family[np.arange(subjects_) // 10] + 0.3 * random.standard_normal((subjects_, 32))
    features = own[subject] + 0.1 * random.standard_normal((len(subject), 32))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    images, name = np.repeat(np.arange(len(subject)), 6), np.tile(np.arange(6), len(subject))
    shown, draw = subject[images], random.random(len(images))
    cousin = shown // 10 * 10 + (shown % 10 + random.integers(1, 10, len(shown))) % 10
    other = (shown + random.integers(1, subjects_, len(shown))) % subjects_
    named = np.where(draw < near, cousin, np.where(draw < near + anywhere, other, shown))
    return features.astype(np.float16), images, named * 6 + name, named != shown


def told_of(made: tuple[Any, Any, Any, Any], wrong: float, seed: int) -> list[float]:
    features, images, captions, _ = made
    ties, rows = Ties(images, captions), np.arange(len(images))
    subject = subjects(features, edges(captions, images, int(captions.max()) + 1), seed)
    company = ties.company(rows)
    found = near_miss_interval(ties, company, ties.settled(company), lambda: subject, rows, wrong, seed)
    assert found is not None and 0 <= found[0] <= found[1] <= found[2] <= 1
    return found


@pytest.mark.parametrize("near", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("anywhere", [0.0, 0.2])
def test_near_misses_are_counted_beside_captions_from_anywhere(near: float, anywhere: float) -> None:
    low, rate, _ = np.mean([told_of(shop(near, anywhere, seed), anywhere, seed) for seed in (11, 12, 13)], 0)
    # Beside others they may be taken for some of these, never others for them.
    assert rate - near < 0.03 and (anywhere > 0 or near - rate < 0.08)
    assert low < (TOLD_FROM_NONE if near == 0 else near)


def names_of_many(near: float, seed: int) -> tuple[Any, Any, Any, Any]:
    """Pictures of 500 subjects in families of five, each with six of its subject's 100 names, some much rarer than
    others: most that another picture of the subject has, and this one has not, are right.
    """
    random, chance = np.random.default_rng(seed), 1 / np.arange(1, 101)
    subject = random.integers(0, 500, 10_000)
    own = random.standard_normal((100, 32))[np.arange(500) // 5] + 0.3 * random.standard_normal((500, 32))
    features = own[subject] + 0.3 * random.standard_normal((len(subject), 32))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    # The greatest six of Gumbel's are drawn without replacement.
    name = np.argsort(np.log(chance) + random.gumbel(size=(len(subject), 100)))[:, -6:].ravel()
    images, shown = np.repeat(np.arange(len(subject)), 6), np.repeat(subject, 6)
    cousin = shown // 5 * 5 + (shown + random.integers(1, 5, len(shown))) % 5
    named = np.where(random.random(len(shown)) < near, cousin, shown)
    return features.astype(np.float16), images, named * 100 + name, named != shown


@pytest.mark.parametrize("near", [0.0, 0.1])
def test_right_captions_that_a_picture_has_not_are_taken_for_no_near_misses(near: float) -> None:
    low, rate, high = told_of(names_of_many(near, 1), 0.0, 1)
    assert low < near + 0.01 and SourceRate("", 1, rate, low, high).droppable == 0


def test_where_captions_stand_alone_nothing_is_told() -> None:
    images, captions = np.repeat(np.arange(500), 5), np.arange(2500)
    ties = Ties(images, captions)
    company, rows = ties.company(np.arange(2500)), np.arange(2500)
    assert not company.known.any() and not company.bins()[0].any()
    settled = ties.settled(company)
    assert near_miss_interval(ties, company, settled, lambda: pytest.fail("asks for subjects"), rows, 0.1, 0) is None


def test_lift_tells_near_misses_from_right_captions() -> None:
    _, images, captions, wrong = shop(0.3, 0.0, 13)
    lift = Ties(images, captions).company(np.arange(len(images))).lift
    assert (lift[~wrong][:, None] > lift[wrong][None, ::7]).mean() > 0.9


def test_captions_without_company_are_tried_on_other_pictures() -> None:
    images, captions = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 1, 0, 1, 2, 2])
    found = Ties(images, captions).company(np.array([0]), np.array([4]))
    assert (found.others.tolist(), found.witnesses.tolist(), found.met.tolist()) == ([1], [1], [0])


def test_a_picture_with_too_many_captions_costs_no_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass goes over all pairs."""
    monkeypatch.setattr(cooccurrence, "MOST_WITNESSES", 12)
    monkeypatch.setattr(cooccurrence, "TIES", 200)
    images, captions = np.append(np.zeros(100, int), np.arange(1, 101)), np.tile(np.arange(100), 2)
    ties, passes = Ties(images, captions), []
    monkeypatch.setattr(ties, "_parts", lambda *given: passes.extend(parts := Ties._parts(ties, *given)) or parts)
    ties.company(np.arange(200))
    assert len(passes) < 3


def test_a_caption_on_all_pictures_is_of_no_subject_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_misses, "MOST_WITNESSES", 12)
    summed = []
    monkeypatch.setattr(near_misses, "sums", lambda *given: summed.append(given[3]) or sums(*given))
    features = np.repeat(np.eye(32, dtype=np.float16), 10, 0)
    captions, images = np.append(np.arange(320) // 10, np.full(320, 32)), np.tile(np.arange(320), 2)
    assert near_misses.subjects(features, edges(captions, images, 33), 0).shape == (33,)
    assert summed[0].tolist() == [10] * 32 + [0]
