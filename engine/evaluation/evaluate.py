"""`efficientclip evaluate RUN DATA`: retrieval between pictures and texts, both ways, by a trained run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..data.cache import Cache
from ..data.sources import Source, check_folder, open_source
from ..data.store import Store, edges
from ..data.tables import USUAL, Columns
from ..errors import UserError
from ..files.atomic import write_atomically
from ..files.ownership import MADE_BY
from ..files.places import Location
from ..files.scratch import scratch
from ..objectives.retrieval import CUTOFFS, retrieval_report
from .run import BAD_SHARDS, Run, is_store, left_out, open_data, open_run

MEASURES = (*(f"R@{k}" for k in CUTOFFS), "mean_recall", "mean_rank", "median_rank")
DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}


def evaluate(
    run: Path,
    data: Location,
    images: Location | None = None,
    store: Path | None = None,
    columns: Columns = USUAL,
    queries: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Retrieval between all captions and all images of `data`: a store, tars, or what else `open_source` reads.

    {"t2i": {"R@1", "R@5", "R@10", "mean_recall" in per cent, "mean_rank", "median_rank", "queries"}, "i2t": {…},
    "candidates": images, "texts": captions, "left_out": {cause: bad samples}}. Bad samples are left out under
    data.max_bad_share of the run. Every pair of the data is a right answer, and a query with several counts by its
    best one. Texts with ids are a query each, as in the field's own scripts; without ids (store, tars,
    tables) equal captions are one text whose images are all right.

    The rank of an answer is 1 + candidates that beat it + half of those that equal it; a query's other answers never
    stand before its best one. Of more than `queries`, as many are drawn by `seed`, of each direction; all images and
    captions stay candidates. Chinese-CLIP's scripts differ in ties alone: there the candidate that the file has first
    wins, so that a tower which maps everything to one point owes its recall to the order of the file.
    """
    opened = open_run(run, store)
    if is_store(data):
        check_folder(images, data, unused=True)
        if columns.given:
            raise UserError(f"{columns.given[0]}: {data} is no table; leave it out")
    else:
        source = open_source(data, images, columns, Cache.of(opened.config.data))
        if source.names_texts:
            return _measure_source(opened, source, queries, seed)
    with open_data(opened, data, images, columns) as found:
        return measure(found, caption_features(opened, found), queries, seed)


def caption_features(run: Run, store: Store) -> npt.NDArray[np.float32]:
    """L2-normalised features float32 [captions, D] of a store's captions, in a temporary file."""
    return run.encode_store(store, progress=True, out=scratch((len(store.offsets) - 1, store.width), np.float32))


def measure(
    store: Store, text_KD: npt.NDArray[np.float32], queries: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """`evaluate` for a store whose captions are encoded already."""
    report = retrieval_report(
        text_KD,
        store.features,
        store.caption_edges,
        edges(store.image_ids, store.caption_ids, len(store.features)),
        queries,
        seed,
    )
    shards = {BAD_SHARDS: len(found)} if (found := store.manifest.get("bad_shards")) else {}
    return {**report, "left_out": {**store.manifest.get("bad_counts", {}), **shards}}


def _measure_source(run: Run, source: Source, queries: int | None, seed: int) -> dict[str, Any]:
    texts: dict[str, tuple[int, str]] = {}
    images: dict[tuple[str, int], int] = {}
    rows: list[npt.NDArray[np.float32]] = []
    text_ids, image_ids, bad = [], [], Counter[str]()
    for batch, features_MD in run.encode_source(source, bad):
        for at, place in enumerate(zip(batch.files, batch.offsets, strict=True)):
            image = images.setdefault(place, len(rows))
            if image == len(rows):
                rows.append(features_MD[at])
            for name, caption in zip(batch.text_ids[at], batch.captions[at], strict=True):
                text_ids.append(texts.setdefault(name, (len(texts), caption))[0])
                image_ids.append(image)
    if not texts:
        raise UserError(f"source {source.path}: no picture has a caption; give labelled data")
    text_E, image_E = np.array(text_ids, np.int64), np.array(image_ids, np.int64)
    report = retrieval_report(
        run.encode_texts([caption for _, caption in texts.values()], progress=True),
        np.stack(rows),
        edges(text_E, image_E, len(texts)),
        edges(image_E, text_E, len(rows)),
        queries,
        seed,
    )
    return {**report, "left_out": dict(bad)}


def write_json(reports: Mapping[str, Any], file: Path) -> None:
    """Write results whole or not at all."""
    content = {"made_by": f"{MADE_BY} {__version__}", **reports}
    write_atomically(file, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def recall_table(report: Mapping[str, Any], title: str) -> Table:
    """The result of `evaluate` for the terminal."""
    table = Table(title=Text(title))
    table.add_column("")
    for shown in DIRECTIONS.values():
        table.add_column(shown, justify="right")
    for measure in MEASURES:
        name = measure.replace("_", " ") + (" %" if measure.startswith("R@") or measure == "mean_recall" else "")
        table.add_row(name, *(f"{report[direction][measure]:.1f}" for direction in DIRECTIONS))
    table.add_row("queries", *(f"{report[direction]['queries']:,}" for direction in DIRECTIONS))
    table.add_row("candidates", f"{report['candidates']:,}", f"{report['texts']:,}")
    table.caption = left_out(report).removeprefix("; ") or None
    return table
