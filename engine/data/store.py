"""The store: frozen features, packed tokens and the pairs between them, written once and memory-mapped.

    features.bin   fp16 [images, D], L2-normalised
    tokens.bin     uint16 or int32 [tokens], every distinct caption once, special tokens included
    offsets.bin    int64 [captions + 1]
    pairs.parquet  a row a pair: key, caption, source, image_id, caption_id, noise, shard, offset, length
    image_ids.bin, caption_ids.bin    int32 [pairs], the parquet's columns for random access
    edges.offsets.bin int64 [captions + 1], edges.images.bin int32 [pairs]    the images of each caption, ascending
    tokenizer/     the Hugging Face tokenizer that made the tokens
    manifest.json  kind, tower, tokenizer, counts, sizes, checksums, bad samples, moves of shards; written last
    origin-*.parquet    what each part of the source gave, for the next `prepare`

A text store holds only tokens, offsets, tokenizer and manifest. Opening a store reads its manifest and the sizes of its
files; `prove` reads what they hold, and so does the first opening of a store of the format before, whose manifest it
writes anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError, reading, writing
from ..files import digests, lock
from ..files.atomic import write_atomically
from ..files.ownership import require_writable
from .parquet import rows_of, tables_of

# CSR of a bipartite graph: indptr int64 [left nodes + 1], indices int32, ascending in each row.
Edges = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]

FORMAT = 3
# It differs in the digests of files alone, which are SHA-256.
EARLIER = 2
ANEW = "prepare the store anew, or restore the file from a copy"
CHECKED_AT_ONCE = 1 << 24
TOLD_SOURCES = 20
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
TEXT_FILES = ("tokens.bin", "offsets.bin")
PAIR_FILES = (
    *TEXT_FILES,
    "features.bin",
    "pairs.parquet",
    "image_ids.bin",
    "caption_ids.bin",
    "edges.offsets.bin",
    "edges.images.bin",
)


@dataclass(frozen=True)
class Sources:
    """What pairs are of: the names of their sources, those of most pairs first, and the number of each pair's in these,
    integers [pairs]."""

    names: tuple[str, ...]
    of: npt.NDArray[np.integer[Any]]

    def shares(self, chosen: npt.NDArray[np.bool_]) -> dict[str, tuple[int, float]]:
        """Pairs of each source, and the share of them that are `chosen`, bool [pairs]; "" is (none), and the sources
        behind the first TOLD_SOURCES are (others)."""
        counts = np.zeros((2, len(self.names)), np.int64)
        for start in range(0, len(self.of), CHECKED_AT_ONCE):
            of, here = self.of[start : start + CHECKED_AT_ONCE], chosen[start : start + CHECKED_AT_ONCE]
            counts += [np.bincount(part, minlength=len(self.names)) for part in (of, of[here])]
        told = {name or "(none)": counts[:, at] for at, name in enumerate(self.names[:TOLD_SOURCES])}
        if len(self.names) > TOLD_SOURCES:
            told["(others)"] = counts[:, TOLD_SOURCES:].sum(1)
        return {name: (int(total), float(some / total)) for name, (total, some) in told.items()}


class TextStore:
    """Packed tokens of texts: `tokens` [T], `offsets` int64 [n + 1]."""

    kind = "texts"
    _files: Sequence[str] = TEXT_FILES

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        if self.manifest["kind"] != self.kind:
            raise UserError(f"store {path}: holds {self.manifest['kind']}, but {self.kind} are needed here")
        digests.check_sizes(path, self.manifest["files"], ANEW)
        self.tokens = self._map("tokens.bin", np.dtype(self.manifest["token_dtype"]))
        self.offsets = self._map("offsets.bin", np.dtype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def identity(self) -> str:
        """Equal for stores that hold the same, wherever they lie."""
        held = {name: self.manifest["files"][name]["xxh3"] for name in self._files if name != "pairs.parquet"}
        return hashlib.sha256(json.dumps([self.manifest.get("tower"), held]).encode()).hexdigest()

    def prove(self, known: digests.Known | None = None, *, anew: bool = False) -> digests.Known:
        """UserError naming the first file that is not as it was written, or holds what no store may hold.

        What was read once and not touched since is not read again, unless `anew`, nor what another process of this
        machine has proved: `known`. Returns digests by file signature.
        """
        found = digests.check(self.path, self.manifest["files"], ANEW, known=known, anew=anew)
        vouched = known is not None and found.keys() <= known.keys()
        if anew or not (vouched or digests.seen(found, f"format {FORMAT}, {self.kind}")):
            self.check_contents()
            digests.note_seen(found, f"format {FORMAT}, {self.kind}")
        return found

    def check_contents(self) -> None:
        """UserError naming the first file and row that no store may hold."""
        vocabulary = self.manifest["vocabulary"]
        self._within("offsets.bin", self.offsets, 0, len(self.tokens))
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise UserError(f"{self.path / 'offsets.bin'}: does not begin at 0 and end at {len(self.tokens)}; {ANEW}")
        if (falls := np.flatnonzero(np.diff(self.offsets) < 0)).size:
            raise UserError(f"{self.path / 'offsets.bin'}: row {falls[0] + 1} falls; {ANEW}")
        self._within("tokens.bin", self.tokens, 0, vocabulary - 1)

    def _within(self, name: str, values: npt.NDArray[Any], least: int, most: int) -> None:
        for start in range(0, len(values), CHECKED_AT_ONCE):
            part = values[start : start + CHECKED_AT_ONCE]
            if (wrong := np.flatnonzero((part < least) | (part > most))).size:
                found = f"row {start + wrong[0]} is {part[wrong[0]]}, outside of {least} to {most}"
                raise UserError(f"{self.path / name}: {found}; {ANEW}")

    def _map(self, name: str, dtype: np.dtype[Any], width: int | None = None) -> npt.NDArray[Any]:
        file = self.path / name
        with reading("store file", file, ANEW):
            flat: npt.NDArray[Any] = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
            return flat.reshape((-1,) if width is None else (-1, width))


class Texts(TextStore):
    """Texts at hand, or some of a store's, in the shape of a store."""

    def __init__(self, tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> None:
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def of(cls, token_lists: Sequence[Sequence[int]]) -> Texts:
        offsets = np.zeros(len(token_lists) + 1, np.int64)
        np.cumsum([len(tokens) for tokens in token_lists], out=offsets[1:])
        return cls(np.fromiter(chain.from_iterable(token_lists), np.int32, int(offsets[-1])), offsets)


class Store(TextStore):
    """Pairs of captions and frozen features (of images, or of a teacher's sentences)."""

    kind = "pairs"
    _files = PAIR_FILES

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.width: int = self.manifest["width"]
        self.moved: list[tuple[str, str]] = [(old, new) for old, new in self.manifest.get("moved", ())]
        self.features = self._map("features.bin", np.dtype(np.float16), self.width)
        self.image_ids = self._map("image_ids.bin", np.dtype(np.int32))
        self.caption_ids = self._map("caption_ids.bin", np.dtype(np.int32))
        # CSR graph from caption to every image the store links it with: (indptr, indices).
        self.caption_edges = (
            self._map("edges.offsets.bin", np.dtype(np.int64)),
            self._map("edges.images.bin", np.dtype(np.int32)),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def pairs(
        self, rows: npt.NDArray[np.integer[Any]] | None = None, columns: Sequence[str] = PAIR_SCHEMA.names
    ) -> pa.Table:
        """The pair table's `columns`, of its `rows` in their order. All rows of its texts may be gigabytes: for small
        stores."""
        file = self.path / "pairs.parquet"
        with reading("pair table", file, ANEW):
            if rows is not None:
                return self._where_now(rows_of(file, rows, columns))
            return self._where_now(pq.read_table(file, columns=list(columns), memory_map=True))

    def pair_tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The pair table's `columns`, some thousand rows at a time; texts are plain strings."""
        with reading("pair table", self.path / "pairs.parquet", ANEW):
            yield from map(self._where_now, tables_of(self.path / "pairs.parquet", columns))

    def picture_files(self) -> set[str]:
        """Where the pairs' pictures lie; none for a store of texts alone."""
        found: set[str] = set()
        for table in self.pair_tables(["shard", "length"]):
            found |= set(table["shard"].filter(pc.greater(table["length"], 0)).unique().to_pylist())
        return found

    def _where_now(self, pairs: pa.Table) -> pa.Table:
        """`pairs` with shards at the places that they were moved to."""
        if not self.moved or "shard" not in pairs.column_names:
            return pairs
        shard = pairs["shard"].combine_chunks()
        told = shard if pa.types.is_dictionary(shard.type) else shard.dictionary_encode()
        names = pa.array([place_now(name, self.moved) for name in told.dictionary.to_pylist()], pa.string())
        now = pa.DictionaryArray.from_arrays(told.indices, names).cast(shard.type)
        return pairs.set_column(pairs.column_names.index("shard"), "shard", now)

    def sources(self) -> Sources:
        """By the pair table's column, where it tells none by the name ""."""
        known, parts = dict[str, int](), [np.empty(0, np.int32)]
        for table in self.pair_tables(["source"]):
            told = table["source"].combine_chunks().fill_null("").dictionary_encode()
            number = [known.setdefault(name, len(known)) for name in told.dictionary.to_pylist()]
            parts.append(np.array(number, np.int32)[told.indices.to_numpy()])
        names, codes = [*known], np.concatenate(parts)
        counts = np.bincount(codes, minlength=len(names))
        order = [at for at in sorted(range(len(names)), key=lambda at: (-counts[at], names[at])) if counts[at]]
        number_of = np.zeros(len(names), np.min_scalar_type(len(names)))
        number_of[order] = np.arange(len(order))
        return Sources(tuple(names[at] for at in order), number_of[codes])

    def check_contents(self) -> None:
        super().check_contents()
        captions, images = len(self.offsets) - 1, len(self.features)
        self._within("image_ids.bin", self.image_ids, 0, images - 1)
        self._within("caption_ids.bin", self.caption_ids, 0, captions - 1)
        offsets, linked = self.caption_edges
        self._within("edges.offsets.bin", offsets, 0, len(linked))
        self._within("edges.images.bin", linked, 0, images - 1)
        if not len(self.image_ids) == len(self.caption_ids) == len(linked) or len(offsets) != captions + 1:
            raise UserError(f"store {self.path}: its files tell of different numbers of pairs or captions; {ANEW}")
        if (row := first_not_finite(self.features)) is not None:
            raise UserError(f"{self.path / 'features.bin'}: row {row} is not finite; {ANEW}")


def place_now(place: str, moved: Sequence[tuple[str, str]]) -> str:
    """Where what lay at `place` lies after each of the moves (from, to), of folders or of files, in their order."""
    for old, new in moved:
        if place == old or place.startswith(f"{old.rstrip('/')}/"):
            place = new + place[len(old) :]
    return place


def first_not_finite(values_KD: npt.NDArray[np.floating[Any]]) -> int | None:
    """The first row with a NaN or an infinity; None: all are finite. Values may be mapped."""
    at_once = max(1, CHECKED_AT_ONCE // max(values_KD.shape[1], 1))
    for start in range(0, len(values_KD), at_once):
        wrong = ~np.isfinite(values_KD[start : start + at_once]).all(1)
        if wrong.any():
            return start + int(wrong.argmax())
    return None


def edges(left_ids: npt.NDArray[np.integer[Any]], right_ids: npt.NDArray[np.integer[Any]], n_left: int) -> Edges:
    """The graph that is given as pairs."""
    order = np.lexsort((right_ids, left_ids))
    indptr = np.zeros(n_left + 1, np.int64)
    np.cumsum(np.bincount(left_ids, minlength=n_left), out=indptr[1:])
    return indptr, right_ids[order].astype(np.int32)


def ranges(starts: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """starts[0], starts[0] + 1, …, `lengths[0]` of them, and so on: int64 [sum of lengths]."""
    ahead = np.cumsum(lengths) - lengths
    return np.repeat(starts - ahead, lengths) + np.arange(lengths.sum())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole store; a store that was never finished has none."""
    file = path / "manifest.json"
    if not file.is_file():
        half = " (preparing it was interrupted: run the same command again)" if staging(path).exists() else ""
        raise UserError(f"store {path}: no manifest.json{half}; make it with `efficientclip prepare SOURCE {path}`")
    with reading("store manifest", file, ANEW):
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("format") not in (EARLIER, FORMAT):
            raise UserError(
                f"store {file}: format {manifest.get('format')}, this version reads {EARLIER} and {FORMAT}; prepare it"
                f" anew with `efficientclip prepare SOURCE {path}`"
            )
        # Earlier versions wrote none.
        if manifest.get("sha256", digest := manifest_digest(manifest)) != digest:
            raise UserError(f"store {file}: is not what was written (its digest differs); {ANEW}")
        needed = PAIR_FILES if manifest["kind"] == "pairs" else TEXT_FILES
        if missing := [name for name in needed if not isinstance(manifest["files"][name]["bytes"], int)]:
            raise ValueError(f"no size of {missing[0]}")
        keys = ("tokenizer", "vocabulary", *(("tower", "width") if manifest["kind"] == "pairs" else ()))
        if missing := [key for key in keys if key not in manifest]:
            raise ValueError(f"no {missing[0]}")
        np.dtype(manifest["token_dtype"])
    return manifest if manifest["format"] == FORMAT else _brought_up(path, manifest)


def _brought_up(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a store of the EARLIER format, written anew as one of FORMAT, once its files prove right.

    One process does so, others that open the store meanwhile wait. UserError where a file is not as it was written, or
    nothing can be written there.
    """
    file, doing = path / "manifest.json", f"bringing from format {EARLIER} to {FORMAT}, once,"
    right = "give this user the right to write there, or copy the store to where it can be written"
    require_writable(path, f"{doing} {path}", right)
    with writing(file), lock.in_turn(file, doing):
        now: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if now != manifest:
            return read_manifest(path)
        manifest = {**manifest, "format": FORMAT, "files": digests.described_anew(path, manifest["files"], ANEW)}
        manifest["sha256"] = manifest_digest(manifest)
        write_atomically(file, json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Of all that it tells but this digest."""
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def staging(path: Path) -> Path:
    """Where a store is built before it is renamed to `path`."""
    return path.with_name(path.name + ".partial")
