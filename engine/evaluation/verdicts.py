"""What ECL thought of a run's pairs, and how well that separates right captions from wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ..data.store import Store
from ..errors import UserError, reading
from ..files import digests

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FEATURES_AT_ONCE = 1 << 14
RESTORE = "restore it from a copy, or run the run's own `train` command again"


@dataclass(frozen=True)
class Verdicts:
    """By pair row: mean z-score (NaN: never scored), kept to the end, wrong caption (None: no labels)."""

    score: Floats
    kept: Bools
    noise: Bools | None

    @property
    def scored(self) -> Bools:
        return np.isfinite(self.score)

    def surest(self, *, kept: bool, count: int) -> npt.NDArray[np.int64]:
        """Rows of the highest scores among the kept, or the lowest among the dropped; surest first."""
        rows = np.flatnonzero(self.scored & (self.kept == kept))
        order = np.argsort(self.score[rows] * (-1 if kept else 1), kind="stable")
        return rows[order[:count]]

    def borderline(self, count: int) -> npt.NDArray[np.int64]:
        """Rows nearest to the score below which as many pairs lie as were dropped, nearest first; none without a drop.

        Half of them were dropped, half kept.
        """
        dropped, kept = (np.flatnonzero(self.scored & (self.kept == verdict)) for verdict in (False, True))
        if len(dropped) == 0 or len(kept) == 0:
            return dropped[:0]
        border = np.quantile(self.score[self.scored], len(dropped) / (len(dropped) + len(kept)))
        away = np.abs(self.score - border)
        nearest = [
            rows[np.argsort(away[rows], kind="stable")[:share]]
            for rows, share in ((dropped, count - count // 2), (kept, count // 2))
        ]
        found = np.concatenate(nearest)
        return found[np.argsort(away[found], kind="stable")]


@dataclass(frozen=True)
class Detection:
    """Noise found: shares in 0..1; `auc` is the chance that a clean pair scores above a noisy one."""

    noisy: int
    clean: int
    noise_dropped: float
    clean_lost: float
    auc: float


def read_verdicts(run: Path, store: Store) -> Verdicts | None:
    """confidence.parquet with the store's noise labels; None before the run's end, or without scores."""
    file = run / "confidence.parquet"
    digests.check_written(run, file.name, remedy=RESTORE)
    if not file.is_file():
        return None
    with reading("verdicts", file, RESTORE):
        table = pq.read_table(file, columns=["row", "score", "kept"]).sort_by("row")
        score, kept = table["score"].to_numpy().astype(np.float64), table["kept"].to_numpy().astype(np.bool_)
        if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))) or np.isinf(score).any():
            raise ValueError("its rows are not those of a store, or a score is infinite")
    if len(table) != len(store):
        raise UserError(
            f"run {run}: {file.name} tells of {len(table)} pairs, but store {store.path} holds {len(store)}; say where"
            " the store that the run trained on lies with --store PATH"
        )
    noise = store.pairs(columns=["noise"])["noise"]
    verdicts = Verdicts(
        score=score,
        kept=kept,
        noise=None if noise.null_count == len(noise) else pc.fill_null(noise, False).to_numpy(),
    )
    return verdicts if verdicts.scored.any() else None


def detection(verdicts: Verdicts) -> Detection | None:
    """None without labels of both kinds."""
    noise, dropped, scored = verdicts.noise, ~verdicts.kept, verdicts.scored
    if noise is None or noise.all() or not noise.any():
        return None
    return Detection(
        noisy=int(noise.sum()),
        clean=int((~noise).sum()),
        noise_dropped=float(dropped[noise].mean()),
        clean_lost=float(dropped[~noise].mean()),
        auc=separation(verdicts.score[scored & ~noise], verdicts.score[scored & noise]),
    )


def caption_centroid_scores(store: Store) -> npt.NDArray[np.float32]:
    """What no training knows: cosine [pairs] of each pair's image feature with the mean of its caption's other images.

    A picture never vouches for itself. NaN where the caption has no other image.
    """
    counts = np.diff(store.caption_edges[0])
    rows = np.argsort(store.caption_ids, kind="stable")[np.repeat(counts > 1, counts)]
    counts = counts[counts > 1]
    starts = np.concatenate([[0], np.cumsum(counts)])
    score_N = np.full(len(store), np.nan, np.float32)
    # Whole captions, as many as fit into a part; a caption of more images is a part of its own.
    cuts = np.unique(np.searchsorted(starts, np.arange(0, len(rows) + FEATURES_AT_ONCE, FEATURES_AT_ONCE)))
    parts = tqdm(list(pairwise(cuts.clip(max=len(counts)).tolist())), desc="centroids of captions", unit="part")
    for first, last in parts:
        part = rows[starts[first] : starts[last]]
        image_PD = store.features[store.image_ids[part]].astype(np.float32)
        total_CD = np.add.reduceat(image_PD, starts[first:last] - starts[first])
        others_PD = np.repeat(total_CD, counts[first:last], axis=0) - image_PD
        norms_P = np.linalg.norm(image_PD, axis=1) * np.linalg.norm(others_PD, axis=1)
        np.divide((image_PD * others_PD).sum(1), norms_P, out=norms_P, where=norms_P > 0)
        score_N[part] = norms_P
    return score_N


def beside_baseline(verdicts: Verdicts, baseline_N: npt.NDArray[np.float32]) -> tuple[Detection, Detection] | None:
    """Noise found by ECL, and by the baseline if it dropped as many, both on the pairs that both of them judge.

    None without labels of both kinds among these.
    """
    if verdicts.noise is None:
        return None
    both = verdicts.scored & np.isfinite(baseline_N)
    score, kept, noise = baseline_N[both].astype(np.float64), verdicts.kept[both], verdicts.noise[both]
    keeps = np.ones(len(score), bool)
    keeps[np.argsort(score, kind="stable")[: np.count_nonzero(~kept)]] = False
    found = detection(Verdicts(verdicts.score[both], kept, noise))
    other = detection(Verdicts(score, keeps, noise))
    return None if found is None or other is None else (found, other)


def separation(upper: Floats, lower: Floats) -> float:
    """Area under the ROC curve: the chance that one of `upper` exceeds one of `lower`, ties count half."""
    if len(upper) == 0 or len(lower) == 0:
        return float("nan")
    # Ranks of `lower` in `upper` alone: 5 million scores are sorted once, and no copy of both is.
    upper, lower = np.sort(upper), np.sort(lower)
    doubled = sum(np.searchsorted(upper, lower, side).sum(dtype=np.int64) for side in ("left", "right"))
    wins = len(upper) * len(lower) - doubled / 2
    return float(wins / len(upper) / len(lower))
