"""A pair store's files, of its finished parts: what is equal stands once, in the order of first occurrence.

Of all parts together only digests and ids are held, in files without names that the system may keep in memory or not;
sorted are some millions of them at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from ..data.store import ANEW, PAIR_SCHEMA
from ..errors import UserError
from ..files import digests
from ..files.scratch import scratch
from .finished import Finished
from .parts import DIGEST_BYTES, bytes_of, keep_origin, tables_of
from .writer import MERGING, TokenFile, token_dtype, write_ids

SORTED_AT_ONCE = 1 << 22
SCANNED_AT_ONCE = 1 << 20
# Odd, so that no two products of 64 bits are equal: neighbours are spread over all of these.
SPREAD = np.uint64(0x9E3779B97F4A7C15)
# Of what is made of parts: what is another's is made again.
FORMAT = 1
TOLD = "told.json"
# What the manifest tells of files, and those digests of these, by name, that were taken while they were written.
Told = tuple[dict[str, int], dict[str, str]]
Work = Callable[[Path], Told]


class Held(NamedTuple):
    """Where the rows and the captions of a part are among those of all."""

    part: Finished
    rows: slice
    entries: slice


def merge(folder: Path, parts: list[Finished], tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Any]:
    """Give ids to distinct frozen rows and captions, drop repeated pairs, and write the store's files.

    `tokenizer` made the parts' tokens, and goes into the store. Returns what the manifest tells of it, and `digests` of
    its files, by name. Files that stand when a call is killed stay for the next.

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
    held, row, entry = list[Held](), 0, 0
    for part in parts:
        own = slice(row, row := row + pq.read_metadata(part.file).num_rows)
        held.append(Held(part, own, slice(entry, entry := int(np.searchsorted(row_of, np.int32(row))))))
    total = images + captions + pairs
    with tqdm(desc="putting together", unit="row", total=total) as bar:
        works = {
            "features": partial(_features, held, new_row, bar),
            "tokens": partial(_tokens, held, tokenizer, longest, new_caption, bar),
            "pairs": partial(_pairs, files, new_pair, image_ids, kept_captions, bar),
            "ids": partial(_ids_and_edges, image_ids, kept_captions, captions),
            "origins": partial(_origins, held, row_ids, caption_ids),
        }
        told, found = _made(folder, _key(parts, longest), works)
        # What stood is done, too.
        bar.update(total - bar.n)
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
        "digests": found,
    }


def _key(parts: list[Finished], longest: int) -> str:
    """Of all that the files depend on: names of parts and of tokens tell what these hold."""
    made_of = [[part.file.name, part.tokens and part.tokens.name, part.store and part.store.identity] for part in parts]
    return hashlib.sha256(json.dumps([FORMAT, longest, made_of]).encode()).hexdigest()[:32]


def _made(folder: Path, key: str, works: Mapping[str, Work]) -> tuple[dict[str, int], dict[str, str]]:
    """What all `works` tell, and the digests of their files, which lie in `folder` then. Those that an interrupted call
    was through with, for the same `key`, are not made again; the others are made beside each other."""
    merging = folder / f"{MERGING}-{key}"
    for other in folder.glob(f"{MERGING}-*"):
        if other != merging:
            shutil.rmtree(other)
    with ThreadPoolExecutor(len(works)) as beside:
        made = list(beside.map(_standing_or_made, (merging / name for name in works), works.values()))
    told: dict[str, int] = {}
    found: dict[str, str] = {}
    for name, files in zip(works, made, strict=True):
        told |= json.loads((merging / name / TOLD).read_bytes())
        for file in files.keys() - {TOLD}:
            os.replace(merging / name / file, folder / file)
            found[file] = files[file]["xxh3"]
    shutil.rmtree(merging)
    return told, found


def _standing_or_made(place: Path, work: Work) -> digests.Described:
    """The files in `place`, where they are as they were written, or else as `work` writes them now."""
    with suppress(UserError):
        files = digests.read_digests(place)
        digests.check(place, files, ANEW)
        return files
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    told, known = work(place)
    (place / TOLD).write_text(json.dumps(told))
    files = digests.described(place, digests.files_in(place), known)
    digests.write_digests(place, files)
    return files


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


def _features(held: list[Held], new_row: npt.NDArray[np.bool_], bar: Any, folder: Path) -> Told:
    told, digest = {"width": 0}, xxh3_128()
    with (folder / "features.bin").open("wb") as file:
        for part, rows, _ in held:
            for features_KD in part.features(new_row[rows]):
                told["width"] = features_KD.shape[1]
                file.write(features_KD.data)
                digest.update(features_KD.data)
                bar.update(len(features_KD))
    return told, {"features.bin": digest.hexdigest()}


def _tokens(
    held: list[Held],
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    new_caption: npt.NDArray[np.bool_],
    bar: Any,
    folder: Path,
) -> Told:
    told = {"long_captions": 0, "unknown_captions": 0}
    special = np.array(sorted(tokenizer.all_special_ids))
    with TokenFile(folder, token_dtype(len(tokenizer))) as file:
        for part, _, entries in held:
            for flat, lengths in part.tokens_of(new_caption[entries], file.dtype):
                file.write(flat, lengths)
                told["long_captions"] += int((lengths > longest).sum())
                words = np.concatenate([[0], np.cumsum(~np.isin(flat, special))])
                ends = np.concatenate([[0], np.cumsum(lengths)])
                told["unknown_captions"] += int((np.diff(words[ends]) == 0).sum())
                bar.update(len(lengths))
    return told, {}


def _pairs(
    files: list[Path],
    new_pair: npt.NDArray[np.bool_],
    image_ids: npt.NDArray[np.int32],
    caption_ids: npt.NDArray[np.int32],
    bar: Any,
    folder: Path,
) -> Told:
    entry, pair = 0, 0
    own = ["caption", "noise", "image_id", "caption_id"]
    names = [name for name in PAIR_SCHEMA.names if name not in own]
    with pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA) as writer:
        for table in tables_of(files, [*names, "captions", "noise"]):
            captions, noise = _flat(table, "captions"), _flat(table, "noise")
            entries = slice(entry, entry := entry + len(captions))
            chosen = pa.array(np.flatnonzero(new_pair[entries]))
            here = slice(pair, pair := pair + len(chosen))
            parents = pc.list_parent_indices(table["captions"].combine_chunks()).take(chosen)
            columns = {
                "caption": captions.take(chosen),
                "noise": noise.take(chosen),
                "image_id": pa.array(image_ids[here]),
                "caption_id": pa.array(caption_ids[here]),
            }
            columns |= {name: table[name].take(parents) for name in names}
            writer.write_table(pa.table({name: columns[name] for name in PAIR_SCHEMA.names}).cast(PAIR_SCHEMA))
            bar.update(len(chosen))
    return {}, {}


def _ids_and_edges(
    image_ids: npt.NDArray[np.int32], caption_ids: npt.NDArray[np.int32], captions: int, folder: Path
) -> Told:
    write_ids(folder, image_ids, caption_ids, captions)
    return {}, {}


def _origins(
    held: list[Held], row_ids: npt.NDArray[np.int32], caption_ids: npt.NDArray[np.int32], folder: Path
) -> Told:
    for part, rows, entries in held:
        keep_origin(folder, part.file, row_ids[rows], caption_ids[entries])
    return {}, {}


def _flat(table: pa.Table, column: str) -> pa.Array:
    flat: pa.Array = pc.list_flatten(table[column].combine_chunks())
    return flat
