"""A store's files as they are written, and how the whole store comes to its place; `data.store` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.store import FORMAT, PAIR_FILES, edges, manifest_digest, read_manifest
from ..errors import writing
from ..files import digests, lock
from ..files.atomic import put_in_place, write_atomically
from ..files.ownership import MARK, claim, mark

# What building a store leaves beside its files.
LEFTOVERS = ("part-*.parquet", ".*.partial", "identity.json")
# What Hugging Face's tokenizers consist of.
TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)


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
    """Checksum and fsync `files` and the tokenizer, write the manifest last, and `settle` the store at `path`."""
    with writing(folder):
        tokenizer = [f"tokenizer/{name}" for name in digests.files_in(folder / "tokenizer")]
        described = digests.described(folder, [*files, *tokenizer])
        whole = {"format": FORMAT, **manifest, "files": described}
        whole["sha256"] = manifest_digest(whole)
        write_atomically(folder / "manifest.json", json.dumps(whole, ensure_ascii=False, indent=1).encode())
    settle(folder, path)


def settle(folder: Path, path: Path) -> None:
    """Rename the whole store `folder` to `path`, without what building it left.

    A store that stands there is replaced; UserError where anything else does.
    """
    target = claim(path, "store", existing="replace", files=files_of(path))
    # Its parts wait for the shards that it was made without.
    unfinished = read_manifest(folder).get("bad_shards")
    for pattern in LEFTOVERS[1:] if unfinished else LEFTOVERS:
        for left in folder.glob(pattern):
            left.unlink()
    mark(folder, "store")
    put_in_place(folder, target)
    (target / lock.NAME).unlink(missing_ok=True)
    files = read_manifest(target)["files"]
    # Their digests were computed, or checked, just now.
    digests.remember(target, {digests.signature(target / name): entry["xxh3"] for name, entry in files.items()})


def files_of(path: Path) -> Iterator[str]:
    """Relative paths of everything that belongs to the store at `path`, whatever state that is in."""
    yield from (*PAIR_FILES, "manifest.json", "identity.json", MARK, lock.NAME)
    yield from (part.name for part in path.glob(LEFTOVERS[0]))
    listed: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        listed = [name for name in files if name.startswith("tokenizer/")]
    # Earlier versions did not list it, and a broken manifest does not.
    yield from listed or (f"tokenizer/{name}" for name in TOKENIZER_FILES)
