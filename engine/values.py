"""The kinds of values that a configuration holds, and what is wrong with one that is none."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator

from .files.places import URL, Location, location

# C++ and torch count in int32 here, and in int64 and float64 there.
COUNT, WHOLE, SEED = 2**31 - 1, 2**53, 2**63 - 1
PIXELS, TOKENS = 4096, 2**16


def _nameable(value: Any) -> Any:
    if isinstance(value, str | Path):
        name = str(value)
        if not name.strip():
            raise ValueError("empty; give a name")
        if "\0" in name or max(map(len, os.fsencode(name).split(b"/"))) > 255:
            raise ValueError("no name that a file could have")
    return value


def _locatable(value: Any) -> Location:
    if not isinstance(value, str | Path):
        raise ValueError("neither a path nor a URL")
    found = location(value)
    return found if isinstance(found, URL) else Path(_nameable(value))


def check_numbers(key: str, value: Any) -> None:
    """ValueError when a number in an architecture, under `key` or deeper, can be none."""
    if isinstance(value, dict):
        for name, held in value.items():
            check_numbers(f"{key}.{name}" if key else str(name), held)
    elif isinstance(value, list):
        for held in value:
            check_numbers(key, held)
    elif isinstance(value, int | float):
        name = key.rpartition(".")[2]
        if not math.isfinite(value):
            raise ValueError(f"{key} is {value}; give a finite number")
        if (name.endswith(("size", "sizes")) or name.startswith("num_")) and not 0 <= value <= COUNT:
            raise ValueError(f"{key} is {value}; give a number from 0 to {COUNT}")


Name = Annotated[str, BeforeValidator(_nameable)]
Place = Annotated[Path, BeforeValidator(_nameable)]
Source = Annotated[Location, PlainValidator(_locatable), PlainSerializer(str, return_type=str)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
