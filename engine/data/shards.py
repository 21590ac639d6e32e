"""Shards: webdataset and img2dataset tars, and the pictures in them that a store points to."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile

from .. import _loader
from ..errors import UserError
from ..files.places import URL, Location
from .remote import opened, read_range
from .tables import read_picture_cell

IMAGE_SUFFIXES = frozenset(_loader.IMAGE_SUFFIXES)
# How the causes begin that tell of a picture's file, and not of the picture.
UNREADABLE = "picture file: "
# Content and its first byte in the tar, by suffix.
Members = dict[str, tuple[bytes, int]]


@dataclass(frozen=True)
class BadSample:
    """One that cannot be used: the name of its tar or table, its key there, and why."""

    shard: str
    key: str
    cause: str


@dataclass(frozen=True)
class BadShard:
    """One that cannot be had or is not whole: the name of its tar or table, the message that tells why, its number in
    the loader's list, and how many samples it gave."""

    shard: str
    cause: str
    number: int
    samples: int


def read_members(shard: Location) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample of one tar in order; a sample is the run of members that share a name up to the
    first dot."""
    try:
        with opened(shard) as file, tarfile.open(fileobj=file) as tar:
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


def read_picture(shard: Location, offset: int, length: int) -> bytes:
    """The encoded picture that a store row points to; in a .tsv it stands as base64, in a .parquet in a cell."""
    try:
        if shard.suffix == ".parquet":
            return read_picture_cell(shard, offset)
        base64 = shard.suffix == ".tsv"
        if not isinstance(shard, URL):
            return _loader.read_picture(os.fsencode(shard), offset, length, base64=base64)
        with TemporaryFile() as file:
            file.write(read_range(shard, offset, length))
            file.flush()
            return _loader.read_picture(b"/proc/self/fd/%d" % file.fileno(), 0, length, base64=base64)
    except ValueError as error:
        cause = str(error)
        if cause.startswith(UNREADABLE):
            raise UserError(
                f"shard {shard}: {cause.removeprefix(UNREADABLE)}; the store points to it, put it back, or tell"
                " where it is by `efficientclip moved STORE OLD NEW`"
            ) from error
        raise UserError(
            f"shard {shard}: no picture at byte {offset} ({cause}); the shard changed, prepare the store anew"
        ) from error
