"""`efficientclip audit RUN --export DIR`: the pairs that ECL kept, as webdataset shards that `prepare` reads again.

DIR/00000.tar, 00001.tar, …    samples as they lay in the original shards, without the captions that were dropped
DIR/export.json                what the export is of, its finished shards, and where the next one begins

A tar appears whole or not at all; an interrupted export goes on after its last whole tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from .. import _loader
from ..data.parquet import tables_of
from ..data.pictures import suffix_of
from ..data.shards import Members, read_members, read_picture
from ..data.store import Store
from ..errors import UserError, reading
from ..files import digests
from ..files.atomic import write_atomically, written_aside
from ..files.lock import held
from ..files.ownership import claim, mark
from ..files.places import Location, location
from .audit import Audit

# A header, and content rounded up, in bytes.
BLOCK = 512


@dataclass(frozen=True)
class Position:
    """Behind `samples` kept samples of the shard whose first kept pair is `row`."""

    row: int = 0
    samples: int = 0


@dataclass(frozen=True)
class KeptSample:
    """A sample with `pairs` kept pairs; `end` is the position behind it."""

    key: str
    members: dict[str, bytes]
    pairs: int
    end: Position

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


def export_kept(audit: Audit, folder: Path, *, samples: int, size: int) -> tuple[int, int]:
    """Write the kept pairs to shards of at most `samples` samples and `size` bytes; returns how many shards and pairs.

    A picture keeps the captions that were kept, and goes with the last of them. Keys stay; one that a shard holds
    already begins the next. UserError when pictures are gone or changed, or `folder` holds anything else.
    """
    folder = claim_export(folder, audit.folder, audit.store.path)
    store, kept = audit.store, audit.verdicts.kept
    _check_shards(store)
    identity = {
        "pairs": store.manifest["files"]["pairs.parquet"]["xxh3"],
        "kept": hashlib.sha256(np.packbits(kept).tobytes()).hexdigest(),
        "samples": samples,
        "bytes": size,
    }
    mark(folder, "kept pairs")
    with held(folder, "exporting"):
        shards = _export(audit, folder, identity, samples=samples, size=size)
    return len(shards), sum(shard["pairs"] for shard in shards)


def claim_export(folder: Path, run: Path, store: Path | None) -> Path:
    """The folder that `folder` names; UserError when shards of kept pairs may not be written there."""
    return claim(folder, "kept pairs", sources=[run, *([] if store is None else [store])])


def _export(audit: Audit, folder: Path, identity: dict[str, Any], *, samples: int, size: int) -> list[dict[str, Any]]:
    """Write what `folder` lacks of the export; returns what export.json tells of its shards."""
    record = _open(folder, identity)
    shards: list[dict[str, Any]] = record["shards"]
    done, total = sum(shard["pairs"] for shard in shards), int(audit.verdicts.kept.sum())
    with tqdm(total=total, initial=done, desc=f"kept pairs to {folder}", unit="pair", unit_scale=True) as bar:
        if not record["finished"]:
            stream = iter(_kept_samples(audit, Position(**record["next"])))
            sample = next(stream, None)
            while sample is not None:
                file = folder / f"{len(shards):05d}.tar"
                made, end, sample = _write_shard(file, sample, stream, bar, samples=samples, size=size)
                shards.append(made)
                record |= {"next": vars(end), "finished": sample is None}
                write_atomically(folder / "export.json", json.dumps(record, indent=1).encode())
    return shards


def _check_shards(store: Store) -> None:
    named: set[str] = set()
    for batch in pq.ParquetFile(store.path / "pairs.parquet").iter_batches(columns=["shard", "length"]):
        named |= set(batch["shard"].filter(pc.greater(batch["length"], 0)).unique().to_pylist())
    if not named:
        raise UserError(f"store {store.path}: holds only text, so there is no picture to export")
    local = [place for place in map(location, named) if isinstance(place, Path)]
    missing = sorted(str(place) for place in local if not place.is_file())
    if missing:
        raise UserError(
            f"shard {missing[0]}: no such file ({len(missing)} of the {len(named)} shards of {store.path} are gone);"
            " put them back, or link them there"
        )


def _open(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """export.json of an export that is to go on, or a new one."""
    file = folder / "export.json"
    if not file.is_file():
        record = {"identity": identity, "shards": [], "next": vars(Position()), "finished": False}
        write_atomically(file, json.dumps(record, indent=1).encode())
        return record
    remedy = f"remove {folder} and export anew"
    with reading("export", file, remedy):
        record = json.loads(file.read_text(encoding="utf-8"))
        differing = ", ".join(name for name, value in identity.items() if record["identity"][name] != value)
        written = {shard["name"]: {"bytes": shard["bytes"], "xxh3": shard["xxh3"]} for shard in record["shards"]}
    if differing:
        raise UserError(f"--export {folder}: holds another export ({differing} differ); choose another folder")
    digests.check(folder, written, remedy)
    return record


def _write_shard(
    file: Path, sample: KeptSample | None, stream: Iterator[KeptSample], bar: tqdm[Any], *, samples: int, size: int
) -> tuple[dict[str, Any], Position, KeptSample | None]:
    """Write one shard, from `sample` on; returns its record, the position behind it and the next one's first sample."""
    keys: set[str] = set()
    pairs, end = 0, Position()
    with written_aside(file) as aside, tarfile.open(aside, mode="w") as tar:
        filled = 0
        while sample is not None and sample.key not in keys and len(keys) < samples:
            filled += sample.size
            if keys and filled > size:
                break
            for suffix, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            keys.add(sample.key)
            pairs, end = pairs + sample.pairs, sample.end
            bar.update(sample.pairs)
            sample = next(stream, None)
    made = {"name": file.name, "samples": len(keys), "pairs": pairs, "bytes": file.stat().st_size}
    return made | {"xxh3": digests.digest_of(file)}, end, sample


def _kept_samples(audit: Audit, start: Position) -> Iterator[KeptSample]:
    """What is left of each sample with a kept pair, from `start` on, in the order of the store."""
    for group in _by_shard(audit, start.row):
        skipped = start.samples if group.row == start.row else 0
        if group.shard.suffix != ".tar":
            yield from _kept_pictures(group, skipped)
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
            if found > skipped:
                left = _without_dropped(members, kept.captions)
                yield KeptSample(key, left, len(kept.captions), Position(group.row, found))
        if found < len(group.pictures):
            raise UserError(
                f"shard {group.shard}: {len(group.pictures)} pictures of the store are kept, {found} are where it says;"
                f" the shard changed, put back the one that {audit.store.path} was prepared from"
            )


def _kept_pictures(group: KeptPairs, skipped: int) -> Iterator[KeptSample]:
    """Samples of pictures that lie in no tar, named by their place in the store; their keys stand in their .json."""
    for number, (offset, kept) in enumerate(group.pictures.items(), 1):
        if number <= skipped:
            continue
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
        yield KeptSample(f"{group.row:09d}_{number}", members, len(kept.captions), Position(group.row, number))


def _by_shard(audit: Audit, start: int) -> Iterator[KeptPairs]:
    """Kept pairs from row `start` on, a run of rows of one shard at a time."""
    group: KeptPairs | None = None
    first = 0
    columns = ["shard", "offset", "length", "key", "source", "caption"]
    for table in tables_of(audit.store.path / "pairs.parquet", columns):
        kept = np.flatnonzero(audit.verdicts.kept[first : first + len(table)])
        kept = kept[kept + first >= start]
        for row, pair in zip((kept + first).tolist(), table.take(kept).to_pylist(), strict=True):
            if group is None or str(group.shard) != pair["shard"]:
                if group is not None:
                    yield group
                group = KeptPairs(row, location(pair["shard"]))
            picture = KeptPicture(pair["length"], pair["key"], pair["source"])
            group.pictures.setdefault(pair["offset"], picture).captions.add(pair["caption"])
        first += len(table)
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
