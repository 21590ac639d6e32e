"""What a pair store is made of: parts, each known by what its rows depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.remote import Described
from ..data.store import first_not_finite
from ..errors import UserError
from ..files.places import Location
from .parts import Making

# Of parts: those of another are made again.
FORMAT = 2


@dataclass(frozen=True)
class Part:
    """A piece of a source, and what its rows depend on: other pieces may change without it.

    `size`: in bytes or samples, whatever the source's pieces are compared by. `shard`: the tar that it is, without
    which the store may be made.
    """

    of: list[Any]
    make: Callable[[], Making]
    size: int
    shard: Location | None = None

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, *self.of]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Recipe:
    """What a pair store is made of, in parts that an interrupted call keeps; `samples` is their number, if known.

    `outside`: pictures lie in files of their own, which may change, or come, while `files` stay. None in `known`: that
    file was not to be had.
    """

    files: Sequence[Location]
    known: Sequence[Described | None]
    tower: str
    parts: Sequence[Part]
    samples: int | None
    outside: bool


def fp16_rows(
    features_MD: npt.NDArray[np.floating[Any]], places: Callable[[int], str], more: str = ""
) -> npt.NDArray[np.float16]:
    """UserError naming the first row that is not finite by its place; `more`: what else may be the cause."""
    if (row := first_not_finite(features_MD)) is not None:
        raise UserError(f"{places(row)}: the frozen tower gave NaN or infinity for it; check its weights{more}")
    return features_MD.astype(np.float16)
