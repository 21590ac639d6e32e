"""The store: frozen features, packed tokens and the pairs between them, written once and memory-mapped.

    features.bin   fp16 [images, D], L2-normalised
    tokens.bin     uint16 or int32 [tokens], every distinct caption once, special tokens included
    offsets.bin    int64 [captions + 1]
    pairs.parquet  a row a pair: key, caption, source, image_id, caption_id, noise, shard, offset, length
    image_ids.bin, caption_ids.bin    int32 [pairs], the parquet's columns for random access
    edges.offsets.bin int64 [captions + 1], edges.images.bin int32 [pairs]    the images of each caption, ascending
    tokenizer/     the Hugging Face tokenizer that made the tokens
    manifest.json  kind, tower, tokenizer, counts, sizes, checksums, bad samples; written last

A text store holds only tokens, offsets, tokenizer and manifest. Nothing is read when a store is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError

# CSR of a bipartite graph: indptr int64 [left nodes + 1], indices int32, ascending in each row.
Edges = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]

FORMAT = 2
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


class TextStore:
    """Packed tokens of texts: `tokens` [T], `offsets` int64 [n + 1]."""

    kind = "texts"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        if self.manifest["kind"] != self.kind:
            raise UserError(f"store {path}: holds {self.manifest['kind']}, but {self.kind} are needed here")
        self.tokens = self._map("tokens.bin", np.dtype(self.manifest["token_dtype"]))
        self.offsets = self._map("offsets.bin", np.dtype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _map(self, name: str, dtype: np.dtype[Any], width: int | None = None) -> npt.NDArray[Any]:
        file, expected = self.path / name, self.manifest["files"][name]["bytes"]
        actual = file.stat().st_size if file.exists() else -1
        if actual != expected:
            raise UserError(
                f"store {self.path}: {name} has {actual} bytes, the manifest says {expected}; prepare it anew"
            )
        shape = (-1,) if width is None else (-1, width)
        flat: npt.NDArray[Any] = np.memmap(file, dtype, mode="r") if expected else np.empty(0, dtype)
        return flat.reshape(shape)


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

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.width: int = self.manifest["width"]
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

    def pairs(self) -> pa.Table:
        """The whole pair table: for reports and search, never for training."""
        return pq.read_table(self.path / "pairs.parquet", memory_map=True)


def edges(left_ids: npt.NDArray[np.integer[Any]], right_ids: npt.NDArray[np.integer[Any]], n_left: int) -> Edges:
    """The graph that is given as pairs."""
    order = np.lexsort((right_ids, left_ids))
    indptr = np.zeros(n_left + 1, np.int64)
    np.cumsum(np.bincount(left_ids, minlength=n_left), out=indptr[1:])
    return indptr, right_ids[order].astype(np.int32)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole store; a store that was never finished has none."""
    file = path / "manifest.json"
    if not file.is_file():
        half = " (preparing it was interrupted: run the same command again)" if staging(path).exists() else ""
        raise UserError(f"store {path}: no manifest.json{half}; make it with `efficientclip prepare SOURCE {path}`")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"store {path}: format {manifest.get('format')}, this version reads {FORMAT}; prepare it anew with"
            f" `efficientclip prepare SOURCE {path}`"
        )
    return manifest


def staging(path: Path) -> Path:
    """Where a store is built before it is renamed to `path`."""
    return path.with_name(path.name + ".partial")


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16) if vocabulary <= 1 << 16 else np.dtype(np.int32)


def write_tokens(folder: Path, token_lists: Iterable[list[int]], dtype: np.dtype[Any]) -> int:
    """tokens.bin and offsets.bin of `token_lists`, which are held a few thousand at a time; returns their number."""
    remaining = iter(token_lists)
    texts = end = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "offsets.bin").open("wb") as offsets:
        np.zeros(1, np.int64).tofile(offsets)
        while batch := list(islice(remaining, 4096)):
            ends = end + np.cumsum([len(one) for one in batch], dtype=np.int64)
            np.fromiter(chain.from_iterable(batch), dtype, int(ends[-1]) - end).tofile(tokens)
            ends.tofile(offsets)
            texts, end = texts + len(batch), int(ends[-1])
    return texts


def write_ids(folder: Path, image_ids: npt.NDArray[Any], caption_ids: npt.NDArray[Any], captions: int) -> None:
    """Ids of the pairs [pairs] and the edges from captions to images, as a store reads them."""
    image_ids.astype(np.int32).tofile(folder / "image_ids.bin")
    caption_ids.astype(np.int32).tofile(folder / "caption_ids.bin")
    offsets, images = edges(caption_ids, image_ids, captions)
    offsets.tofile(folder / "edges.offsets.bin")
    images.tofile(folder / "edges.images.bin")


def finish(folder: Path, path: Path, manifest: dict[str, Any], files: Sequence[str]) -> None:
    """Checksum and fsync `files`, write the manifest last, and rename `folder` to `path`."""
    described = {}
    for name in files:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            described[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    write_atomically(
        folder / "manifest.json",
        json.dumps({"format": FORMAT, **manifest, "files": described}, ensure_ascii=False, indent=1).encode(),
    )
    if path.exists():
        shutil.rmtree(path)
    os.replace(folder, path)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write, fsync, rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
