"""The pairs of a store before the two towers: a part at a time, and then all together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ..data.store import Store, edges
from .answers import Answers, Floats, answers, null_captions
from .cooccurrence import Ties
from .cross_fit import CrossFit, SourceRate
from .near_misses import near_miss_interval, subjects
from .neighbourhoods import Features, Integers, cells
from .rate import HIT, INTERVAL, RATES, clean_log_odds, competence, quantiles, rate_posteriors, second_witness

LEAST_SOURCE = 2000  # pairs; smaller sources are taken together
PART = 1 << 16  # pairs that are judged at a time
DRAWS = 10_000  # of the rate of all sources
BESIDE = 0.2  # of the wrong ones that look like near misses, perhaps
VERDICTS = 3  # raised when the same answers would give others


def sources(store: Store) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Name and rows of the pairs of each source; those of sources with fewer than LEAST_SOURCE pairs are taken
    together, and with the largest source where they are still fewer."""
    found = store.sources()
    sizes, names = np.bincount(found.of), [name or "(none)" for name in found.names]
    large = int((sizes >= LEAST_SOURCE).sum())
    small, together = len(sizes) - large, large
    if sizes[large:].sum() < LEAST_SOURCE:
        large = max(large, 1)
        small, together = len(sizes) - large, 0
    few = f"{small} source(s) of fewer than {LEAST_SOURCE:,} pairs"
    if together == large:
        names[large:] = [few]
    elif small:
        names[0] += f" and {few}"
    codes = np.where(found.of < large, found.of, together)
    order, (told, first) = np.argsort(codes, kind="stable"), np.unique(np.sort(codes), return_index=True)
    return [(names[code], rows) for code, rows in zip(told, np.split(order, first[1:]), strict=True)]


class Docket:
    """A store's pairs in the order in which they are judged, in parts of at most PART pairs: by source, by the tower
    that did not train on them, by image.

    Tower f, whose features of all captions are text_2KD[f], trained on the pairs of fold f and judges the others.
    """

    def __init__(
        self,
        store: Store,
        fold: npt.NDArray[np.int8],
        text_2KD: Sequence[Features],
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.store, self.fold, self.text_2KD, self.seed, self.device = store, fold, text_2KD, seed, device
        self.sources = sources(store)
        source = np.empty(len(store), np.int32)
        for number, (_, rows) in enumerate(self.sources):
            source[rows] = number
        panel = 2 * source + (1 - fold)
        self.order = np.lexsort((store.image_ids, panel))
        self.bounds = [0, *(np.flatnonzero(np.diff(panel[self.order])) + 1).tolist(), len(store)]
        self.captions_of = edges(store.image_ids, store.caption_ids, len(store.features))
        # Panel, begin and end in `order` of each part.
        self.parts = [
            (number, begin, min(begin + PART, high))
            for number, (low, high) in enumerate(itertools.pairwise(self.bounds))
            for begin in range(low, high, PART)
        ]
        self._null: tuple[int, tuple[Integers, Integers]] | None = None

    def answers(self, part: int) -> Floats:
        """The `Answers` about the part's pairs, float64 [pairs, 3]."""
        number, begin, end = self.parts[part]
        rows, caption_ids = self.order[begin:end], self.store.caption_ids
        if self._null is None or self._null[0] != number:
            every = self.order[self.bounds[number] : self.bounds[number + 1]]
            self._null = number, null_captions(caption_ids[every], self.seed)
        text_KD, images = self.text_2KD[1 - self.fold[rows[0]]], self.store.image_ids[rows]
        ties = self.captions_of, self.store.caption_edges
        found = answers(text_KD, self.store.features, caption_ids[rows], images, *ties, self._null[1], self.device)
        return np.stack(found, 1)

    def verdicts(self, told: Floats, groups: npt.NDArray[np.int64], visits: int) -> CrossFit:
        """What the towers say, from the answers [pairs, 3] of all parts, one after the other. `groups` are those of the
        pairs.

        Rates are read from the captions' words, since other pictures would vouch for a caption that is wrong on all of
        them; which pairs are the wrong ones, from both, and from the company that captions keep.
        """
        store, device = self.store, self.device
        of_pairs = np.empty_like(told)
        of_pairs[self.order] = told
        found = Answers(*of_pairs.T.copy())
        caption_cell = cells(self.text_2KD, self.seed, device)[store.caption_ids]
        image_cell = cells([store.features], self.seed, device)[store.image_ids]
        around = store.caption_ids, store.image_ids, caption_cell, image_cell, groups
        by_words = competence(found.p < HIT, *around)
        by_both = competence(found.p_with_pictures < HIT, *around)
        ties = Ties(store.image_ids, store.caption_ids)
        company = ties.company(np.arange(len(store)))
        bins, settled = company.bins(), ties.settled(company)
        subject_of = functools.cache(lambda: subjects(store.features, store.caption_edges, self.seed, device))
        odds, by_company = np.zeros(len(store)), np.zeros(len(store))
        random, rates = np.random.default_rng([self.seed, 8]), []
        drawn, near_misses = np.zeros(DRAWS), []
        posteriors = rate_posteriors(found.p, by_words, groups, [rows for _, rows in self.sources])
        for (name, rows), probability in zip(self.sources, posteriors, strict=True):
            source, share = _rate(name, found.p[rows], quantiles(probability, INTERVAL)), len(rows) / len(store)
            drawn += random.choice(RATES, DRAWS, p=probability) * share
            rates.append(source)
            wrong, near = source.droppable, None
            # Beside a rate that is not known, wrong pairs would be taken for near misses.
            if not source.open:
                near = near_miss_interval(ties, company, settled, subject_of, rows, source.rate, self.seed)
            if near is not None:
                low, rate, high = near
                few = SourceRate(name, len(rows), rate, max(0.0, low - BESIDE * source.rate), high)
                near_misses.append(few)
                wrong = min(1.0, wrong + few.droppable)
            by_company[rows] = second_witness(found.p, by_words, rows, wrong, *bins)
            odds[rows] = clean_log_odds(found.p_with_pictures, by_both, rows, wrong, by_company[rows])
        rate = sum(source.droppable * source.pairs for source in rates) / len(store)
        whole = _rate("all", found.p, np.quantile(drawn, INTERVAL).tolist())
        judged = CrossFit(rate, visits, self.fold, found.cosine, found.p, by_words.pair, odds, tuple(rates), whole)
        return replace(judged, near=_together(near_misses, len(store)), company=by_company)


def _together(found: Sequence[SourceRate], pairs: int) -> SourceRate | None:
    """That of all pairs: what one source is wrong about, the others may be wrong about alike."""
    share = np.array([source.pairs for source in found]) / pairs
    low, rate, high = (float(share @ [getattr(one, name) for one in found]) for name in ("low", "rate", "high"))
    return SourceRate("near misses", pairs, rate, low, high) if found else None


def _rate(name: str, p: Floats, quantiles: list[float]) -> SourceRate:
    """A mean 1 - p is the share of all mismatches of a picture with the source's captions that its own caption beats;
    a wrong one beats half of them."""
    low, rate, high = quantiles
    skill = (1 - float(p.mean()) - rate / 2) / max(1 - rate, 1e-9)
    return SourceRate(name, len(p), rate, low, high, min(max(skill, 0.5), 1.0))
