"""Parallel text, zh<TAB>en: the English side through the frozen teacher, in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from ..config import Config
from ..data.captions import read_lines, stripped
from ..data.remote import described
from ..data.shards import BadSample
from ..data.tables import CAPTION_COLUMNS, PICTURE_COLUMNS
from ..errors import UserError
from ..files.places import Location, resolved
from ..model.frozen import teacher_name
from ..model.teacher import Teacher
from .parts import Item, Made, digest
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

    def make(source: Location, source_name: str, lines: Sequence[str], start: int, bar: Any) -> Made:
        good: list[tuple[int, str, str]] = []
        bad: list[BadSample] = []
        for number, line in enumerate(lines[start : start + PARALLEL_CHUNK], start + 1):
            caption, english, *more = (*(stripped(piece) for piece in line.split("\t")), "", "")
            if not caption or not english or any(more):
                bad.append(BadSample(source.name, f"line {number}", "not two texts around a tab"))
            else:
                good.append((number, caption, english))
        features: list[bytes] = []
        if good:
            rows = teacher().encode([english for *_, english in good], progress=source.name)
            places = [f"source {source}, line {number}" for number, *_ in good]
            features = fp16_rows(rows, places, " and model.teacher")
        items = [
            Item(
                hash=digest(english.encode()),
                feature=feature,
                key=f"line {number}",
                source=source_name or "parallel",
                shard=resolved(source),
                offset=0,
                length=0,
                captions=[caption],
                noise=[None],
            )
            for (number, caption, english), feature in zip(good, features, strict=True)
        ]
        return Made(items, bad)

    parts, known, total = [], [], 0
    for source_name, source in sources_of.items():
        lines, found = read_lines(source), described(source)
        of = [name, found, PARALLEL_CHUNK, *([source_name] if source_name else [])]
        for start in range(0, len(lines), PARALLEL_CHUNK):
            parts.append(Part([*of, start], partial(make, source, source_name, lines, start)))
        known.append(found)
        total += len(lines)
    return Recipe([*sources_of.values()], known, name, parts, total, outside=False)
