"""Pictures that are no bytes of a local file: in cells of a .parquet, or in remote files of their own. They are written
to one temporary file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Event
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import writing
from ..files.places import URL, Location
from .listing import Listing, Strings
from .remote import each
from .tables import column_count, read_cells


def fetched(remote: Listing, stop: Event) -> Listing:
    """Of pictures that are remote files; where one cannot be had, its name stays, and there is no such file.

    ShardError soon after `stop` is set.
    """
    names = [remote.file_of(picture) for picture in range(len(remote))]
    where = np.zeros((len(names), 3), np.int64)
    with writing(Path(gettempdir())):
        memory = TemporaryFile()  # noqa: SIM115
        files = [os.fsencode(f"/proc/self/fd/{memory.fileno()}")]
        for picture, content in enumerate(each((URL(os.fsdecode(name)) for name in names), stop)):
            if content is None:
                where[picture] = len(files), 0, -1
                files.append(names[picture])
            else:
                where[picture] = 0, memory.tell(), len(content)
                memory.write(content)
        memory.flush()
    return _in_memory(remote, files, where, memory, places=Strings.of(names))


def _in_memory(
    packed: Listing, files: list[bytes], where_N3: npt.NDArray[np.int64], memory: IO[bytes], **more: Any
) -> Listing:
    """`packed` with its pictures in `files`: the file, offset and length of each."""
    file_N, offset_N, length_N = np.ascontiguousarray(where_N3.T)
    return replace(
        packed,
        files=Strings.of(files),
        file=file_N.astype(np.int32),
        offset=offset_N,
        length=length_N,
        memory=memory,
        **more,
    )


def unpacked(file: Location, folder: Location, column: int, packed: Listing, stop: Event) -> Listing:
    """Of pictures that lie in a column of `file`, as bytes or as {bytes, path}; their offsets are numbers of cells."""
    picture_of = {row: picture for picture, row in enumerate((packed.offset // column_count(file)).tolist())}
    where, cells = np.full((len(packed), 3), -1, np.int64), packed.offset.copy()
    first, last = min(picture_of, default=0), max(picture_of, default=-1)
    beside: dict[int, URL] = {}
    with writing(Path(gettempdir())):
        memory = TemporaryFile()  # noqa: SIM115
        files = [os.fsencode(f"/proc/self/fd/{memory.fileno()}")]
        for row, cell in enumerate(read_cells(file, column, first, last - first + 1), first):
            if (picture := picture_of.get(row)) is None:
                continue
            held = cell if isinstance(cell, dict) else {"bytes": cell}
            content, path = held.get("bytes"), held.get("path")
            if content:
                where[picture] = 0, memory.tell(), len(content)
                memory.write(content)
            elif path and "\0" not in path:
                place = folder / path
                where[picture], cells[picture] = (len(files), 0, -1), -1
                files.append(os.fsencode(place))
                beside |= {picture: place} if isinstance(place, URL) else {}
        for picture, content in zip(beside, each(beside.values(), stop), strict=True):
            if content is not None:
                where[picture] = 0, memory.tell(), len(content)
                memory.write(content)
        memory.flush()
    places = Strings.of(os.fsencode(beside.get(picture, "")) for picture in range(len(packed))) if beside else None
    return _in_memory(packed, files, where, memory, cells=cells, places=places)
