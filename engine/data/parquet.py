"""Parquet files larger than memory: row by row in parts, or wanted rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1 << 16


def tables_of(file: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The file's rows, ROWS at a time whatever its row groups are; text columns are plain strings."""
    held: pa.Table | None = None
    with pq.ParquetFile(file, memory_map=True) as opened:
        for batch in opened.iter_batches(ROWS, columns=list(columns)):
            table = _plain(pa.Table.from_batches([batch]))
            held = table if held is None else pa.concat_tables([held, table])
            while len(held) >= ROWS:
                yield held.slice(0, ROWS)
                held = held.slice(ROWS)
    if held is not None and len(held):
        yield held
    held = None
    give_back()


def give_back() -> None:
    """Arrow would keep for itself what large reads took."""
    pa.default_memory_pool().release_unused()


def rows_of(file: Path, rows: npt.NDArray[np.integer[Any]], columns: Sequence[str]) -> pa.Table:
    """The file's `rows`, in the order in which they are given; text columns are plain strings.

    Row groups without any are not read, the others ROWS at a time. IndexError where the file has no such row.
    """
    wanted, places = np.unique(rows, return_inverse=True)
    with pq.ParquetFile(file, memory_map=True) as opened:
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < opened.metadata.num_rows:
            raise IndexError(f"rows {wanted[0]} to {wanted[-1]} of {opened.metadata.num_rows}")
        found, start = [_plain(opened.schema_arrow.empty_table().select(list(columns)))], 0
        for group in range(opened.num_row_groups):
            end = start + opened.metadata.row_group(group).num_rows
            if np.searchsorted(wanted, start) < np.searchsorted(wanted, end):
                for batch in opened.iter_batches(ROWS, row_groups=[group], columns=list(columns)):
                    first, last = np.searchsorted(wanted, (start, start + len(batch)))
                    if first < last:
                        found.append(_plain(pa.Table.from_batches([batch.take(pa.array(wanted[first:last] - start))])))
                    start += len(batch)
            start = end
    return pa.concat_tables(found).take(pa.array(places.ravel()))


def _plain(table: pa.Table) -> pa.Table:
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(at, field.name, table[field.name].cast(field.type.value_type))
    return table
