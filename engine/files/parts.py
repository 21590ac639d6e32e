"""A file of rows that ranks make together, in parts and in any order: a part that was written is not made again.

FILE          the rows, one after the other
FILE.parts/   an empty file for each part that stands in it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import writing


class Parts:
    """`file` of as many rows as the parts have together, `rows` each, of `width` numbers."""

    def __init__(self, file: Path, rows: Sequence[int], width: int, dtype: npt.DTypeLike) -> None:
        self.file, self.rows, self.width, self.dtype = file, rows, width, np.dtype(dtype)
        self.starts = np.cumsum([0, *rows])
        self.marks = file.with_name(f"{file.name}.parts")

    def begin(self) -> list[int]:
        """Take the file's room, unless that was done; the parts that are missing. For one rank alone, before all."""
        room = self._place(len(self.rows))
        with writing(self.file):
            if not self.file.is_file() or self.file.stat().st_size != room:
                shutil.rmtree(self.marks, ignore_errors=True)
                with self.file.open("wb") as stream:
                    if room:
                        os.posix_fallocate(stream.fileno(), 0, room)
            self.marks.mkdir(exist_ok=True)
        standing = {mark.name for mark in self.marks.iterdir()}
        return [part for part in range(len(self.rows)) if str(part) not in standing]

    def write(self, part: int, values: npt.NDArray[Any]) -> None:
        """The part's rows [rows, width]: once they would outlast a power cut, the part stands."""
        with writing(self.file), self.file.open("r+b") as stream:
            stream.seek(self._place(part))
            stream.write(np.ascontiguousarray(values, self.dtype).data)
            stream.flush()
            os.fdatasync(stream.fileno())
            (self.marks / str(part)).touch()

    def read(self) -> npt.NDArray[Any]:
        """All rows, mapped."""
        shape = int(self.starts[-1]), self.width
        return np.memmap(self.file, self.dtype, "r", shape=shape) if shape[0] else np.empty(shape, self.dtype)

    def _place(self, part: int) -> int:
        return int(self.starts[part]) * self.width * self.dtype.itemsize
