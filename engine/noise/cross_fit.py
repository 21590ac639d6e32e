"""cross_fit.parquet: what `efficientclip cross-fit` found of each pair and each source."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.parquet import give_back
from ..data.store import Store
from ..errors import UserError, reading
from ..files.atomic import written_aside
from .answers import Floats

FILE = "cross_fit.parquet"
ANEW = "remove the folder and run `efficientclip cross-fit CONFIG` again"
COLUMNS = ("fold", "score", "p", "competence", "clean_log_odds")
NEGLIGIBLE = 0.03  # a smaller rate is no ground to drop anything,
TOLD_FROM_NONE = 0.02  # nor is one whose interval reaches below this
UNTOLD = 0.25  # an interval as wide leaves the rate open


class SourceRate(NamedTuple):
    """The estimated share of wrong pairs of a source, of small ones taken together, or of all; `low` to `high` holds
    the truth in 90 of 100 cases. `skill` is the share of mismatches that a right pair is told from, or NaN."""

    name: str
    pairs: int
    rate: float
    low: float
    high: float
    skill: float = math.nan

    @property
    def open(self) -> bool:
        """Whether the towers cannot tell the rate."""
        return self.high - self.low > UNTOLD

    @property
    def droppable(self) -> float:
        """The share of the pairs that may be dropped on this evidence."""
        told = not self.open and self.rate >= NEGLIGIBLE and self.low >= TOLD_FROM_NONE
        return self.rate if told else 0.0


@dataclass(frozen=True)
class CrossFit:
    """Arrays of float64 [pairs], but fold int8. `rate` is the share of the pairs that may be dropped, `visits` what it
    cost; `whole` is the estimate for all pairs, `made_of` tells what all follows from."""

    rate: float
    visits: int
    fold: npt.NDArray[np.int8]
    score: Floats  # cosine by the tower that did not train on the pair
    p: Floats  # by the caption's words
    competence: Floats
    clean_log_odds: Floats
    sources: tuple[SourceRate, ...] = ()
    whole: SourceRate | None = None
    made_of: str = ""
    near: SourceRate | None = None  # misses beside these
    company: Floats | None = None  # of each pair, log of how much likelier a right one keeps it than a wrong one


def write_cross_fit(folder: Path, store: Store, found: CrossFit) -> None:
    """cross_fit.parquet: a row a pair; in its metadata the rates, the store's identity, and a digest of it all."""
    columns = {name: getattr(found, name) for name in COLUMNS}
    if found.company is not None:
        columns["company"] = found.company
    table = pa.table({"row": np.arange(len(found.p)), **columns})
    told = {"rate": repr(found.rate), "visits": str(found.visits), "pairs": _identity(store)}
    told["sources"] = json.dumps(found.sources, ensure_ascii=False)
    told["whole"] = json.dumps(found.whole, ensure_ascii=False)
    told["near"] = json.dumps(found.near)
    told["columns"] = _digest_of(*(np.ascontiguousarray(column).data for column in columns.values()))
    told["made_of"] = found.made_of
    told["sha256"] = _digest_of(*map(str.encode, told.values()))
    with written_aside(folder / FILE) as aside:
        pq.write_table(table.replace_schema_metadata(told), aside)


def read_cross_fit(folder: Path, store: Store | None = None) -> CrossFit:
    """What `efficientclip cross-fit` left in `folder`; UserError where it is absent, broken or tells of other pairs."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"confidence.cross_fit: {file} is missing; run `efficientclip cross-fit CONFIG` first")
    with reading("confidence.cross_fit:", file, ANEW):
        table = pq.read_table(file)
        told = _told(table.schema)
        names = [*COLUMNS, *(["company"] if "company" in table.column_names else [])]
        columns = {name: table[name].to_numpy() for name in names}
        if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))):
            raise ValueError("its rows are not those of a store")
        for name, column in columns.items():
            if column.dtype != (np.int8 if name == "fold" else np.float64) or not np.isfinite(column).all():
                raise ValueError(f"{name} is not finite, or no column of numbers")
        if len(table) == 0 or not np.isin(columns["fold"], (0, 1)).all():
            raise ValueError("a pair is in neither fold")
        digest = _digest_of(*(np.ascontiguousarray(column).data for column in columns.values()))
        if told.get("columns", digest) != digest:
            raise ValueError("is not what was written, its digest differs")
    if store is not None and (told["pairs"] != _identity(store) or len(table) != len(store)):
        raise UserError(f"confidence.cross_fit: {file} judges other pairs than those of {store.path}; {ANEW}")
    by_source = tuple(SourceRate(*source) for source in json.loads(told.get("sources", "[]")))
    made_of = told.get("made_of", "")
    whole, near = (json.loads(told.get(name, "null")) for name in ("whole", "near"))
    # The columns are numpy's by now.
    del table
    give_back()
    return CrossFit(
        float(told["rate"]),
        int(told["visits"]),
        **columns,
        sources=by_source,
        whole=whole and SourceRate(*whole),
        made_of=made_of,
        near=near and SourceRate(*near),
    )


def read_rate(folder: Path) -> float | None:
    """The share of the pairs that `folder` gives ground to drop, without the verdicts; None before `efficientclip
    cross-fit` has written it."""
    told = _told_without_pairs(folder)
    return float(told["rate"]) if told else None


def read_visits(folder: Path) -> int | None:
    """Pair visits of both towers; None before `efficientclip cross-fit` has written them."""
    told = _told_without_pairs(folder)
    return int(told["visits"]) if told else None


def read_rates(folder: Path) -> list[SourceRate]:
    """The rates in `folder`, that of all pairs first and then those of several sources; none before `efficientclip
    cross-fit` has written them."""
    told = _told_without_pairs(folder)
    whole, sources = json.loads(told.get("whole", "null")), json.loads(told.get("sources", "[]"))
    return [SourceRate(*rate) for rate in ([whole] if whole else []) + (sources if len(sources) > 1 else [])]


def read_near(folder: Path) -> str:
    """What `folder` tells of near misses, in words; "" where it tells of none."""
    near = json.loads(_told_without_pairs(folder).get("near", "null"))
    return near_in_words(near and SourceRate(*near))


def near_in_words(near: SourceRate | None) -> str:
    if near is None or not near.droppable:
        return ""
    return (
        f"{near.rate:.1%} more ({near.low:.1%} to {near.high:.1%}) are near misses, or rare names of what a picture"
        " shows: none is dropped for it"
    )


def _told_without_pairs(folder: Path) -> dict[str, str]:
    file = folder / FILE
    if not file.is_file():
        return {}
    with reading("confidence.cross_fit:", file, ANEW):
        return _told(pq.read_schema(file))


def _told(schema: pa.Schema) -> dict[str, str]:
    """The metadata of cross_fit.parquet; an error when it is not as it was written."""
    told = {key: (schema.metadata or {})[key.encode()].decode() for key in ("rate", "visits", "pairs")}
    # Earlier versions wrote no digests, and no rates of sources.
    later = {
        key: schema.metadata[key.encode()].decode()
        for key in ("sources", "whole", "near", "columns", "made_of", "sha256")
        if key.encode() in schema.metadata
    }
    if not 0 <= float(told["rate"]) <= 1 or int(told["visits"]) < 0:
        raise ValueError(f"a rate of {told['rate']} after {told['visits']} visits")
    digest = later.pop("sha256", None)
    told |= later
    if (later or digest is not None) and _digest_of(*map(str.encode, told.values())) != digest:
        raise ValueError("is not what was written, its digest differs")
    return told


def _digest_of(*parts: bytes | memoryview) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(memoryview(part).nbytes.to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def _identity(store: Store) -> str:
    return "-".join(store.manifest["files"][name]["xxh3"] for name in ("image_ids.bin", "caption_ids.bin"))
