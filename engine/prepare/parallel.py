"""Parallel text, zh<TAB>en: the English side through the frozen teacher, in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from ..config import Config
from ..data.captions import read_lines, stripped
from ..data.remote import described
from ..data.shards import BadSample
from ..data.tables import CAPTION_COLUMNS, PICTURE_COLUMNS
from ..errors import UserError
from ..files.places import Location, resolved
from ..model.frozen import teacher_name
from ..model.teacher import Teacher
from .parts import batch_of
from .recipe import Part, Recipe, fp16_rows

PARALLEL_CHUNK = 8192


def parallel_recipe(sources_of: Mapping[str, Location], config: Config) -> Recipe:
    """Of the lines zh<TAB>en of each source, by its name; that of "" is called parallel."""
    if config.model.teacher is None:
        first = next(iter(sources_of.values()))
        raise UserError(
            f"model.teacher: not set; {first} is taken as parallel text, zh<TAB>en, which it encodes. A table of"
            f" pictures needs a first line with one of {', '.join(PICTURE_COLUMNS)} and one of"
            f" {', '.join(CAPTION_COLUMNS)}"
        )
    name = teacher_name(config.model.teacher)
    teacher = cache(partial(Teacher, config.model.teacher))
    parts, known, total = [], [], 0
    for source_name, source in sources_of.items():
        lines, found = read_lines(source), described(source)
        of = [name, found, PARALLEL_CHUNK, *([source_name] if source_name else [])]
        for start in range(0, len(lines), PARALLEL_CHUNK):
            chunk = lines[start : start + PARALLEL_CHUNK]
            make = partial(_Lines, teacher, source, source_name or "parallel", chunk, start + 1)
            parts.append(Part([*of, start], make, len(chunk)))
        known.append(found)
        total += len(lines)
    return Recipe([*sources_of.values()], known, name, parts, total, outside=False)


class _Lines:
    """Lines of parallel text, from number `first` on, on their way through the teacher."""

    def __init__(
        self, teacher: Callable[[], Teacher], source: Location, source_name: str, lines: Sequence[str], first: int
    ) -> None:
        self._teacher, self._source, self._source_name = teacher, source, source_name
        self._lines, self._first = lines, first
        self.bad: list[BadSample] = []
        self.slow = 0

    def start(self) -> None:
        """Nothing is read ahead."""

    def batches(self, bar: Any) -> Iterator[pa.RecordBatch]:
        good: list[tuple[int, str, str]] = []
        for number, line in enumerate(self._lines, self._first):
            caption, english, *more = (*(stripped(piece) for piece in line.split("\t")), "", "")
            if not caption or not english or any(more):
                self.bad.append(BadSample(self._source.name, f"line {number}", "not two texts around a tab"))
            else:
                good.append((number, caption, english))
        if not good:
            return
        numbers, captions, english_texts = zip(*good, strict=True)
        rows = self._teacher().encode(list(english_texts), progress=self._source.name)
        features_MD = fp16_rows(rows, lambda row: f"source {self._source}, line {numbers[row]}", " and model.teacher")
        yield batch_of(
            features_MD,
            [english.encode() for english in english_texts],
            key=[f"line {number}" for number in numbers],
            source=[self._source_name] * len(good),
            shard=[resolved(self._source)] * len(good),
            offset=np.zeros(len(good), np.int64),
            length=np.zeros(len(good), np.int64),
            captions=[[caption] for caption in captions],
            noise=[[None]] * len(good),
        )

    def close(self) -> None:
        """Nothing is held."""
