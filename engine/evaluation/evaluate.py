"""`efficientclip evaluate RUN DATA`: recall and mean rank of a trained run on labelled pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..data.store import Store, edges, write_atomically
from ..objectives.retrieval import CUTOFFS, retrieval_report
from .run import Run, open_data, open_run

MEASURES = (*(f"R@{k}" for k in CUTOFFS), "mean_rank")
DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}


def evaluate(run: Path, data: Path) -> dict[str, Any]:
    """Retrieval between all captions and all images of `data`, a store or tars.

    {"t2i": {"R@1", "R@5", "R@10" in per cent, "mean_rank", "queries"}, "i2t": {…}, "candidates": images,
    "texts": captions}. Every pair of the data is a right answer; a query with several counts by its best one.
    """
    opened = open_run(run)
    with open_data(opened, data) as store:
        return measure(opened, store)


def measure(run: Run, store: Store) -> dict[str, Any]:
    """`evaluate` for what is open already."""
    return retrieval_report(
        run.encode_store(store),
        store.features.astype(np.float32),
        store.caption_edges,
        edges(store.image_ids, store.caption_ids, len(store.features)),
    )


def write_json(reports: Mapping[str, Any], file: Path) -> None:
    """Write results whole or not at all."""
    write_atomically(file, (json.dumps(reports, ensure_ascii=False, indent=1) + "\n").encode())


def recall_table(report: Mapping[str, Any], title: str) -> Table:
    """The result of `evaluate` for the terminal."""
    table = Table(title=Text(title))
    table.add_column("direction")
    for name in (*(f"R@{k} %" for k in CUTOFFS), "mean rank", "queries", "candidates"):
        table.add_column(name, justify="right")
    for direction, candidates in (("t2i", report["candidates"]), ("i2t", report["texts"])):
        result = report[direction]
        figures = [f"{result[measure]:.1f}" for measure in MEASURES]
        table.add_row(DIRECTIONS[direction], *figures, f"{result['queries']:,}", f"{candidates:,}")
    return table
