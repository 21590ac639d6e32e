"""Parts of a pair store: what a piece of a source gives, as columns, in a file that is known by what it was made of.

part-OF-SHA.parquet     a row a picture, or a text of the frozen side
features-OF-SHA.bin     fp16 [rows, D] of these; the part's metadata tells their digest and D
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_128

from ..data.shards import UNREADABLE, BadSample
from ..errors import reading, writing
from ..files.atomic import sync
from ..files.digests import digest_of, is_named_by
from .writer import ORIGIN

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
FEATURE, IMAGE_ID, CAPTION_IDS = "feature", "image_id", "caption_ids"
OPTIONS: dict[str, Any] = {"compression": "none", "use_dictionary": ["source", "shard"], "write_statistics": False}


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
    feature = _binary(features_MD)
    schema = pa.schema([*COLUMNS, (FEATURE, feature.type)])
    typed = [pa.array(arrays[name], kind) for name, kind in COLUMNS]
    return pa.record_batch([*typed, feature], schema=schema)


def _binary(rows_MD: npt.NDArray[np.float16]) -> pa.Array:
    kind = pa.binary(rows_MD.shape[1] * rows_MD.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows_MD), [None, pa.py_buffer(np.ascontiguousarray(rows_MD))])


def write_part(folder: Path, name: str, making: Making, bar: Any) -> Path:
    """Write a part of that name, in place of any other; returns its file, beside which its features stand."""
    # A rank of an earlier call may be about to end only.
    aside, features = (folder / f".{kind}-{name}-{os.getpid()}.partial" for kind in ("part", "features"))
    try:
        with writing(folder):
            digest = _write(aside, features, making.batches(bar), making)
            sync(features)
            sync(aside)
            file = folder / f"part-{name}-{digest_of(aside)}.parquet"
            new = folder / f"features-{name}-{digest}.bin"
            for other in (*folder.glob(f"part-{name}-*.parquet"), *folder.glob(f"features-{name}-*.bin")):
                if other not in (file, new):
                    other.unlink()
            os.replace(features, new)
            os.replace(aside, file)
            sync(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        features.unlink(missing_ok=True)
        raise
    return file


def _write(file: Path, features: Path, batches: Iterable[pa.RecordBatch], making: Making) -> str:
    """Columns and features apart; the digest of these."""
    state, width = xxh3_128(), 0
    with pq.ParquetWriter(file, pa.schema(COLUMNS), **OPTIONS) as writer, features.open("wb") as stream:
        for rows in _gathered(batches):
            table = pa.Table.from_batches(rows)
            width = table.schema.field(FEATURE).type.byte_width // 2
            for chunk in table[FEATURE].chunks:
                content = bytes_of(pa.chunked_array([chunk]), 2 * width).data
                stream.write(content)
                state.update(content)
            writer.write_table(table.drop_columns([FEATURE]), row_group_size=ROWS_AT_ONCE)
        told = json.dumps([asdict(entry) for entry in making.bad], ensure_ascii=False)
        digest = state.hexdigest()
        writer.add_key_value_metadata({"bad": told, "slow": str(making.slow), "width": str(width), "features": digest})
    return digest


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        if held and sum(map(len, held)) + len(batch) > ROWS_AT_ONCE:
            yield held
            held = []
        held.append(batch)
    if held:
        yield held


def held_in(folder: Path, kind: str = "part") -> dict[str, Path]:
    """The parts in a folder, or the origins of a store, by name."""
    return {name_of(file): file for file in folder.glob(f"{kind}-*.parquet")}


def is_sound(file: Path | None) -> TypeGuard[Path]:
    """Whether a part, or an origin, is there and as it was written.

    One without some pictures, because their files were missing, is made again: they may be there now.
    """
    if file is None or not is_named_by(file):
        return False
    return not any(entry["cause"].startswith(UNREADABLE) for entry in bad_of(file))


def has_features(part: Path) -> bool:
    """Whether the features beside a part are as they were written; parts of earlier versions held them."""
    told = pq.read_metadata(part).metadata.get(b"features")
    return told is not None and (file := features_file(part)).is_file() and digest_of(file) == told.decode()


def features_file(part: Path) -> Path:
    digest = pq.read_metadata(part).metadata[b"features"].decode()
    return part.with_name(f"features-{name_of(part)}-{digest}.bin")


def width_of(part: Path) -> int:
    return int(pq.read_metadata(part).metadata[b"width"])


def keep_origin(
    folder: Path, part: Path, image_ids_R: npt.NDArray[np.int32], caption_ids_C: npt.NDArray[np.int32]
) -> None:
    """Note beside the store in `folder` what it has of `part`: all but features and tokens, but where these stand, by
    ids of the rows [rows] and of the captions on these, end to end.

    From both, a later call has the part again, as long as its source and the tower stay.
    """
    aside, row, entry = folder / ".origin.partial", 0, 0
    schema = pa.schema([*COLUMNS, (IMAGE_ID, pa.int32()), (CAPTION_IDS, pa.binary())])
    with pq.ParquetWriter(aside, schema, **OPTIONS) as writer:
        for table in tables_of([part], [name for name, _ in COLUMNS]):
            rows = pa.array(image_ids_R[row : row + len(table)])
            ends = np.cumsum([0, *pc.list_value_length(table["captions"]).to_pylist()])
            held = np.ascontiguousarray(caption_ids_C[entry : entry + ends[-1]])
            captions = binary_of(held, ends)
            ids = table.append_column(IMAGE_ID, rows).append_column(CAPTION_IDS, captions)
            writer.write_table(ids.cast(schema), row_group_size=ROWS_AT_ONCE)
            row, entry = row + len(table), entry + int(ends[-1])
        told = pq.read_metadata(part).metadata
        writer.add_key_value_metadata({name: told[name.encode()].decode() for name in ("bad", "slow")})
    sync(aside)
    os.replace(aside, folder / f"{ORIGIN}-{name_of(part)}-{digest_of(aside)}.parquet")


def bytes_of(column: pa.ChunkedArray, width: int | None = None) -> npt.NDArray[np.uint8]:
    """What a column's binary values hold, end to end; `width`: each of them has so many bytes."""
    held = []
    for chunk in column.chunks:
        if width is None:
            ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            first, end = int(ends[0]), int(ends[-1])
        else:
            first, end = chunk.offset * width, (chunk.offset + len(chunk)) * width
        held.append(np.frombuffer(chunk.buffers()[-1], np.uint8)[first:end])
    return held[0] if len(held) == 1 else np.concatenate([*held, np.empty(0, np.uint8)])


def binary_of(values: npt.NDArray[Any], ends: npt.NDArray[np.integer[Any]]) -> pa.Array:
    """values[ends[0]:ends[1]], values[ends[1]:ends[2]] and so on as binary values; `ends` begin at 0."""
    offsets = (ends * values.itemsize).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(), len(ends) - 1, buffers)


def name_of(file: Path) -> str:
    return file.stem.split("-")[1]


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
