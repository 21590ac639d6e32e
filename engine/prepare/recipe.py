"""What a pair store is made of: parts, each known by what its rows depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.remote import Described
from ..data.store import first_not_finite
from ..errors import UserError
from ..files.places import Location
from .parts import Made


@dataclass(frozen=True)
class Part:
    """A piece of a source, and what its rows depend on: other pieces may change without it.

    `shard`: the tar that it is, without which the store may be made.
    """

    of: list[Any]
    make: Callable[[Any], Made]
    shard: Location | None = None

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.of).encode()).hexdigest()[:32]


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


def fp16_rows(features_MD: np.ndarray[Any, Any], places: Sequence[str], more: str = "") -> list[bytes]:
    """UserError naming the first of `places` whose row is not finite; `more`: what else may be the cause."""
    if (row := first_not_finite(features_MD)) is not None:
        raise UserError(f"{places[row]}: the frozen tower gave NaN or infinity for it; check its weights{more}")
    return [row.tobytes() for row in features_MD.astype(np.float16)]
