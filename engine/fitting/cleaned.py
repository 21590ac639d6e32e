"""cleaned: the user's own rows, each with what the run found about its pair, and whether it was kept."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.captions import captions_of
from ..data.parquet import tables_of
from ..data.remote import ranges
from ..data.sources import is_table
from ..data.store import Store
from ..data.tables import (
    CAPTION_COLUMNS,
    KEY_COLUMNS,
    PICTURE_COLUMNS,
    Columns,
    header,
    named,
    open_text,
    picture_column,
    read_table,
)
from ..errors import UserError
from ..files.atomic import written_aside
from ..files.places import Location
from .split import TRAIN

ADDED = ("kept", "wrong_probability", "why")
HELD_OUT = "held out, to measure the model by: not judged"
UNUSED = "left out: its picture or caption cannot be used, or both stand in another row"


class Verdict(NamedTuple):
    kept: bool
    wrong_probability: float | None
    why: str


def write_cleaned(source: Location, columns: Columns, audit: Path, held_out: list[Path], folder: Path) -> Path:
    """Write cleaned.csv, .tsv or .parquet, as the table `source` is, into `folder`; of other sources a .csv of pairs.

    `audit` is the audit.parquet of the run; pairs of the stores `held_out` were not in it. Rows are known by their key,
    or else their picture, and their caption.
    """
    found = Pairs()
    for pair, verdict in _judged(audit):
        found.add(TRAIN, pair, verdict)
    for path in held_out:
        for table in Store(path).pair_tables(["key", "caption", "image_id"]):
            for pair in table.to_pylist():
                found.add(path.name, pair, Verdict(True, None, HELD_OUT))
    if is_table(source):
        return _as_table(source, columns, found, folder)
    target = folder / "cleaned.csv"
    with written_aside(target) as aside, aside.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("key", "caption", *ADDED))
        writer.writerows((*pair, *_cells(verdict)) for pair, verdict in found.of_pair.items())
    return target


class Pairs:
    """Verdicts by key and caption, and by picture and caption: of equal pairs a store holds the first alone."""

    def __init__(self) -> None:
        self.of_pair: dict[tuple[str, str], Verdict] = {}
        self._pictures: dict[str, tuple[str, int]] = {}
        self._of_picture: dict[tuple[str, int, str], Verdict] = {}

    def add(self, part: str, pair: dict[str, Any], verdict: Verdict) -> None:
        self.of_pair[pair["key"], pair["caption"]] = verdict
        self._pictures[pair["key"]] = part, pair["image_id"]
        self._of_picture[part, pair["image_id"], pair["caption"]] = verdict

    def of(self, key: str, caption: str) -> Verdict | None:
        if (key, caption) in self.of_pair:
            return self.of_pair[key, caption]
        picture = self._pictures.get(key)
        return None if picture is None else self._of_picture.get((*picture, caption))


def _judged(audit: Path) -> Iterator[tuple[dict[str, Any], Verdict]]:
    names = ["key", "caption", "image_id", "kept", "wrong_probability"]
    for table in tables_of(audit, names):
        for pair in table.to_pylist():
            chance = pair["wrong_probability"]
            why = "" if pair["kept"] else "dropped: other captions of the source fit the picture better"
            yield pair, Verdict(pair["kept"], chance, why)


def _cells(verdict: Verdict) -> tuple[str, str, str]:
    chance = verdict.wrong_probability
    return "yes" if verdict.kept else "no", "" if chance is None else f"{chance:.3f}", verdict.why


def _as_table(source: Location, columns: Columns, found: Pairs, folder: Path) -> Path:
    pictures, captions = named(columns.image, PICTURE_COLUMNS), named(columns.caption, CAPTION_COLUMNS)
    names = header(source, pictures, captions)
    if taken := [name for name in ADDED if name in names]:
        raise UserError(f"table {source}: has a column {taken[0]}, which cleaned{source.suffix} adds; rename it")
    by_name = picture_column(source, pictures) is None
    keys = named(columns.key, KEY_COLUMNS)
    rows = read_table(source, captions, *([pictures] if by_name else []), optional=[keys])
    told = (_cells(_of_row(place, cells, found, by_name)) for place, cells in rows)
    target = folder / f"cleaned{source.suffix}"
    if source.suffix == ".parquet":
        with ranges(source) as held, written_aside(target) as aside:
            whole = pq.read_table(held)
            for name, cells in zip(ADDED, zip(*told, strict=True), strict=True):
                whole = whole.append_column(name, pa.array(cells, pa.string()))
            pq.write_table(whole, aside)
        return target
    separator, lines = open_text(source, (captions, pictures))
    with written_aside(target) as aside, aside.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
        writer.writerow((*next(lines)[1], *ADDED))
        for (_, row), cells in zip(((number, row) for number, row in lines if row), told, strict=True):
            writer.writerow((*row, *[""] * (len(names) - len(row)), *cells))
    return target


def _of_row(place: str, cells: list[Any] | None, found: Pairs, by_name: bool) -> Verdict:
    if cells is None:
        return Verdict(False, None, UNUSED)
    text, key = cells[0], cells[-1]
    try:
        captions = captions_of(text)
    except ValueError:
        return Verdict(False, None, UNUSED)
    named_by = key or (cells[1] if by_name else place)
    verdicts = [verdict for caption in captions if (verdict := found.of(named_by, caption)) is not None]
    # Of several captions the row is worth what its best one is.
    return max(verdicts, key=lambda verdict: verdict.kept) if verdicts else Verdict(False, None, UNUSED)
