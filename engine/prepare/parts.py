"""Parts of a pair store: written one by one as a source is encoded, then merged into the store's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128_hexdigest

from ..data.shards import UNREADABLE, BadSample
from ..errors import reading, writing
from ..files.atomic import write_atomically
from ..files.digests import digest_of
from .writer import token_dtype, write_ids, write_tokens

PAIR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("image_id", pa.int32()),
        ("caption_id", pa.int32()),
        ("noise", pa.bool_()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)


@dataclass
class Item:
    """One distinct frozen row of a part: its feature and the captions that stand on it."""

    hash: bytes
    feature: bytes
    key: str
    source: str
    shard: str
    offset: int
    length: int
    captions: list[str]
    noise: list[bool | None]


class Made(NamedTuple):
    """The rows of a part, the samples that make none, and how many pictures took the decoder's slow path."""

    items: list[Item]
    bad: list[BadSample]
    slow: int = 0


def write_part(folder: Path, name: str, made: Made) -> Path:
    """Write a part of that name, in place of any other; returns its file."""
    schema = pa.schema(
        [
            ("hash", pa.binary()),
            ("feature", pa.binary()),
            ("key", pa.string()),
            ("source", pa.string()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("captions", pa.list_(pa.string())),
            ("noise", pa.list_(pa.bool_())),
        ],
        metadata={
            "bad": json.dumps([asdict(entry) for entry in made.bad], ensure_ascii=False),
            "slow": str(made.slow),
        },
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([vars(item) for item in made.items], schema=schema), sink)
    content = sink.getvalue().to_pybytes()
    file = folder / f"part-{name}-{xxh3_128_hexdigest(content)}.parquet"
    for other in folder.glob(f"part-{name}-*.parquet"):
        other.unlink()
    write_atomically(file, content)
    return file


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
    found: list[dict[str, str]] = json.loads(pq.read_schema(file).metadata[b"bad"])
    return found


def slow_of(file: Path) -> int:
    # Parts of earlier versions tell none.
    return int(pq.read_schema(file).metadata.get(b"slow", 0))


def merge(folder: Path, files: list[Path], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Any]:
    """Give ids to distinct frozen rows and captions, drop repeated pairs, and write the store's files.

    Counts the pairs that were dropped, and captions of more than `longest` tokens or of unknown ones alone.
    Ids count in the order of first occurrence. Of all parts together only digests and ids are held, never texts.
    """
    row_digests, caption_digests = bytearray(), bytearray()
    counts = []
    for file in files:
        table = _part_table(file, ["hash", "captions"])
        row_digests += b"".join(table["hash"].to_pylist())
        counts.append(pc.list_value_length(table["captions"]).to_numpy())
        caption_digests += b"".join(digest(caption.encode()) for caption in _flat(table, "captions").to_pylist())
    image_of_row, rows = _ids(row_digests)
    image_ids = np.repeat(image_of_row, np.concatenate(counts))
    caption_ids, captions = _ids(caption_digests)
    del row_digests, caption_digests, counts, image_of_row
    pairs = np.unique(image_ids.astype(np.int64) << 32 | caption_ids, return_index=True)[1]
    pairs.sort()
    repeated = len(image_ids) - len(pairs)
    image_ids, caption_ids = image_ids[pairs], caption_ids[pairs]
    width = _write_rows(folder, files, rows)
    _write_pairs(folder, files, pairs, image_ids, caption_ids)
    dtype = token_dtype(len(tokenizer))
    texts = tqdm(_texts(files, captions), desc="captions", unit="text", total=len(captions))
    tokens = chain.from_iterable(tokenizer(batch)["input_ids"] for batch in batches(texts, 4096))
    told = Counter[str](long_captions=0, unknown_captions=0)
    write_tokens(folder, _counted(tokens, longest, frozenset(tokenizer.all_special_ids), told), dtype)
    write_ids(folder, image_ids, caption_ids, len(captions))
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "width": width,
        "pairs": len(pairs),
        "images": len(rows),
        "captions": len(captions),
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "repeated_pairs": repeated,
        **told,
    }


def _counted(
    token_lists: Iterable[list[int]], longest: int, special: frozenset[int], told: Counter[str]
) -> Iterator[list[int]]:
    for tokens in token_lists:
        told["long_captions"] += len(tokens) > longest
        told["unknown_captions"] += special.issuperset(tokens)
        yield tokens


def _part_table(file: Path, columns: list[str]) -> pa.Table:
    with reading("part", file, "remove it and run the same command again"):
        return pq.read_table(file, columns=columns)


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _ids(digests: bytearray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """An id for each digest of 16 bytes, counted in the order of first occurrence, and where each id occurs first."""
    high, low = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    # Stable: of equal digests the first stands first.
    order = np.lexsort((low, high))
    new = np.ones(len(order), bool)
    new[1:] = _changes(high[order])
    new[1:] |= _changes(low[order])
    firsts = order[new]
    by_occurrence = np.argsort(firsts)
    rank = np.empty(len(firsts), np.int32)
    rank[by_occurrence] = np.arange(len(firsts), dtype=np.int32)
    ids = np.empty(len(order), np.int32)
    ids[order] = rank[np.cumsum(new, dtype=np.int32) - 1]
    return ids, firsts[by_occurrence]


def _changes(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    changed: npt.NDArray[np.bool_] = values[1:] != values[:-1]
    return changed


def _flat(table: pa.Table, column: str) -> pa.Array:
    flat: pa.Array = pc.list_flatten(table[column]).combine_chunks()
    return flat


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _chosen(chosen: npt.NDArray[np.int64], start: int, count: int) -> npt.NDArray[np.int64]:
    """Those of the ascending `chosen` that lie in the next `count` from `start`, counted from there."""
    first, last = np.searchsorted(chosen, (start, start + count))
    return chosen[first:last] - start


def _write_rows(folder: Path, files: list[Path], rows: npt.NDArray[np.int64]) -> int:
    """features.bin of the parts' `rows`, ascending; returns their width."""
    start = width = 0
    with (folder / "features.bin").open("wb") as stream:
        for file in files:
            features = _part_table(file, ["feature"])["feature"]
            for feature in features.take(_chosen(rows, start, len(features))).to_pylist():
                stream.write(feature)
                width = len(feature) // 2
            start += len(features)
    return width


def _write_pairs(
    folder: Path,
    files: list[Path],
    pairs: npt.NDArray[np.int64],
    image_ids: npt.NDArray[np.int32],
    caption_ids: npt.NDArray[np.int32],
) -> None:
    """pairs.parquet of the parts' `pairs`, ascending, with the ids of each."""
    start = done = 0
    with pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA) as writer:
        for file in files:
            table = _part_table(
                file, ["key", "source", "shard", "offset", "length", "captions", "noise"]
            ).combine_chunks()
            captions, noise = _flat(table, "captions"), _flat(table, "noise")
            chosen = _chosen(pairs, start, len(captions))
            rows = table.take(pc.list_parent_indices(table["captions"]).combine_chunks().take(chosen)).combine_chunks()
            here = slice(done, done + len(chosen))
            columns = {
                "caption": captions.take(chosen),
                "image_id": image_ids[here],
                "caption_id": caption_ids[here],
                "noise": noise.take(chosen),
            }
            arrays = [columns[name] if name in columns else rows[name] for name in PAIR_SCHEMA.names]
            writer.write_table(pa.table(arrays, names=PAIR_SCHEMA.names).cast(PAIR_SCHEMA))
            start, done = start + len(captions), here.stop


def _texts(files: list[Path], captions: npt.NDArray[np.int64]) -> Iterator[str]:
    """The parts' `captions`, ascending."""
    start = 0
    for file in files:
        texts = _flat(_part_table(file, ["captions"]), "captions")
        yield from texts.take(_chosen(captions, start, len(texts))).to_pylist()
        start += len(texts)
