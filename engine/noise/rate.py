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
from scipy.sparse.csgraph import connected_components

from ..data.store import Edges, Store, edges
from ..errors import UserError, reading
from ..files.atomic import written_aside

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]
Features = npt.NDArray[np.floating[Any]]

HIT = 0.05  # a pair with a smaller p shows competence
FAILED = 0.7  # where towers are competent, right pairs hardly have a larger p
FOREIGN = 0.95  # what lies beyond, and would not if p were uniform, is no caption of this source
COMPETENT = 0.2  # share of the pairs that the rate is read from
NEGLIGIBLE = 0.03  # a source's estimated rate below it is no ground to drop anything, and counts as 0
NULL_CAPTIONS = 8192
LARGEST_GROUP = 4096
BACKING = 2.0  # pairs' worth of belief in the wider neighbourhood's rate
STRATA = 10
TESTIMONY = 1.0  # weight of the mean of a picture's other captions beside its own features
MOST_WITNESSES = 1024  # a picture of more captions stands for no subject: they do not testify
LEAST_SOURCE = 2000  # pairs; smaller sources are taken together
ROUNDING = 1e-6
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
    """Arrays of float64 [pairs], but fold int8. `rate` is the estimated share of wrong pairs, `visits` what it cost."""

    rate: float
    visits: int
    fold: npt.NDArray[np.int8]
    score: Floats  # cosine by the tower that did not train on the pair
    p: Floats
    competence: Floats
    clean_log_odds: Floats
    sources: tuple[SourceRate, ...] = ()


def near(features: npt.NDArray[np.float16], seed: int, samples: int = 1 << 20, chance: float = 0.01) -> float:
    """Cosine that a random pair of pictures exceeds with probability `chance`: what is nearer may be a duplicate."""
    random = np.random.default_rng(seed)
    one, other = random.integers(0, len(features), (2, min(samples, 64 * len(features))))
    one, other = one[one != other], other[one != other]
    cosine = np.concatenate(
        [
            (features[a].astype(np.float32) * features[b].astype(np.float32)).sum(1)
            for a, b in zip(np.array_split(one, 64), np.array_split(other, 64), strict=True)
        ]
    )
    return float(np.quantile(cosine, 1 - chance)) if len(cosine) else 1.0


def pair_groups(store: Store, threshold: float) -> npt.NDArray[np.int64]:
    """Group of each pair, int64 [pairs]: one caption on one picture and its near-duplicates (cosine >= `threshold`).

    A caption on more than LARGEST_GROUP pictures is one group.
    """
    counts = np.bincount(store.caption_ids, minlength=len(store.offsets) - 1)
    groups = np.empty(len(store), np.int64)
    groups[counts[store.caption_ids] == 1] = np.arange((counts == 1).sum())
    first_free = int((counts == 1).sum())
    recurring = np.flatnonzero(counts[store.caption_ids] > 1)
    recurring = recurring[np.argsort(store.caption_ids[recurring], kind="stable")]
    for rows in np.split(recurring, np.cumsum(counts[counts > 1])[:-1]) if len(recurring) else ():
        count, labels = 1, np.zeros(len(rows), np.int64)
        if len(rows) <= LARGEST_GROUP:
            features = store.features[store.image_ids[rows]].astype(np.float32)
            count, labels = connected_components(features @ features.T >= threshold, directed=False)
        groups[rows] = first_free + labels
        first_free += count
    return groups


def folds(groups: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int8]:
    """Fold 0 or 1 of each pair; a group is never split, and the folds are as equal as groups allow."""
    sizes = np.bincount(groups)
    order = np.random.default_rng([seed, 5]).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    fold = np.empty(len(sizes), np.int8)
    fold[order] = before >= len(groups) / 2
    return fold[groups]


@torch.no_grad()
def p_values(
    text_KD: Features, image_VD: Features, caption_ids: Integers, image_ids: Integers, linked: Edges, seed: int
) -> tuple[Floats, Floats]:
    """p and cosine of the pairs (caption, image), float64 [pairs] each; features may be mapped files.

    p is the share of other captions, weighted by how often these pairs hold them, that score higher on the pair's
    image; equal scores count half, captions that `linked` (caption -> images, these pairs among them) ties to the image
    do not count, but testify, all but the pair's own, to what the image shows. Of more than NULL_CAPTIONS distinct
    captions, as many pairs are drawn.
    """
    n, device = len(caption_ids), torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def rows_of(features: Features, rows: Integers) -> torch.Tensor:
        return torch.from_numpy(features[rows]).to(device).float()

    null, weights = np.unique(caption_ids, return_counts=True)
    if len(null) > NULL_CAPTIONS:
        drawn = np.random.default_rng([seed, 6]).integers(0, n, NULL_CAPTIONS)
        null, weights = np.unique(caption_ids[drawn], return_counts=True)
    column = np.full(len(text_KD), -1)
    column[null] = np.arange(len(null))
    of_captions = np.repeat(np.arange(len(linked[0]) - 1), np.diff(linked[0]))
    starts, captions_of = edges(linked[1], of_captions, len(image_VD))
    null_MD = rows_of(text_KD, null)
    weights_M = torch.from_numpy(weights).to(device, torch.float32)
    order = np.argsort(image_ids, kind="stable")
    p, cosine = np.empty(n), np.empty(n)
    for rows in np.array_split(order, max(1, n // 1024)):
        images, place = np.unique(image_ids[rows], return_inverse=True)
        image_PD = rows_of(image_VD, images)[place]
        text_PD = rows_of(text_KD, caption_ids[rows])
        degree = starts[images + 1] - starts[images]
        positive = np.concatenate([captions_of[starts[i] : starts[i + 1]] for i in images])
        image_of = np.repeat(np.arange(len(images)), degree)
        heard = degree <= MOST_WITNESSES
        witnesses = heard[image_of]
        testimony_BD = torch.zeros(len(images), text_PD.shape[1], device=device).index_add_(
            0, torch.from_numpy(image_of[witnesses]).to(device), rows_of(text_KD, positive[witnesses])
        )
        # One more than testify, so that a single caption does not speak for all.
        weight_P1 = torch.from_numpy(TESTIMONY * heard / degree).to(device, torch.float32)[place][:, None]
        shown_PD = F.normalize(image_PD + weight_P1 * (testimony_BD[place] - text_PD), dim=1)
        own = (text_PD * shown_PD).sum(1)
        counted_BM = weights_M.repeat(len(images), 1)
        at = column[positive]
        counted_BM[image_of[at >= 0], at[at >= 0]] = 0
        gap_PM, counted_PM = shown_PD @ null_MD.T - own[:, None], counted_BM[place]
        # Above 1, equal one half; products of one sum differ by their order.
        beats_PM = (gap_PM > ROUNDING).float() + 0.5 * (gap_PM.abs() <= ROUNDING)
        above = (counted_PM * beats_PM).sum(1)
        # The half keeps p above 0: nobody beats a caption by less than one draw.
        p[rows] = ((above + 0.5) / (counted_PM.sum(1) + 1)).double().cpu().numpy()
        cosine[rows] = (text_PD * image_PD).sum(1).double().cpu().numpy()
    return p, cosine


def cells(sides: Sequence[Features], seed: int, size: int = 32, most: int = 4096) -> Integers:
    """Cell int32 [rows] of each row by k-means on the features of all `sides`, each [rows, width]: about `size` rows a
    cell, `most` cells at most."""
    # Two seconds to import, which no other run need wait for.
    from sklearn.cluster import MiniBatchKMeans

    n = len(sides[0])
    k = min(max(1, n // size), most)

    def together(rows: slice) -> Features:
        return np.concatenate([np.asarray(features[rows], np.float32) for features in sides], axis=1)

    means = MiniBatchKMeans(k, batch_size=max(4096, 4 * k), n_init=1, random_state=seed)
    means.fit(together(slice(0, n, max(1, n // (64 * k)))))
    return np.concatenate([means.predict(together(slice(row, row + 65536))) for row in range(0, n, 65536)])


def side_competence(hit: Bools, ids: Integers, cell: Integers, apart: Integers | None) -> Floats:
    """Log-odds of a hit around each pair, from the pairs of its id, backed by those of its cell.

    `ids`, `cell` and `apart` are integers [pairs]; pairs of the same `apart` do not testify for each other, and without
    it all do.
    """
    rate = (hit.sum() + 0.5) / (len(hit) + 1)
    for key in (cell, ids):
        hits, total = np.bincount(key, hit)[key], np.bincount(key)[key].astype(np.float64)
        if apart is not None:
            _, both = np.unique(np.stack([key, apart]), axis=1, return_inverse=True)
            hits, total = hits - np.bincount(both, hit)[both], total - np.bincount(both)[both]
        rate = (hits + BACKING * rate) / (total + BACKING)
    return np.log(rate) - np.log1p(-rate)


@dataclass(frozen=True)
class Competence:
    """Of each pair, by its caption's and its image's other pairs, and both sides as a random mismatched pair has them.

    Such a pair's caption is tied to foreign images, so all pairs of the caption testify; its image lacks one pair.
    """

    caption_ids: Integers
    pair: Floats
    mismatched_caption: Floats
    mismatched_image: Floats

    def mismatched_above(self, threshold: float, rows: Integers) -> float:
        """Share of all combinations of a caption with an image of the pairs `rows` that are at least so competent.

        Captions are as frequent as in the whole store: one that noise has brought to `rows` counts no more for it.
        """
        present = np.zeros(int(self.caption_ids.max()) + 1, bool)
        present[self.caption_ids[rows]] = True
        ordered = np.sort(self.mismatched_caption[present[self.caption_ids]])
        below = np.searchsorted(ordered, threshold - self.mismatched_image[rows], side="left")
        return float(1 - below.mean() / len(ordered))


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
    expected = len(rows) * found.mismatched_above(threshold, rows)
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
    mismatched = [found.mismatched_above(bound, rows) for bound in bounds]
    for low, high, more, less in zip(bounds[:-1], bounds[1:], mismatched[:-1], mismatched[1:], strict=True):
        chosen = np.flatnonzero((competent >= low) & (competent < high))
        if len(chosen) == 0:
            continue
        wrong = float(np.clip(rate * (more - less) * len(rows) / len(chosen), 1e-3, 1 - 1e-3))
        log_p, a = np.log(p[rows[chosen]]), 0.5
        for _ in range(100):
            density = (1 - wrong) * a * np.exp((a - 1) * log_p)
            right = density / (density + wrong)
            a = min(right.sum() / max(-(right * log_p).sum(), 1e-9), 1.0)
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
    return [(names[code], np.flatnonzero(codes == code)) for code in np.unique(codes)]


def judge(
    store: Store,
    groups: npt.NDArray[np.int64],
    fold: npt.NDArray[np.int8],
    text_2KD: Sequence[Features],
    visits: int,
    seed: int,
) -> CrossFit:
    """What two towers say about a store's pairs: tower f, whose features of all captions are text_2KD[f], trained on
    the pairs of fold f and judges the others. `groups` and `fold` are those of the pairs."""
    p, score, parts = np.empty(len(store)), np.empty(len(store)), sources(store)
    for _, part in parts:
        for tower, text_KD in enumerate(text_2KD):
            if len(rows := part[fold[part] != tower]):
                p[rows], score[rows] = p_values(
                    text_KD, store.features, store.caption_ids[rows], store.image_ids[rows], store.caption_edges, seed
                )
    caption_cell = cells(text_2KD, seed)[store.caption_ids]
    image_cell = cells([store.features], seed)[store.image_ids]
    found = competence(p < HIT, store.caption_ids, store.image_ids, caption_cell, image_cell, groups)
    rate, odds, told = 0.0, np.zeros(len(store)), []
    for name, rows in parts:
        rate_here = noise_rate(p, found, rows)
        told.append(SourceRate(name, len(rows), rate_here, *noise_interval(p, found, rows)))
        rate_here *= rate_here >= NEGLIGIBLE
        odds[rows] = clean_log_odds(p, found, rows, rate_here)
        rate += rate_here * len(rows) / len(store)
    return CrossFit(rate, visits, fold, score, p, found.pair, odds, tuple(told))


def write_cross_fit(folder: Path, store: Store, found: CrossFit) -> None:
    """cross_fit.parquet: a row a pair; in its metadata the rates, the store's identity, and a digest of it all."""
    columns = {name: getattr(found, name) for name in COLUMNS}
    table = pa.table({"row": np.arange(len(found.p)), **columns})
    told = {"rate": repr(found.rate), "visits": str(found.visits), "pairs": _identity(store)}
    told["sources"] = json.dumps(found.sources, ensure_ascii=False)
    told["columns"] = _digest_of(*(np.ascontiguousarray(column).data for column in columns.values()))
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
    return CrossFit(float(told["rate"]), int(told["visits"]), **columns, sources=by_source)


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
        for key in ("sources", "columns", "sha256")
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
