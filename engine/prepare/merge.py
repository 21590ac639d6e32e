"""A pair store's files, of its finished parts: what is equal stands once, in the order of first occurrence.

Of all parts together only digests and ids are held, in files without names that the system may keep in memory or not;
sorted are some millions of them at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from ..data.store import PAIR_SCHEMA
from ..files.scratch import scratch
from .finished import Finished
from .parts import DIGEST_BYTES, bytes_of, keep_origin, tables_of
from .writer import TokenFile, token_dtype, write_ids

SORTED_AT_ONCE = 1 << 22
SCANNED_AT_ONCE = 1 << 20
# Odd, so that no two products of 64 bits are equal: neighbours are spread over all of these.
SPREAD = np.uint64(0x9E3779B97F4A7C15)


def merge(folder: Path, parts: list[Finished], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Any]:
    """Give ids to distinct frozen rows and captions, drop repeated pairs, and write the store's files.

    `tokenizer` made the parts' tokens, and goes into the store. Returns what the manifest tells of it, and `digests` of
    files, by name, that were computed while these were written.

    Counts the pairs that were dropped, and captions of more than `longest` tokens or of unknown ones alone.
    Ids count in the order of first occurrence.
    """
    files = [part.file for part in parts]
    rows, entries = _sizes(files)
    row_digests, caption_digests = scratch((rows, 2), np.uint64, folder), scratch((entries, 2), np.uint64, folder)
    row_of = scratch((entries,), np.int32, folder)
    _read_digests(files, row_digests, caption_digests, row_of)
    row_ids, new_row, images = _ids(folder, row_digests)
    caption_ids, new_caption, captions = _ids(folder, caption_digests)
    # A pair as a digest: the picture's id spread over 64 bits, and the caption's.
    for here in _blocks(entries):
        caption_digests[here, 0] = row_ids[row_of[here]].astype(np.uint64) * SPREAD
        caption_digests[here, 1] = caption_ids[here]
    _, new_pair, pairs = _ids(folder, caption_digests)
    image_ids = scratch((pairs,), np.int32, folder)
    kept_captions = scratch((pairs,), np.int32, folder)
    done = 0
    for here in _blocks(entries):
        chosen = np.flatnonzero(new_pair[here])
        there = slice(done, done := done + len(chosen))
        image_ids[there], kept_captions[there] = row_ids[row_of[here]][chosen], caption_ids[here][chosen]
    new = new_row, new_caption, new_pair
    told = _write(folder, parts, tokenizer, longest, new, image_ids, kept_captions)
    write_ids(folder, image_ids, kept_captions, captions)
    row = entry = 0
    for file in files:
        held = slice(row, row := row + pq.read_metadata(file).num_rows)
        linked = slice(entry, entry := int(np.searchsorted(row_of, np.int32(row))))
        keep_origin(folder, file, row_ids[held], caption_ids[linked])
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "width": told.pop("width"),
        "pairs": pairs,
        "images": images,
        "captions": captions,
        "token_dtype": token_dtype(len(tokenizer)).name,
        "vocabulary": len(tokenizer),
        "repeated_pairs": entries - pairs,
        **told,
    }


def _sizes(files: list[Path]) -> tuple[int, int]:
    """Rows of all parts, and captions on these."""
    rows = entries = 0
    for table in tables_of(files, ["captions"]):
        rows, entries = rows + len(table), entries + pc.sum(pc.list_value_length(table["captions"])).as_py()
    return rows, entries


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, SCANNED_AT_ONCE):
        yield slice(start, min(start + SCANNED_AT_ONCE, n))


def _read_digests(
    files: list[Path], rows_R2: npt.NDArray[Any], captions_C2: npt.NDArray[Any], row_of_C: npt.NDArray[Any]
) -> None:
    row = entry = 0
    for table in tables_of(files, ["hash", "captions", "caption_hashes"]):
        lengths = pc.list_value_length(table["captions"]).to_numpy()
        rows = slice(row, row := row + len(table))
        entries = slice(entry, entry := entry + int(lengths.sum()))
        rows_R2[rows] = bytes_of(table["hash"], DIGEST_BYTES).view(np.uint64).reshape(-1, 2)
        captions_C2[entries] = bytes_of(table["caption_hashes"]).view(np.uint64).reshape(-1, 2)
        row_of_C[entries] = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), lengths)


def _ids(folder: Path, digests_N2: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], int]:
    """An id int32 [N] for each digest, counted in the order of first occurrence; whether each stands there for the
    first time; and how many ids there are."""
    n = len(digests_N2)
    first_of, new = scratch((n,), np.int32, folder), scratch((n,), np.bool_, folder)
    # Digests are spread evenly: those of a range of their first half are some millions.
    ranges = -(-n // SORTED_AT_ONCE)
    width = np.uint64((1 << 64) // ranges + 1 if ranges > 1 else (1 << 64) - 1)
    for number in range(ranges):
        held = [here.start + np.flatnonzero(digests_N2[here, 0] // width == number) for here in _blocks(n)]
        chosen = np.concatenate(held).astype(np.int32)
        low, high = digests_N2[chosen, 1], digests_N2[chosen, 0]
        # Stable: of equal digests the first stands first.
        order = np.lexsort((low, high))
        begins = np.ones(len(order), bool)
        begins[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        group = np.cumsum(begins) - 1
        first_of[chosen[order]] = chosen[order[begins]][group]
    count = 0
    ids = scratch((n,), np.int32, folder)
    for here in _blocks(n):
        new[here] = first_of[here] == np.arange(here.start, here.stop)
        ids[here] = count + np.cumsum(new[here]) - 1
        count += int(new[here].sum())
        # Those that stand first have their ids, here and before.
        ids[here] = ids[first_of[here]]
    return ids, new, count


def _write(
    folder: Path,
    parts: list[Finished],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    new: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    image_ids: npt.NDArray[np.int32],
    caption_ids: npt.NDArray[np.int32],
) -> dict[str, Any]:
    """features.bin, pairs.parquet and the tokens, of the rows, captions and pairs that are `new`; returns what is to be
    told of them."""
    new_row, new_caption, new_pair = new
    told = Counter[str](long_captions=0, unknown_captions=0, width=0)
    special = np.array(sorted(tokenizer.all_special_ids))
    row, entry, pair, digest = 0, 0, 0, xxh3_128()
    with ExitStack() as open_files:
        features = open_files.enter_context((folder / "features.bin").open("wb"))
        pairs = open_files.enter_context(pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA))
        tokens = open_files.enter_context(TokenFile(folder, token_dtype(len(tokenizer))))
        bar = open_files.enter_context(tqdm(desc="captions", unit="text", total=len(new_caption)))
        for held in (held for part in parts for held in part.rows(tokens.dtype)):
            table = held.table
            captions, noise = _flat(table, "captions"), _flat(table, "noise")
            rows = slice(row, row := row + len(table))
            entries = slice(entry, entry := entry + len(captions))
            flat, lengths = held.tokens_of(np.flatnonzero(new_caption[entries]))
            tokens.write(flat, lengths)
            told["long_captions"] += int((lengths > longest).sum())
            words = np.concatenate([[0], np.cumsum(~np.isin(flat, special))])
            ends = np.concatenate([[0], np.cumsum(lengths)])
            told["unknown_captions"] += int((np.diff(words[ends]) == 0).sum())
            told["width"] = held.features.shape[1]
            content = held.features[held.places[new_row[rows]]].data
            features.write(content)
            digest.update(content)
            chosen = pa.array(np.flatnonzero(new_pair[entries]))
            here = slice(pair, pair := pair + len(chosen))
            parents = pc.list_parent_indices(table["captions"].combine_chunks()).take(chosen)
            columns = {
                "caption": captions.take(chosen),
                "noise": noise.take(chosen),
                "image_id": pa.array(image_ids[here]),
                "caption_id": pa.array(caption_ids[here]),
            }
            names = [name for name in PAIR_SCHEMA.names if name not in columns]
            columns |= {name: table[name].take(parents) for name in names}
            pairs.write_table(pa.table({name: columns[name] for name in PAIR_SCHEMA.names}).cast(PAIR_SCHEMA))
            bar.update(len(captions))
    return {**told, "digests": {"features.bin": digest.hexdigest()}}


def _flat(table: pa.Table, column: str) -> pa.Array:
    flat: pa.Array = pc.list_flatten(table[column].combine_chunks())
    return flat
