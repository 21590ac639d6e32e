"""Parts of a pair store: what a piece of a source gives, as columns, in a file that is known by what it was made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.shards import UNREADABLE, BadSample
from ..errors import reading, writing
from ..files.atomic import sync
from ..files.digests import digest_of

# Rows are held, written and read so many at a time: with their texts far below what an Arrow column can hold.
ROWS_AT_ONCE = 16_384
DIGEST_BYTES = 16
COLUMNS = [
    ("hash", pa.binary(DIGEST_BYTES)),
    ("key", pa.string()),
    ("source", pa.string()),
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("length", pa.int64()),
    ("captions", pa.list_(pa.string())),
    # Those of a row's captions, end to end.
    ("caption_hashes", pa.binary()),
    ("noise", pa.list_(pa.bool_())),
]
FEATURE = "feature"


class Making(Protocol):
    """A part on its way. `bad` samples make no row; `slow` pictures took the decoder's slow path."""

    bad: list[BadSample]
    slow: int

    def start(self) -> None:
        """Read ahead of the first batch."""

    def batches(self, bar: Any) -> Iterator[pa.RecordBatch]:
        """Its rows, by `batch_of`, in order, counted by `bar`; `bad` and `slow` are whole behind the last one."""

    def close(self) -> None:
        """Let go of what it holds."""


def batch_of(features_MD: npt.NDArray[np.float16], contents: Sequence[bytes], **columns: Any) -> pa.RecordBatch:
    """M rows: their features, the frozen side's own bytes, by which equal ones are known, and the `columns` beside."""
    captions = columns["captions"]
    arrays = {
        **columns,
        "hash": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), len(contents), [None, pa.py_buffer(b"".join(map(digest, contents)))]
        ),
        "caption_hashes": [b"".join([digest(caption.encode()) for caption in texts]) for texts in captions],
    }
    rows = np.ascontiguousarray(features_MD)
    feature = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows)]
    )
    schema = pa.schema([*COLUMNS, (FEATURE, feature.type)])
    typed = [pa.array(arrays[name], kind) for name, kind in COLUMNS]
    return pa.record_batch([*typed, feature], schema=schema)


def write_part(folder: Path, name: str, making: Making, bar: Any) -> Path:
    """Write a part of that name, in place of any other; returns its file."""
    # A rank of an earlier call may be about to end only.
    aside = folder / f".part-{name}-{os.getpid()}.partial"
    try:
        with writing(folder):
            _write(aside, making.batches(bar), making)
            sync(aside)
            file = folder / f"part-{name}-{digest_of(aside)}.parquet"
            for other in folder.glob(f"part-{name}-*.parquet"):
                if other != file:
                    other.unlink()
            os.replace(aside, file)
            sync(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return file


def _write(file: Path, batches: Iterator[pa.RecordBatch], making: Making) -> None:
    first = next(batches, None)
    schema = pa.schema(COLUMNS) if first is None else first.schema
    options = {"compression": "none", "use_dictionary": ["source", "shard"], "write_statistics": False}
    with pq.ParquetWriter(file, schema, **options) as writer:
        for rows in _gathered([] if first is None else [first], batches):
            writer.write_table(pa.Table.from_batches(rows), row_group_size=ROWS_AT_ONCE)
        told = json.dumps([asdict(entry) for entry in making.bad], ensure_ascii=False)
        writer.add_key_value_metadata({"bad": told, "slow": str(making.slow)})


def _gathered(held: list[pa.RecordBatch], more: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    for batch in more:
        if sum(map(len, held)) + len(batch) > ROWS_AT_ONCE:
            yield held
            held = []
        held.append(batch)
    if held:
        yield held


def kept_part(folder: Path, name: str) -> Path | None:
    """The part of that name that an earlier call finished, if it is as it was written.

    One without some pictures, because their files were missing, is made again: they may be there now.
    """
    for file in folder.glob(f"part-{name}-*.parquet"):
        whole = file.stem.endswith(digest_of(file))
        if whole and not any(entry["cause"].startswith(UNREADABLE) for entry in bad_of(file)):
            return file
    return None


def taken_part(store: Path, folder: Path, name: str) -> Path | None:
    """A part that a finished store kept, as it was made without some shards, beside those in `folder`."""
    found = kept_part(store, name)
    if found is None:
        return None
    with writing(folder):
        try:
            os.link(found, folder / found.name)
        except FileExistsError:
            pass
        except OSError:
            shutil.copyfile(found, folder / found.name)
    return kept_part(folder, name)


def bad_of(file: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(pq.read_metadata(file).metadata[b"bad"])
    return found


def slow_of(file: Path) -> int:
    return int(pq.read_metadata(file).metadata[b"slow"])


def samples_of(file: Path) -> int:
    """Rows of a part, and samples that made none."""
    rows: int = pq.read_metadata(file).num_rows
    return rows + len(bad_of(file))


def tables_of(files: Iterable[Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of parts in order, some thousands at a time."""
    for file in files:
        with reading("part", file, "remove it and run the same command again"), pq.ParquetFile(file) as part:
            for group in range(part.num_row_groups):
                yield part.read_row_group(group, columns).combine_chunks()


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
