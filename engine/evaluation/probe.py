"""`efficientclip evaluate RUN --text-train FILE`: texts are classified by a linear probe on frozen text features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from ..data.tables import LABEL_COLUMNS, read_table
from ..errors import UserError
from .run import open_run

TEXT_COLUMNS = ("text", "sentence")
TEST_SHARE = 0.2
# Features have length 1, so weights must be large to tell classes apart.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def probe(run: Path, train: Path, test: Path | None, seed: int, store: Path | None = None) -> dict[str, Any]:
    """Accuracy and macro-F1, in per cent, of logistic regression on the text tower's features.

    {"accuracy", "macro_f1", "C", "train", "test": numbers of texts, "labels"}. Both files are tables with a text and a
    label column; without `test`, a fifth of `train` is held out by `seed`, label by label. The inverse strength C of
    the L2 penalty is the one of `STRENGTHS` with the best macro-F1 on another fifth of what trains, held out alike.
    """
    texts, labels = _read(train)
    if len(set(labels.tolist())) < 2:
        raise UserError(f"table {train}: needs texts of two labels or more")
    if test is None:
        fit, held = _split(np.arange(len(labels)), labels, seed, train)
    else:
        more_texts, more_labels = _read(test)
        fit, held = np.arange(len(labels)), np.arange(len(labels), len(labels) + len(more_labels))
        texts, labels = texts + more_texts, np.concatenate([labels, more_labels])
        if unknown := sorted(set(more_labels.tolist()) - set(labels[fit].tolist())):
            raise UserError(f"table {test}: no text of {train} has its label {unknown[0]!r}; train on all labels")
    features_ND = open_run(run, store).encode_texts(texts, progress=True)
    inner, outer = _split(fit, labels[fit], seed, train)

    def fitted(strength: float, rows: Any) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(features_ND[rows], labels[rows])

    def macro_f1(model: LogisticRegression, rows: Any) -> float:
        return f1_score(labels[rows], model.predict(features_ND[rows]), average="macro")

    best = max(
        tqdm(STRENGTHS, desc="penalty", unit="fit"), key=lambda strength: macro_f1(fitted(strength, inner), outer)
    )
    final = fitted(best, fit)
    return {
        "accuracy": round(final.score(features_ND[held], labels[held]) * 100, 2),
        "macro_f1": round(macro_f1(final, held) * 100, 2),
        "C": best,
        "train": len(fit),
        "test": len(held),
        "labels": len(set(labels.tolist())),
    }


def probe_table(report: Mapping[str, Any], title: str) -> Table:
    """The result of `probe` for the terminal."""
    table = Table(title=Text(title))
    for name in ("accuracy %", "macro-F1 %", "C", "train", "test", "labels"):
        table.add_column(name, justify="right")
    counts = (f"{report[name]:,}" for name in ("train", "test", "labels"))
    table.add_row(f"{report['accuracy']:.1f}", f"{report['macro_f1']:.1f}", f"{report['C']:g}", *counts)
    return table


def _read(file: Path) -> tuple[list[str], Any]:
    rows: list[list[str]] = []
    bad: list[str] = []
    for place, cells in read_table(file, TEXT_COLUMNS, LABEL_COLUMNS):
        rows += [cells] if cells is not None and all(cells) else []
        bad += [] if cells is not None and all(cells) else [place]
    if bad:
        raise UserError(
            f"table {file}, {bad[0]}: no text, no label or more cells than the header has, as in {len(bad)} rows; mend"
            " them or take them out"
        )
    return [text for text, _ in rows], np.array([label for _, label in rows])


def _split(rows: Any, labels: Any, seed: int, file: Path) -> tuple[Any, Any]:
    try:
        fit, held = train_test_split(rows, test_size=TEST_SHARE, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UserError(f"table {file}: too few texts to hold a fifth out ({error})") from error
    return fit, held
