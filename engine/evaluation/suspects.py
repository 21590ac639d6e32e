"""The best evidence that a finished run has about each pair, and suspects.csv: the pairs that it is against most."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ..config import Confidence
from ..data.store import Store
from ..files.atomic import written_aside
from ..files.ownership import SUSPECTS
from ..noise.confidence import standardised, together
from ..noise.cross_fit import FILE, read_cross_fit
from ..noise.docket import sources
from ..noise.rate import HIT
from .verdicts import Verdicts

MOST = 10_000  # rows of the list; audit.parquet has all
ALONE = -1.0  # a log-ratio of the company that captions keep, below which it is told


@dataclass(frozen=True)
class Evidence:
    """By pair row; lower is more suspicious. The others are None without a cross-fit, and the probability is NaN where
    that cannot tell how many pairs of the source are wrong."""

    score: npt.NDArray[np.float64]  # NaN: none
    wrong_probability: npt.NDArray[np.float64] | None = None
    p: npt.NDArray[np.float64] | None = None  # share of its source's other captions that fit the picture as well
    company: npt.NDArray[np.float64] | None = None  # log of how much likelier right captions keep the company it keeps


def evidence_of(confidence: Confidence, store: Store, verdicts: Verdicts) -> Evidence:
    """As `selection: calibrated` weighs it: the run's own scores, and the towers' of a cross-fit where there is one; by
    the latter alone where they cannot tell the rate."""
    folder = confidence.cross_fit
    if folder is None or not (folder / FILE).is_file():
        return Evidence(verdicts.score)
    found = read_cross_fit(folder, store)
    score, probability = together(found.clean_log_odds, verdicts.score), expit(-found.clean_log_odds)
    for (_, rows), rate in zip(sources(store), found.sources, strict=False):
        if rate.open:
            probability[rows] = np.nan
            # Without a rate all odds are alike, and the run has so few pairs by heart, wrong ones, too.
            score[rows] = standardised(-found.p[rows]) + standardised(found.score[rows])
    return Evidence(score, probability, found.p, found.company)


def write_suspects(file: Path, store: Store, verdicts: Verdicts, evidence: Evidence) -> None:
    """Write the list, most suspicious first, for a spreadsheet: UTF-8 with its mark."""
    scored = np.flatnonzero(np.isfinite(evidence.score))
    rows = scored[np.argsort(evidence.score[scored], kind="stable")[:MOST]]
    pairs = store.pairs(rows, ["key", "caption", "source"]).to_pylist()
    with written_aside(file) as aside, aside.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(SUSPECTS)
        for row, pair in zip(rows.tolist(), pairs, strict=True):
            writer.writerow(_line(row, pair, bool(verdicts.kept[row]), evidence))


def _line(row: int, pair: dict[str, Any], kept: bool, evidence: Evidence) -> list[Any]:
    probability, reason = "", "fits worse than others, by the run's own scores"
    if evidence.wrong_probability is not None and evidence.p is not None:
        chance = evidence.wrong_probability[row]
        probability = "" if np.isnan(chance) else f"{chance:.3f}"
        reason = f"{evidence.p[row]:.1%} of its source's other captions fit the picture as well"
        if evidence.company is not None and evidence.company[row] < ALONE:
            reason += "; it stands with the picture's other captions seldom or nowhere else"
            reason += ": a near miss, or a rare name" if evidence.p[row] < HIT else ""
    told = "kept" if kept else "dropped"
    return [row, pair["key"], pair["caption"], pair["source"], probability, f"{evidence.score[row]:.3f}", told, reason]
