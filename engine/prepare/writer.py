"""A store's files as they are written, and how the whole store comes to its place; `data.store` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..data.store import FORMAT, PAIR_FILES, edges, manifest_digest, read_manifest
from ..errors import writing
from ..files import digests, lock
from ..files.atomic import put_in_place, write_atomically
from ..files.ownership import MARK, claim, mark

# Edges are sorted so many captions at a time.
CAPTIONS_AT_ONCE = 1 << 22
# Beside a store's files: what each part gave to it.
ORIGIN = "origin"
# Where its files wait until all of them are whole.
MERGING = "merging"
# What building a store leaves beside its files.
LEFTOVERS = ("part-*.parquet", "features-*.bin", "tokens-*.parquet", f"{MERGING}-*", ".*.partial", "identity.json")
# What Hugging Face's tokenizers consist of.
TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16) if vocabulary <= 1 << 16 else np.dtype(np.int32)


class TokenFile:
    """tokens.bin and offsets.bin of a store in `folder`, written as the tokens come."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.dtype, self.texts, self._end = dtype, 0, 0
        self._files = ExitStack()
        self._tokens = self._files.enter_context((folder / "tokens.bin").open("wb"))
        self._offsets = self._files.enter_context((folder / "offsets.bin").open("wb"))
        self._offsets.write(np.zeros(1, np.int64).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, flat: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Texts of so many tokens each, end to end."""
        ends = self._end + np.cumsum(lengths, dtype=np.int64)
        self._tokens.write(np.ascontiguousarray(flat, self.dtype).data)
        self._offsets.write(ends.data)
        self.texts, self._end = self.texts + len(lengths), int(ends[-1]) if len(ends) else self._end


def write_tokens(folder: Path, token_lists: Iterable[list[int]], dtype: np.dtype[Any]) -> int:
    """tokens.bin and offsets.bin of `token_lists`, which are held a few thousand at a time; returns their number."""
    remaining = iter(token_lists)
    with TokenFile(folder, dtype) as file:
        while batch := list(islice(remaining, 4096)):
            lengths = np.array([len(one) for one in batch], np.int64)
            file.write(np.fromiter(chain.from_iterable(batch), dtype, int(lengths.sum())), lengths)
    return file.texts


def write_ids(folder: Path, image_ids: npt.NDArray[Any], caption_ids: npt.NDArray[Any], captions: int) -> None:
    """Ids of the pairs [pairs] and the edges from captions to images, as a store reads them."""
    image_ids.astype(np.int32, copy=False).tofile(folder / "image_ids.bin")
    caption_ids.astype(np.int32, copy=False).tofile(folder / "caption_ids.bin")
    offsets = np.zeros(1, np.int64)
    with (folder / "edges.offsets.bin").open("wb") as ends, (folder / "edges.images.bin").open("wb") as linked:
        ends.write(offsets.data)
        for first in range(0, captions, CAPTIONS_AT_ONCE):
            here = min(CAPTIONS_AT_ONCE, captions - first)
            chosen = _between(caption_ids, first, first + here)
            indptr, images = edges(caption_ids[chosen] - first, image_ids[chosen], here)
            offsets = offsets[-1] + indptr[1:]
            ends.write(offsets.data)
            linked.write(images.data)


def _between(ids: npt.NDArray[Any], first: int, end: int) -> npt.NDArray[np.int64]:
    """Which of `ids` are `first` to `end` - 1."""
    found = [
        start + np.flatnonzero((part >= first) & (part < end))
        for start in range(0, len(ids), CAPTIONS_AT_ONCE)
        if len(part := ids[start : start + CAPTIONS_AT_ONCE])
    ]
    return np.concatenate([np.empty(0, np.int64), *found])


def finish(
    folder: Path,
    path: Path,
    manifest: dict[str, Any],
    files: Sequence[str],
    known: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Checksum and fsync `files` and the tokenizer, write the manifest last, and `settle` the store at `path`. `known`:
    digests of files that need not be read again."""
    with writing(folder):
        tokenizer = [f"tokenizer/{name}" for name in digests.files_in(folder / "tokenizer")]
        described = digests.described(folder, [*files, *tokenizer], known)
        whole = {"format": FORMAT, **manifest, "files": described}
        whole["sha256"] = manifest_digest(whole)
        write_atomically(folder / "manifest.json", json.dumps(whole, ensure_ascii=False, indent=1).encode())
    settle(folder, path)


def settle(folder: Path, path: Path) -> None:
    """Rename the whole store `folder` to `path`, without what building it left.

    A store that stands there is replaced; UserError where anything else does.
    """
    target = claim(path, "store", existing="replace", files=files_of(path))
    for pattern in LEFTOVERS:
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    mark(folder, "store")
    put_in_place(folder, target)
    (target / lock.NAME).unlink(missing_ok=True)
    files = read_manifest(target)["files"]
    # Their digests were computed, or checked, just now.
    digests.remember(target, {digests.signature(target / name): entry["xxh3"] for name, entry in files.items()})


def files_of(path: Path) -> Iterator[str]:
    """Relative paths of everything that belongs to the store at `path`, whatever state that is in."""
    yield from (*PAIR_FILES, "manifest.json", "identity.json", MARK, lock.NAME)
    # Earlier versions left parts in stores that lacked shards.
    yield from (part.name for pattern in (LEFTOVERS[0], f"{ORIGIN}-*.parquet") for part in path.glob(pattern))
    listed: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        listed = [name for name in files if name.startswith("tokenizer/")]
    # Earlier versions did not list it, and a broken manifest does not.
    yield from listed or (f"tokenizer/{name}" for name in TOKENIZER_FILES)
