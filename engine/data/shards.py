"""Shards: webdataset and img2dataset tars, read sequentially into samples; bad samples are named, not raised."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

IMAGE_SUFFIXES = {"png", "jpg", "jpeg", "webp"}
# Content and its first byte in the tar, by suffix.
Members = dict[str, tuple[bytes, int]]
# Old data sets' base64 is of the alphabet for URLs.
PLAIN_BASE64 = bytes.maketrans(b"-_", b"+/")


@dataclass
class Sample:
    """One picture with its captions; it lies at `offset` of `shard`, `length` bytes long, in a .tsv as base64.

    `text_ids`, as long as `captions` or empty, tell equal captions apart where the source has ids for them.
    """

    key: str
    image: bytes
    shard: Path
    offset: int
    length: int
    captions: list[str]
    captions_en: list[str] = field(default_factory=list)
    noise: list[bool | None] = field(default_factory=list)
    source: str = ""
    text_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BadSample:
    shard: str
    key: str
    cause: str


def list_shards(source: Path) -> list[Path]:
    """The tars of `source` (one tar, or a folder of them), sorted by name."""
    if not source.exists():
        raise UserError(f"source {source}: no such file or folder; give a .tar or a folder of .tar files")
    shards = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if not shards:
        raise UserError(f"source {source}: holds no .tar file; give a folder of webdataset or img2dataset shards")
    return shards


def read_shard(shard: Path) -> Iterator[Sample | BadSample]:
    """Samples of one tar in order."""
    for key, members in read_members(shard):
        yield _sample(shard, key, members)


def read_members(shard: Path) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample of one tar in order; a sample is the run of members that share a name up to the
    first dot."""
    try:
        with tarfile.open(shard) as tar:
            key = ""
            members: Members = {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                this_key = f"{folder}/{stem}" if folder else stem
                if this_key != key and members:
                    yield key, members
                    members = {}
                key = this_key
                stream = tar.extractfile(member)
                members[suffix.lower()] = (stream.read() if stream else b"", member.offset_data)
            if members:
                yield key, members
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"shard {shard}: not a whole tar file ({error}); copy or download it again") from error


def read_picture(shard: Path, offset: int, length: int) -> bytes:
    """The encoded picture that a store row points to."""
    try:
        with shard.open("rb") as file:
            file.seek(offset)
            return decoded(shard, file.read(length))
    except OSError as error:
        raise UserError(
            f"shard {shard}: {error.strerror}; the store points to it, put it back or prepare anew"
        ) from error
    except ValueError as error:
        raise UserError(
            f"shard {shard}: no picture at byte {offset} ({error}); the shard changed, prepare the store anew"
        ) from error


def decoded(shard: Path, stored: bytes) -> bytes:
    """The picture's file that `stored` bytes of `shard` stand for. ValueError where a .tsv holds no base64."""
    return base64.b64decode(stored.translate(PLAIN_BASE64), validate=True) if shard.suffix == ".tsv" else stored


def _sample(shard: Path, key: str, members: Members) -> Sample | BadSample:
    suffix = next((name for name in members if name in IMAGE_SUFFIXES), None)
    if suffix is None:
        return BadSample(shard.name, key, "caption without image")
    image, offset = members[suffix]
    try:
        record = read_record(members["json"][0] if "json" in members else None)
        entries = caption_entries(members["txt"][0] if "txt" in members else None, record)
    except UnicodeDecodeError:
        return BadSample(shard.name, key, "caption is not UTF-8")
    except ValueError:
        return BadSample(shard.name, key, "json is malformed")
    if not entries:
        return BadSample(shard.name, key, "image without caption")
    captions = [str(entry["text"]).strip() for entry in entries]
    if not all(captions):
        return BadSample(shard.name, key, "empty caption")
    return Sample(
        key=key,
        image=image,
        shard=shard,
        offset=offset,
        length=len(image),
        captions=captions,
        captions_en=[str(caption) for caption in record.get("captions_en", [])],
        noise=[entry.get("noise") for entry in entries],
        source=str(record.get("source", "")),
    )


def read_record(encoded: bytes | None) -> dict[str, Any]:
    """A .json member; empty if there is none. ValueError if it holds no object, UnicodeDecodeError if no text."""
    if encoded is None:
        return {}
    try:
        record = json.loads(encoded)
    except RecursionError as error:
        raise ValueError("json is nested too deep") from error
    if not isinstance(record, dict):
        raise ValueError(f"json holds {type(record).__name__}, not an object")
    return record


def caption_entries(encoded: bytes | None, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Captions of a sample with this .txt and this record, each under "text"; csrc/captions.cpp has the same rule."""
    text = None if encoded is None else encoded.decode("utf-8").strip()
    captions = record.get("captions")
    if isinstance(captions, list):
        return [entry if isinstance(entry, dict) and "text" in entry else {"text": entry} for entry in captions]
    if text is not None:
        return [{"text": text}]
    caption = record.get("caption")
    return [] if caption is None else [{"text": caption}]
