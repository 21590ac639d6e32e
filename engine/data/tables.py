"""Tables: .csv, .tsv and .parquet, row by row, in the columns that are asked for.

Columns are found by their usual names or by a given one. What separates the cells of a text is told by its header. In
a text with tabs a quote that is not closed is part of its cell; else quotes are those of RFC 4180.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, reading
from ..files.places import Location
from .captions import numbered_lines, stripped
from .remote import ranges

Kind = tuple[str, ...]
PICTURE_COLUMNS: Kind = (
    *("image", "image_path", "path", "filepath", "file_name", "filename"),
    *("图片", "图像", "照片", "图片路径", "图片文件"),
)
CAPTION_COLUMNS: Kind = ("caption", "captions", "text", "title", "标题", "描述", "文本", "说明")
LABEL_COLUMNS: Kind = ("label", "标签", "类别")
SOURCE_COLUMNS: Kind = ("source", "来源")
KEY_COLUMNS: Kind = ("key", "sku", "编号")
OPTIONS = {PICTURE_COLUMNS: "--image-column", CAPTION_COLUMNS: "--caption-column", KEY_COLUMNS: "--key-column"}
SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATORS = (",", "\t", ";", "|")
ANEW = "it is not whole, or no Parquet; write it anew, or copy it again"
CELLS_AT_ONCE = 64
LINES_OF_A_CELL = 64


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None: the usual ones."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None

    @property
    def given(self) -> list[str]:
        """As options of the command line."""
        return [f"--{name}-column {value}" for name, value in vars(self).items() if value is not None]


USUAL = Columns()


def named(name: str | None, usual: Kind) -> Kind:
    return usual if name is None else (name.strip().lower(),)


def read_table(file: Location, *kinds: Kind, optional: Sequence[Kind] = ()) -> Iterator[tuple[str, list[Any] | None]]:
    """(place, cells) of each row of a .csv, .tsv or .parquet; `kinds` are the names each wanted column may have.

    Cells are stripped texts, in a Parquet lists of them, too; None in columns that are `optional` and not there, and
    instead of a row that has more or fewer cells than the header. UserError when a wanted column is missing, any is
    there twice, or the file is broken.
    """
    if isinstance(file, Path) and not file.is_file():
        raise UserError(f"table {file}: no such file")
    yield from _parquet_rows(file, kinds, optional) if file.suffix == ".parquet" else _text_rows(file, kinds, optional)


def header(file: Location, *kinds: Kind) -> list[str]:
    """The names in a table's header, some of which are `kinds`, as they are written."""
    if file.suffix == ".parquet":
        with reading("table", file, ANEW), ranges(file) as held:
            return list(pq.read_schema(held).names)
    return next(open_text(file, kinds)[1], (1, []))[1]


def open_text(file: Location, kinds: Sequence[Kind]) -> tuple[str, Iterator[tuple[int, list[str]]]]:
    """What separates the cells of a .csv or .tsv, and its rows, the header first, each with the number of its last
    line; an empty line is a row of no cells."""
    lines = (line for _, line in numbered_lines(file))
    first = next(lines, "")
    separator = _separator(file, first, kinds)
    again = chain([first], lines)
    return separator, _tabbed(again) if separator == "\t" else _quoted(file, again, separator)


def header_of(line: str, separator: str) -> list[str]:
    """The names in the first line of a text, in lower case."""
    with suppress(csv.Error, StopIteration):
        return [name.strip().lower() for name in next(csv.reader([line], delimiter=separator))]
    return []


def picture_column(file: Location, kind: Kind) -> int | None:
    """Which column of a .parquet holds pictures themselves, as bytes or {bytes, path}; None: it names files."""
    if file.suffix != ".parquet" or (isinstance(file, Path) and not file.is_file()):
        return None
    with reading("table", file, ANEW), ranges(file) as held:
        schema = pq.read_schema(held)
    column = _column(file, schema.names, kind)
    held = schema.types[column]
    return column if pa.types.is_struct(held) or _is_binary(held) else None


def read_cells(file: Location, column: int, first: int, count: int) -> Iterator[Any]:
    """`count` cells of a column of a .parquet from row `first` on, a few at a time."""
    with reading("table", file, ANEW), ranges(file) as held:
        opened = pq.ParquetFile(held, memory_map=True)
        row, before, groups = 0, first, []
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if row + rows <= first:
                before -= rows
            elif row < first + count:
                groups.append(group)
            row += rows
        batches = opened.iter_batches(CELLS_AT_ONCE, row_groups=groups, columns=[opened.schema_arrow.names[column]])
        cells = chain.from_iterable(batch.column(0) for batch in batches)
        for cell in islice(cells, before, before + count):
            yield cell.as_py()


def column_count(file: Location) -> int:
    with reading("table", file, ANEW), ranges(file) as held:
        return len(pq.read_schema(held).names)


def read_picture_cell(file: Location, number: int) -> bytes:
    """The picture in a cell of a .parquet, whose cells are counted along its rows. ValueError where it holds none."""
    row, column = divmod(number, column_count(file))
    cell = next(read_cells(file, column, row, 1), None)
    held = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(held, bytes):
        raise ValueError(f"no picture in row {row + 1}")
    return held


def _is_binary(held: pa.DataType) -> bool:
    return bool(pa.types.is_binary(held) or pa.types.is_large_binary(held))


def _parquet_rows(
    file: Location, kinds: Sequence[Kind], optional: Sequence[Kind]
) -> Iterator[tuple[str, list[Any] | None]]:
    with reading("table", file, ANEW), ranges(file) as held:
        opened = pq.ParquetFile(held)
        names = opened.schema_arrow.names
        columns = _columns(file, names, kinds, optional)
        table = opened.read([names[column] for column in columns if column is not None])
    cells_of = [None if column is None else table[names[column]].to_pylist() for column in columns]
    for row in range(len(table)):
        yield f"row {row + 1}", [None if cells is None else _text(cells[row]) for cells in cells_of]


def _text(cell: Any) -> Any:
    if isinstance(cell, list | dict):
        return [_text(one) for one in cell] if isinstance(cell, list) else cell
    if isinstance(cell, bytes):
        return stripped(cell.decode("utf-8", "surrogateescape"))
    # NaN, which differs from itself, stands for an empty cell.
    return "" if cell is None or cell != cell else stripped(str(cell))


def _text_rows(
    file: Location, kinds: Sequence[Kind], optional: Sequence[Kind]
) -> Iterator[tuple[str, list[Any] | None]]:
    _, rows = open_text(file, kinds)
    names = next(rows, (1, []))[1]
    columns = _columns(file, names, kinds, optional)
    for number, row in rows:
        if row:
            whole = len(row) == len(names)
            cells = [None if column is None else stripped(row[column]) for column in columns] if whole else None
            yield f"line {number}", cells


def _separator(file: Location, header: str, kinds: Sequence[Kind]) -> str:
    """The one by which the header names all of `kinds`, or else what the file's name promises."""
    usual = "\t" if file.suffix == ".tsv" else ","
    for separator in (usual, *SEPARATORS):
        names = header_of(header, separator)
        if all(any(name in kind for name in names) for kind in kinds):
            return separator
    return usual


def _tabbed(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    whole = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    again: list[str] = []
    number = width = 0
    while (text := again.pop() if again else next(whole, None)) is not None:
        row = [text]
        cells = _cells(text, width)
        # A quoted cell may have several lines, if no tab lies between them: else its quote would swallow rows.
        while cells is None and width > 1 and len(row) < LINES_OF_A_CELL and "\t" not in "".join(row[1:]):
            following = again.pop() if again else next(whole, None)
            if following is None:
                break
            row.append(following)
            cells = _cells("\n".join(row), width)
        if cells is None:
            again += reversed(row[1:])
            row, cells = row[:1], text.split("\t")
        width = width or len(cells)
        number += len(row)
        yield number, cells


def _cells(text: str, width: int) -> list[str] | None:
    """Of a row with tabs; None where a quote that opens a cell is not closed at its end."""
    if not text:
        return []
    if '"' not in text:
        return text.split("\t")
    try:
        quoted = next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error:
        return None
    if "\n" in text and any("\n" in cell and "\t" in cell for cell in quoted):
        return None
    if len(quoted) == (width or len(quoted)):
        return quoted
    return None if "\n" in text else text.split("\t")


def _quoted(file: Location, lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        why = str(error).partition(" - ")[0]
        raise UserError(f"table {file}, line {rows.line_num}: {why}; mend the line, or the quotes before it") from error


def _columns(file: Location, names: Sequence[str], kinds: Sequence[Kind], optional: Sequence[Kind]) -> list[int | None]:
    present = {name.strip().lower() for name in names}
    return [
        *(_column(file, names, kind) for kind in kinds),
        *(_column(file, names, kind) if present.intersection(kind) else None for kind in optional),
    ]


def _column(file: Location, names: Sequence[str], kind: Kind) -> int:
    found = [number for number, name in enumerate(names) if name.strip().lower() in kind]
    if len(found) != 1:
        told = f", or be told by {OPTIONS[kind]} NAME" if kind in OPTIONS else ""
        both = f", not {' and '.join(names[number] for number in found)}" if found else ""
        raise UserError(
            f"table {file}: columns {', '.join(names)}; exactly one must be named {' or '.join(kind)}{both}{told}"
        )
    return found[0]
