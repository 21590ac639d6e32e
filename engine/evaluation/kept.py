"""What ECL kept of some rows of a pair table, read from the shards that they point to and written as tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _loader
from ..data.parquet import ROWS
from ..data.pictures import suffix_of
from ..data.shards import Members, read_members, read_picture
from ..data.store import Store
from ..errors import UserError, writing
from ..files import digests
from ..files.atomic import sync
from ..files.places import Location, location

# A header, and content rounded up, in bytes.
BLOCK = 512
COLUMNS = ("shard", "offset", "length", "key", "source", "caption")


@dataclass(frozen=True)
class Export:
    """The store whose kept pairs go to `folder`, in tars of at most `samples` samples and `size` bytes."""

    store: Path
    folder: Path
    samples: int
    size: int


@dataclass(frozen=True)
class Share:
    """What one process makes tars of by itself: rows of the pair table from `first` on, and which of them were kept."""

    number: int
    first: int
    kept: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class KeptSample:
    key: str
    members: dict[str, bytes]
    pairs: int

    @property
    def size(self) -> int:
        """Bytes in a tar."""
        return sum(BLOCK + -(-len(content) // BLOCK) * BLOCK for content in self.members.values())


@dataclass
class KeptPairs:
    """Kept pairs of one shard, from pair row `row` on, by the byte where a picture starts."""

    row: int
    shard: Location
    pictures: dict[int, KeptPicture] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptPicture:
    length: int
    key: str
    source: str
    captions: set[str] = field(default_factory=set)


def write_share(export: Export, share: Share) -> list[dict[str, Any]]:
    """Write the tars of `share` aside, under names of its own; what export.json tells of each, with that `aside`."""
    stream = _kept_samples(export.store, share)
    made: list[dict[str, Any]] = []
    sample = next(stream, None)
    while sample is not None:
        file = export.folder / aside(share.number, len(made))
        with writing(file):
            record, sample = _write_tar(file, sample, stream, export)
        made.append(record)
    return made


def aside(share: int, tar: int) -> str:
    return f".{share:06d}-{tar:06d}.tar.partial"


def _write_tar(
    file: Path, sample: KeptSample | None, stream: Iterator[KeptSample], export: Export
) -> tuple[dict[str, Any], KeptSample | None]:
    """Write one tar, from `sample` on; returns its record and the next one's first sample."""
    keys: set[str] = set()
    pairs = filled = 0
    with tarfile.open(file, mode="w") as tar:
        while sample is not None and sample.key not in keys and len(keys) < export.samples:
            filled += sample.size
            if keys and filled > export.size:
                break
            for suffix, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            keys.add(sample.key)
            pairs += sample.pairs
            sample = next(stream, None)
    sync(file)
    made = {"aside": file.name, "samples": len(keys), "pairs": pairs, "bytes": file.stat().st_size}
    return made | {"xxh3": digests.digest_of(file)}, sample


def _kept_samples(store: Path, share: Share) -> Iterator[KeptSample]:
    """What is left of each sample with a kept pair, in the order of the store."""
    for group in _by_shard(store, share):
        if group.shard.suffix != ".tar":
            yield from _kept_pictures(group)
            continue
        found = 0
        for key, members in read_members(group.shard):
            at = next((at for _, at in members.values() if at in group.pictures), None)
            if at is None:
                continue
            found += 1
            kept = group.pictures[at]
            if all(len(content) != kept.length for content, offset in members.values() if offset == at):
                break
            yield KeptSample(key, _without_dropped(members, kept.captions), len(kept.captions))
        if found < len(group.pictures):
            raise UserError(
                f"shard {group.shard}: {len(group.pictures)} pictures of the store are kept, {found} are where it says;"
                f" the shard changed, put back the one that {store} was prepared from"
            )


def _kept_pictures(group: KeptPairs) -> Iterator[KeptSample]:
    """Samples of pictures that lie in no tar, named by their place in the store; their keys stand in their .json."""
    for number, (offset, kept) in enumerate(group.pictures.items(), 1):
        content = read_picture(group.shard, offset, kept.length)
        try:
            suffix = suffix_of(content)
        except ValueError as error:
            raise UserError(
                f"{group.shard}: no picture at byte {offset} ({error}); it changed, put back what the store was"
                " prepared from"
            ) from error
        record = {"key": kept.key, "source": kept.source, "captions": sorted(kept.captions)}
        members = {suffix: content, "json": json.dumps(record, ensure_ascii=False).encode()}
        yield KeptSample(f"{group.row:09d}_{number}", members, len(kept.captions))


def _by_shard(store: Path, share: Share) -> Iterator[KeptPairs]:
    """Pairs of the share, a run of rows of one shard at a time."""
    group: KeptPairs | None = None
    opened = Store(store)
    for start in range(0, len(share.kept), ROWS):
        rows = share.first + start + np.flatnonzero(share.kept[start : start + ROWS])
        pairs = opened.pairs(rows, COLUMNS).to_pylist()
        for row, pair in zip(rows.tolist(), pairs, strict=True):
            if group is None or str(group.shard) != pair["shard"]:
                if group is not None:
                    yield group
                group = KeptPairs(row, location(pair["shard"]))
            picture = KeptPicture(pair["length"], pair["key"], pair["source"])
            group.pictures.setdefault(pair["offset"], picture).captions.add(pair["caption"])
    if group is not None:
        yield group


def _without_dropped(members: Members, captions: set[str]) -> dict[str, bytes]:
    """The members of a sample with `captions` alone; where one caption stands for all, a kept one takes its place."""
    left = {suffix: content for suffix, (content, _) in members.items()}
    record = json.loads(left.get("json", b"{}"))
    field = "caption" if record.get("captions") is None and "txt" not in left else "captions"
    if not isinstance(record.get(field), list):
        # Its only caption, or it would not be here.
        return left
    texts, *_ = _loader.read_captions(left.get("txt"), left.get("json"))
    record[field] = [entry for entry, text in zip(record[field], texts, strict=True) if text in captions]
    first = next(text for text in texts if text in captions)
    if field == "captions" and "caption" in record and str(record["caption"]).strip() not in captions:
        record["caption"] = first
    if "txt" in left and left["txt"].decode("utf-8-sig", "replace").strip() not in captions:
        left["txt"] = first.encode()
    left["json"] = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return left
