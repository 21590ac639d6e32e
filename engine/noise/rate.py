"""How many pairs of a store are wrong, and which: read off without labels, from towers that did not train on the pair.

Two towers train on half of the pairs each and score the other half. The p of a pair is the share of its source's other
captions that fit its picture at least as well; what the picture shows is told by its features and by its other
captions. A wrong caption that the source itself mixed up is one of these others, so its p is uniform: the null is exact
however good the tower is. One from elsewhere fits worse than they do. Right pairs have small p only where the tower is
competent, which other pairs of the same caption and picture tell. Among the most competent pairs of a source every
large p is noise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from ..data.parquet import give_back
from ..data.store import Edges, Store, edges, ranges
from ..errors import UserError, reading
from ..files.atomic import written_aside
from .neighbourhoods import ROWS, Features, Integers, best_device, cells, rows_of

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

HIT = 0.05  # a pair with a smaller p shows competence
FAILED = 0.7  # where towers are competent, right pairs hardly have a larger p
FOREIGN = 0.95  # what lies beyond, and would not if p were uniform, is no caption of this source
COMPETENT = 0.2  # share of the pairs that the rate is read from
NEGLIGIBLE = 0.03  # a source's estimated rate below it is no ground to drop anything, and counts as 0
NULL_CAPTIONS = 4096
BACKING = 2.0  # pairs' worth of belief in the wider neighbourhood's rate
STRATA = 10
TESTIMONY = 1.0  # weight of the mean of a picture's other captions beside its own features
MOST_WITNESSES = 1024  # a picture of more captions stands for no subject: they do not testify
LEAST_SOURCE = 2000  # pairs; smaller sources are taken together
ROUNDING = 1e-5  # of scores: nearer ones beat each other in part
CONVERGED = 1e-9
PART = 1 << 16  # pairs that are judged at a time
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores at a time, of a device
FILE = "cross_fit.parquet"
ANEW = "remove the folder and run `efficientclip cross-fit CONFIG` again"
DRAWS = 10_000  # of an interval
COLUMNS = ("fold", "score", "p", "competence", "clean_log_odds")


class SourceRate(NamedTuple):
    """The estimated share of wrong pairs of a source, or of small ones taken together, where a NEGLIGIBLE one is not 0
    yet; `low` to `high` is its `noise_interval`."""

    name: str
    pairs: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class CrossFit:
    """Arrays of float64 [pairs], but fold int8. `rate` is the estimated share of wrong pairs, `visits` what it cost;
    `made_of` tells what all follows from."""

    rate: float
    visits: int
    fold: npt.NDArray[np.int8]
    score: Floats  # cosine by the tower that did not train on the pair
    p: Floats
    competence: Floats
    clean_log_odds: Floats
    sources: tuple[SourceRate, ...] = ()
    made_of: str = ""


def null_captions(caption_ids: Integers, seed: int) -> tuple[Integers, Integers]:
    """The distinct captions of some pairs, ascending, and how often these hold them.

    Of more than NULL_CAPTIONS as many pairs are drawn: p = .05 is then known to .0034.
    """
    null, weights = np.unique(caption_ids, return_counts=True)
    if len(null) > NULL_CAPTIONS:
        drawn = np.random.default_rng([seed, 6]).integers(0, len(caption_ids), NULL_CAPTIONS)
        null, weights = np.unique(caption_ids[drawn], return_counts=True)
    return null, weights


@torch.no_grad()
def p_values(
    text_KD: Features,
    image_VD: Features,
    caption_ids: Integers,
    image_ids: Integers,
    captions_of: Edges,
    null: tuple[Integers, Integers],
    device: torch.device | None = None,
) -> tuple[Floats, Floats]:
    """p and cosine of the pairs (caption, image), float64 [pairs] each; features may be mapped files.

    p is the share of the `null` captions, as `null_captions` tells and weighs them, that score higher on the pair's
    image; equal scores count half, captions that `captions_of` (image -> captions, these pairs among them) ties to the
    image do not count, but testify, all but the pair's own, to what the image shows. One product, [pairs, null
    captions], in blocks that stay in a cache.
    """
    device, n = device or best_device(), len(caption_ids)
    null_ids, weights = null
    weights_M = torch.from_numpy(weights).to(device, torch.float32)
    # The column takes a pair's own score off: what is left tells a better caption by 1, an equal by .5, others by 0.
    null_ME = F.pad(rows_of(text_KD, null_ids, device), (0, 1), value=1.0)
    images, place = np.unique(image_ids, return_inverse=True)
    starts, captions = captions_of
    degree = starts[images + 1] - starts[images]
    heard = degree <= MOST_WITNESSES
    testimony_ID = _sums(text_KD, captions, starts[images], np.where(heard, degree, 0), device)
    # One more than testify, so that a single caption does not speak for all.
    weight_I = torch.from_numpy(TESTIMONY * heard / degree).to(device, torch.float32)
    column, columns, first = _linked_columns(captions[ranges(starts[images], degree)], degree, null_ids)
    p, cosine = np.empty(n), np.empty(n)
    at_once = max(1, BLOCK[device.type] // len(null_ids))
    for begin in range(0, n, at_once):
        rows = slice(begin, begin + at_once)
        of = torch.from_numpy(place[rows]).to(device)
        image_PD = rows_of(image_VD, image_ids[rows], device)
        text_PD = rows_of(text_KD, caption_ids[rows], device)
        shown_PD = F.normalize(image_PD + weight_I[of, None] * (testimony_ID[of] - text_PD), dim=1)
        own_P1 = (text_PD * shown_PD).sum(1, keepdim=True)
        asked_PE = torch.cat([shown_PD / (2 * ROUNDING), 0.5 - own_P1 / (2 * ROUNDING)], 1)
        beats_PM = (asked_PE @ null_ME.T).clamp_(0, 1)
        linked = columns[place[rows]]
        pair, at = np.repeat(np.arange(len(linked)), linked), column[ranges(first[place[rows]], linked)]
        beats_PM[torch.from_numpy(pair).to(device), torch.from_numpy(at).to(device)] = 0
        counted = weights.sum() - np.bincount(pair, weights[at], minlength=len(linked))
        # The half keeps p above 0: nobody beats a caption by less than one draw.
        p[rows] = ((beats_PM @ weights_M).double().cpu().numpy() + 0.5) / (counted + 1)
        cosine[rows] = (text_PD * image_PD).sum(1).double().cpu().numpy()
    return p, cosine


def _sums(
    text_KD: Features, captions: Integers, starts: Integers, counts: Integers, device: torch.device
) -> torch.Tensor:
    """Of each image the sum of its captions' features, float32 [images, width]; `counts` may be 0."""
    sums, ends = [], np.cumsum(counts)
    bounds = np.unique(np.searchsorted(ends, np.arange(0, counts.sum() + ROWS, ROWS)))
    for low, high in itertools.pairwise(np.unique([0, *bounds, len(counts)])):
        some = ranges(starts[low:high], counts[low:high])
        lengths = torch.from_numpy(counts[low:high]).to(device)
        sums.append(torch.segment_reduce(rows_of(text_KD, captions[some], device), "sum", lengths=lengths, axis=0))
    return torch.cat(sums)


def _linked_columns(captions: Integers, degree: Integers, null_ids: Integers) -> tuple[Integers, Integers, Integers]:
    """Columns of `null_ids` that the images' `captions`, `degree` an image and ascending in each, stand in; how many
    are each image's, and where its first is."""
    image = np.repeat(np.arange(len(degree)), degree)
    at = np.minimum(np.searchsorted(null_ids, captions), len(null_ids) - 1)
    there = null_ids[at] == captions
    # A pair may stand twice in a store.
    there[1:] &= (captions[1:] != captions[:-1]) | (image[1:] != image[:-1])
    columns = np.bincount(image[there], minlength=len(degree))
    return at[there], columns, np.cumsum(columns) - columns


def side_competence(hit: Bools, ids: Integers, cell: Integers, apart: Integers | None) -> Floats:
    """Log-odds of a hit around each pair, from the pairs of its id, backed by those of its cell.

    `ids`, `cell` and `apart` are integers [pairs]; pairs of the same `apart` do not testify for each other, and without
    it all do.
    """
    rate = (hit.sum() + 0.5) / (len(hit) + 1)
    for key in (cell, ids):
        hits, total = np.bincount(key, hit)[key], np.bincount(key)[key].astype(np.float64)
        if apart is not None:
            _, both = np.unique(key.astype(np.int64) * (int(apart.max()) + 1) + apart, return_inverse=True)
            hits, total = hits - np.bincount(both, hit)[both], total - np.bincount(both)[both]
        rate = (hits + BACKING * rate) / (total + BACKING)
    return np.log(rate) - np.log1p(-rate)


@dataclass(frozen=True)
class Competence:
    """Of each pair, by its caption's and its image's other pairs, and both sides as a random mismatched pair has them.

    Such a pair's caption is tied to foreign images, so all pairs of the caption testify; its image lacks one pair.
    """

    caption_ids: Integers
    frequency: Integers  # [captions], of these pairs
    pair: Floats
    mismatched_caption: Floats
    mismatched_image: Floats

    def mismatched_above(self, thresholds: Floats, rows: Integers) -> Floats:
        """Share of all combinations of a caption with an image of the pairs `rows` that are at least so competent.

        Captions are as frequent as in the whole store: one that noise has brought to `rows` counts no more for it.
        """
        captions, at = np.unique(self.caption_ids[rows], return_index=True)
        value = self.mismatched_caption[rows[at]]
        order = np.argsort(value, kind="stable")
        below = np.concatenate([[0], np.cumsum(self.frequency[captions[order]])])
        # Ascending, the needles find one another's place in the cache.
        wanting = -np.sort(self.mismatched_image[rows])[::-1]
        shares = [below[np.searchsorted(value[order], one + wanting)].mean() for one in thresholds]
        return np.asarray(1 - np.array(shares) / below[-1])


def competence(
    hit: Bools,
    caption_ids: Integers,
    image_ids: Integers,
    caption_cell: Integers,
    image_cell: Integers,
    groups: Integers,
) -> Competence:
    """Competence around the pairs; all arguments are [pairs], `hit` tells where p is small."""
    return Competence(
        caption_ids,
        np.bincount(caption_ids),
        side_competence(hit, caption_ids, caption_cell, groups) + side_competence(hit, image_ids, image_cell, groups),
        side_competence(hit, caption_ids, caption_cell, None),
        side_competence(hit, image_ids, image_cell, np.arange(len(hit))),
    )


def noise_rate(p: Floats, found: Competence, rows: Integers) -> float:
    """The share of wrong ones among the pairs `rows`, from p float64 [pairs] and competence.

    Among the most competent pairs a p beyond FAILED belongs to a wrong pair; how many wrong pairs are so competent, and
    what share of their p lies there, is known where noise is spread evenly: within a source.
    """
    counts, expected = _counts(p, found, rows)
    return float(_rates(counts, expected))


def noise_interval(p: Floats, found: Competence, rows: Integers) -> tuple[float, float]:
    """What chance leaves open of `noise_rate` where so few pairs tell it: 95 % of a Dirichlet distribution of their
    counts, behind Jeffreys' prior. Whether the towers are right is another question."""
    counts, expected = _counts(p, found, rows)
    drawn = np.random.default_rng(0).dirichlet(counts + 0.5, DRAWS).T * counts.sum()
    low, high = np.quantile(_rates(drawn, expected), [0.025, 0.975])
    return float(low), float(high)


def _counts(p: Floats, found: Competence, rows: Integers) -> tuple[npt.NDArray[np.int64], float]:
    """Of the most competent pairs those of a p beyond FAILED, beyond FOREIGN, and below; and how many of these pairs
    there would be if all of `rows` were wrong."""
    threshold = float(np.quantile(found.pair[rows], 1 - COMPETENT))
    competent = p[rows][found.pair[rows] >= threshold]
    beyond, failed = int((competent > FOREIGN).sum()), int((competent > FAILED).sum())
    expected = len(rows) * float(found.mismatched_above(np.array([threshold]), rows)[0])
    return np.array([failed - beyond, beyond, len(competent) - failed]), max(expected, 1e-9)


def _rates(counts: npt.NDArray[Any], expected: float) -> Floats:
    """Of counts [3, …] of `expected` pairs."""
    uniform = counts[0] / (FOREIGN - FAILED)
    wrong = uniform + np.maximum(0.0, counts[1] - (1 - FOREIGN) * uniform)
    return np.asarray(np.minimum(wrong / expected, 1.0))


def clean_log_odds(p: Floats, found: Competence, rows: Integers, rate: float) -> Floats:
    """Log-odds that each of the pairs `rows` is right, float64 [rows].

    Pairs of like competence share a mixture: the uniform p of wrong ones, whose weight is known, and the Beta(a, 1) of
    right ones, whose a is fitted. Where the tower is not competent a large p says little.
    """
    odds, competent = np.zeros(len(rows)), found.pair[rows]
    bounds = np.quantile(competent, np.linspace(0, 1, STRATA + 1))
    bounds[0], bounds[-1] = -np.inf, np.inf
    mismatched = found.mismatched_above(bounds, rows)
    for low, high, more, less in zip(bounds[:-1], bounds[1:], mismatched[:-1], mismatched[1:], strict=True):
        chosen = np.flatnonzero((competent >= low) & (competent < high))
        if len(chosen) == 0:
            continue
        wrong = float(np.clip(rate * (more - less) * len(rows) / len(chosen), 1e-3, 1 - 1e-3))
        log_p, a = np.log(p[rows[chosen]]), 0.5
        for _ in range(100):
            density = (1 - wrong) * a * np.exp((a - 1) * log_p)
            right = density / (density + wrong)
            before, a = a, min(right.sum() / max(-(right * log_p).sum(), 1e-9), 1.0)
            if abs(a - before) < CONVERGED:
                break
        odds[chosen] = np.log1p(-wrong) - np.log(wrong) + np.log(a) + (a - 1) * log_p
    return odds


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
        """p and cosine of the part's pairs, float64 [pairs, 2]."""
        number, begin, end = self.parts[part]
        rows, caption_ids = self.order[begin:end], self.store.caption_ids
        if self._null is None or self._null[0] != number:
            every = self.order[self.bounds[number] : self.bounds[number + 1]]
            self._null = number, null_captions(caption_ids[every], self.seed)
        text_KD, images = self.text_2KD[1 - self.fold[rows[0]]], self.store.image_ids[rows]
        found = p_values(
            text_KD, self.store.features, caption_ids[rows], images, self.captions_of, self._null[1], self.device
        )
        return np.stack(found, 1)

    def verdicts(self, answers: Floats, groups: npt.NDArray[np.int64], visits: int) -> CrossFit:
        """What the towers say, from the answers [pairs, 2] of all parts, one after the other. `groups` are those of the
        pairs."""
        store, device = self.store, self.device
        p, score = np.empty(len(store)), np.empty(len(store))
        p[self.order], score[self.order] = answers[:, 0], answers[:, 1]
        caption_cell = cells(self.text_2KD, self.seed, device)[store.caption_ids]
        image_cell = cells([store.features], self.seed, device)[store.image_ids]
        found = competence(p < HIT, store.caption_ids, store.image_ids, caption_cell, image_cell, groups)
        rate, odds, told = 0.0, np.zeros(len(store)), []
        for name, rows in self.sources:
            rate_here = noise_rate(p, found, rows)
            told.append(SourceRate(name, len(rows), rate_here, *noise_interval(p, found, rows)))
            rate_here *= rate_here >= NEGLIGIBLE
            odds[rows] = clean_log_odds(p, found, rows, rate_here)
            rate += rate_here * len(rows) / len(store)
        return CrossFit(rate, visits, self.fold, score, p, found.pair, odds, tuple(told))


def write_cross_fit(folder: Path, store: Store, found: CrossFit) -> None:
    """cross_fit.parquet: a row a pair; in its metadata the rates, the store's identity, and a digest of it all."""
    columns = {name: getattr(found, name) for name in COLUMNS}
    table = pa.table({"row": np.arange(len(found.p)), **columns})
    told = {"rate": repr(found.rate), "visits": str(found.visits), "pairs": _identity(store)}
    told["sources"] = json.dumps(found.sources, ensure_ascii=False)
    told["columns"] = _digest_of(*(np.ascontiguousarray(column).data for column in columns.values()))
    told["made_of"] = found.made_of
    told["sha256"] = _digest_of(*map(str.encode, told.values()))
    with written_aside(folder / FILE) as aside:
        pq.write_table(table.replace_schema_metadata(told), aside)


def read_cross_fit(folder: Path, store: Store | None = None) -> CrossFit:
    """What `efficientclip cross-fit` left in `folder`; UserError where it is absent, broken or tells of other pairs."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"confidence.cross_fit: {file} is missing; run `efficientclip cross-fit CONFIG` first")
    with reading("confidence.cross_fit:", file, ANEW):
        table = pq.read_table(file)
        told = _told(table.schema)
        columns = {name: table[name].to_numpy() for name in COLUMNS}
        if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))):
            raise ValueError("its rows are not those of a store")
        for name, column in columns.items():
            if column.dtype != (np.int8 if name == "fold" else np.float64) or not np.isfinite(column).all():
                raise ValueError(f"{name} is not finite, or no column of numbers")
        if len(table) == 0 or not np.isin(columns["fold"], (0, 1)).all():
            raise ValueError("a pair is in neither fold")
        digest = _digest_of(*(np.ascontiguousarray(column).data for column in columns.values()))
        if told.get("columns", digest) != digest:
            raise ValueError("is not what was written, its digest differs")
    if store is not None and (told["pairs"] != _identity(store) or len(table) != len(store)):
        raise UserError(f"confidence.cross_fit: {file} judges other pairs than those of {store.path}; {ANEW}")
    by_source = tuple(SourceRate(*source) for source in json.loads(told.get("sources", "[]")))
    made_of = told.get("made_of", "")
    # The columns are numpy's by now.
    del table
    give_back()
    return CrossFit(float(told["rate"]), int(told["visits"]), **columns, sources=by_source, made_of=made_of)


def read_rate(folder: Path) -> float | None:
    """The estimated rate in `folder` without the verdicts; None before `efficientclip cross-fit` has written it."""
    file = folder / FILE
    if not file.is_file():
        return None
    with reading("confidence.cross_fit:", file, ANEW):
        return float(_told(pq.read_schema(file))["rate"])


def _told(schema: pa.Schema) -> dict[str, str]:
    """The metadata of cross_fit.parquet; an error when it is not as it was written."""
    told = {key: (schema.metadata or {})[key.encode()].decode() for key in ("rate", "visits", "pairs")}
    # Earlier versions wrote no digests, and no rates of sources.
    later = {
        key: schema.metadata[key.encode()].decode()
        for key in ("sources", "columns", "made_of", "sha256")
        if key.encode() in schema.metadata
    }
    if not 0 <= float(told["rate"]) <= 1 or int(told["visits"]) < 0:
        raise ValueError(f"a rate of {told['rate']} after {told['visits']} visits")
    digest = later.pop("sha256", None)
    told |= later
    if (later or digest is not None) and _digest_of(*map(str.encode, told.values())) != digest:
        raise ValueError("is not what was written, its digest differs")
    return told


def _digest_of(*parts: bytes | memoryview) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(memoryview(part).nbytes.to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def _identity(store: Store) -> str:
    return "-".join(store.manifest["files"][name]["xxh3"] for name in ("image_ids.bin", "caption_ids.bin"))
