"""Columns that tell of many pictures where their bytes lie and what is said of them, as the C++ reader walks them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import IO, Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Strings:
    """Byte strings end to end: string i is content[ends[i] : ends[i + 1]]; `ends` is int64 [n + 1]."""

    content: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> Strings:
        held = list(strings)
        return cls(np.frombuffer(b"".join(held), np.uint8), ends_of(map(len, held)))

    def __getitem__(self, i: int) -> bytes:
        return self.content[self.ends[i] : self.ends[i + 1]].tobytes()

    def part(self, first: int, end: int) -> Strings:
        return replace(self, ends=self.ends[first : end + 1])


def ends_of(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    """int64 [n + 1]: where the first begins, and where each of `lengths` [n] ends."""
    return np.fromiter(accumulate(lengths, initial=0), np.int64)


@dataclass(frozen=True)
class Listing:
    """n pictures, in the order of their source.

    file int32 [n]: which of `files` holds each, -1 where there is none; offset, length int64 [n]: where in it, -1 for
    the whole file. `base64`: what lies there is base64 of either alphabet. keys, sources: UTF-8 [n]. captions: UTF-8,
    those of picture i from caption_ends[i] to caption_ends[i + 1] - 1; lone surrogates stay, and make a bad sample of
    it. text_ids: as many, or None; they tell equal captions apart. cells int64 [n], of pictures that were written to
    `memory`: the number of the cell, or the byte of the source's file, that each came from, -1 where it lies in a file
    of its own. places [n], of remote pictures that were written there: their URLs.
    """

    files: Strings
    file: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    base64: bool
    keys: Strings
    sources: Strings
    captions: Strings
    caption_ends: npt.NDArray[np.int64]
    text_ids: Strings | None
    cells: npt.NDArray[np.int64] | None = None
    memory: IO[bytes] | None = None
    places: Strings | None = None

    def __len__(self) -> int:
        return len(self.file)

    def part(self, first: int, end: int) -> Listing:
        """Pictures `first` to `end` - 1, in the same memory."""
        return replace(
            self,
            file=self.file[first:end],
            offset=self.offset[first:end],
            length=self.length[first:end],
            keys=self.keys.part(first, end),
            sources=self.sources.part(first, end),
            caption_ends=self.caption_ends[first : end + 1],
            cells=None if self.cells is None else self.cells[first:end],
            places=None if self.places is None else self.places.part(first, end),
        )

    @property
    def of_files(self) -> bool:
        """Whether each picture lies in a file of its own."""
        return not self.base64 and self.cells is None and bool((self.offset == 0).all() and (self.length < 0).all())

    @property
    def used(self) -> Strings:
        """The files that these pictures lie in, of all of the source's."""
        there = self.file[self.file >= 0]
        return self.files.part(int(there.min()), int(there.max()) + 1) if len(there) else self.files.part(0, 0)

    def digest(self) -> str:
        """Of all that is told of the pictures; where they stand among others makes no difference."""
        first, end = int(self.caption_ends[0]), int(self.caption_ends[-1])
        strings = [self.used, self.keys, self.sources, self.captions.part(first, end)]
        strings += [] if self.text_ids is None else [self.text_ids.part(first, end)]
        numbers = [np.where(self.file < 0, -1, self.file - self.file.max(initial=0)), self.offset, self.length]
        numbers += [np.diff(held) for held in (self.caption_ends, *(one.ends for one in strings))]
        state = hashlib.sha256()
        for column in (*numbers, *(one.content[one.ends[0] : one.ends[-1]] for one in strings)):
            state.update(column.tobytes())
        return state.hexdigest()

    def file_of(self, picture: int) -> bytes:
        """The path of the file in which a picture lies."""
        return self.files[int(self.file[picture])]

    def text_ids_of(self, picture: int) -> list[str]:
        """The ids of the captions of a picture; none where the source has none."""
        if self.text_ids is None:
            return []
        first, end = self.caption_ends[picture : picture + 2].tolist()
        return [self.text_ids[text].decode("utf-8", "surrogatepass") for text in range(first, end)]

    def columns(self) -> dict[str, Any]:
        """As `_loader.ImageLoader` takes them."""
        strings = {name: (held.content, held.ends) for name, held in vars(self).items() if isinstance(held, Strings)}
        return {**vars(self), **strings}
