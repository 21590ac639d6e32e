"""What ECL thought of a run's pairs, and how well that separates right captions from wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.store import Store

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


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
    if not file.is_file():
        return None
    table = pq.read_table(file).sort_by("row")
    noise = store.pairs()["noise"]
    verdicts = Verdicts(
        score=table["score"].to_numpy(),
        kept=table["kept"].to_numpy(),
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


def separation(upper: Floats, lower: Floats) -> float:
    """Area under the ROC curve: the chance that one of `upper` exceeds one of `lower`, ties count half."""
    if len(upper) == 0 or len(lower) == 0:
        return float("nan")
    _, place, counts = np.unique(np.concatenate([upper, lower]), return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    wins = rank[place[: len(upper)]].sum() - len(upper) * (len(upper) + 1) / 2
    return float(wins / len(upper) / len(lower))
