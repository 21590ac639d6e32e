"""Rows of Parquet files, whatever their row groups are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from efficientclip.data import parquet
from efficientclip.data.parquet import rows_of, tables_of
from efficientclip.data.store import Store
from tests import tiny

ROWS = 95


@pytest.fixture(params=[10, 1000])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Row groups of ten rows, of other texts each, or one, from which seven rows are read at a time."""
    monkeypatch.setattr(parquet, "ROWS", 7)
    schema = pa.schema(
        [("number", pa.int64()), ("text", pa.string()), ("shard", pa.dictionary(pa.int32(), pa.string()))]
    )
    with pq.ParquetWriter(tmp_path / "t.parquet", schema) as writer:
        for start in range(0, ROWS, request.param):
            numbers = list(range(start, min(start + request.param, ROWS)))
            texts = [None if number % 9 == 4 else f"猫{number}" for number in numbers]
            shards = [f"{number // 10}.tar" for number in numbers]
            writer.write_table(pa.table({"number": numbers, "text": texts, "shard": shards}).cast(schema))
    return tmp_path / "t.parquet"


def test_rows_come_as_they_are_asked_for(file: Path) -> None:
    whole = pq.read_table(file).to_pylist()
    random = np.random.default_rng(0)
    for rows in (np.array([94]), random.permutation(ROWS), random.integers(ROWS, size=300), np.arange(40, 60)):
        found = rows_of(file, rows, ["shard", "text"])
        assert found.to_pylist() == [{name: whole[row][name] for name in ("shard", "text")} for row in rows]
        assert found.schema.types == [pa.string(), pa.string()]
    none = rows_of(file, np.empty(0, np.int64), ["shard", "text"])
    assert len(none) == 0 and none.column_names == ["shard", "text"]
    for row in (-1, ROWS):
        with pytest.raises(IndexError):
            rows_of(file, np.array([3, row]), ["text"])


def test_only_row_groups_with_a_wanted_row_are_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], pq.ParquetFile.iter_batches

    def counted(*given: object, row_groups: list[int], **named: object) -> object:
        read.extend(row_groups)
        return real(*given, row_groups=row_groups, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    rows_of(file, np.array([71, 12, 79]), ["text"])
    assert read == ([1, 7] if pq.read_metadata(file).num_row_groups > 1 else [0])


def test_parts_have_as_many_rows_as_asked_for(file: Path) -> None:
    tables = list(tables_of(file, ["number", "shard"]))
    assert [len(table) for table in tables] == [7] * 13 + [4]
    assert pa.concat_tables(tables).equals(pq.read_table(file, columns=["number", "shard"]).cast(tables[0].schema))


def test_texts_may_be_longer_than_32_bits_reach(tmp_path: Path) -> None:
    """Of 2.2 GB, which one row group after another holds; all of them at once would overflow its offsets."""
    text = "猫" * 366_000
    with pq.ParquetWriter(tmp_path / "t.parquet", pa.schema([("text", pa.string())])) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"text": [text] * 100}))
    found = rows_of(tmp_path / "t.parquet", np.array([1999, 0]), ["text"])["text"]
    assert found.to_pylist() == [text, text]


def test_sources_are_those_of_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tiny.pair_store(tmp_path / "store", sources=("b", "", "a", "b")))
    expected = store.sources()
    monkeypatch.setattr(parquet, "ROWS", 7)
    for found in (expected, store.sources()):
        assert found.names == ("b", "", "a")
        assert [found.names[at] for at in found.of] == store.pairs()["source"].to_pylist()
