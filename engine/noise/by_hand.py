"""What a person told of some pairs (`data.verdicts`), and which pairs of a store that means.

row,key,caption,verdict    as audit.html hands it out: `right` or `wrong`, of every pair of that key and caption

The row is for the reader alone: a store that is prepared anew has others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from ..data.captions import stripped
from ..data.store import Store
from ..data.tables import KEY_COLUMNS, read_table
from ..errors import UserError
from ..stopping import rank_of_environment

VERDICTS = {"right": 1, "wrong": -1}
# Pairs below which a bar would only flicker.
LONG = 1 << 22
Pair = tuple[str, str]


@dataclass(frozen=True)
class ByHand:
    """Verdicts by key and caption, the first row of those that the store has, and of_pairs int8 [pairs]: 1 right, -1
    wrong, 0 not judged."""

    verdicts: Mapping[Pair, str]
    rows: Mapping[Pair, int]
    of_pairs: npt.NDArray[np.int8]

    @property
    def identity(self) -> dict[str, Any]:
        """What a run learns by: counts of pairs, and a digest."""
        counts = {name: int(np.count_nonzero(self.of_pairs == value)) for name, value in VERDICTS.items()}
        return {**counts, "sha256": hashlib.sha256(self.of_pairs.data).hexdigest()}

    def __str__(self) -> str:
        right, wrong, _ = self.identity.values()
        lost = len(self.verdicts) - len(self.rows)
        absent = f"; {lost:,} of the verdicts match no pair of the store" if lost else ""
        return f"{right:,} pairs right, {wrong:,} wrong, by {len(self.verdicts):,} verdicts{absent}"


def read_by_hand(file: Path, store: Store) -> ByHand:
    """UserError, with the line, where `file` is no list of verdicts, or contradicts itself."""
    try:
        verdicts = _verdicts(file)
    except UserError as error:
        raise UserError(f"data.verdicts: {error}") from error
    captions = pa.array(list({caption for _, caption in verdicts}), pa.string())
    of_pairs, rows = np.zeros(len(store), np.int8), dict[Pair, int]()
    silent, first = rank_of_environment() > 0 or len(store) < LONG, 0
    with tqdm(total=len(store), desc=file.name, unit="pair", unit_scale=True, disable=silent) as bar:
        for pairs in store.pair_tables(["key", "caption"]):
            at = np.flatnonzero(pc.is_in(pairs["caption"], captions))
            for row, pair in zip((first + at).tolist(), pairs.take(at).to_pylist(), strict=True):
                named = stripped(pair["key"]), pair["caption"]
                if named in verdicts:
                    of_pairs[row] = VERDICTS[verdicts[named]]
                    rows.setdefault(named, row)
            first += len(pairs)
            bar.update(len(pairs))
    return ByHand(verdicts, rows, of_pairs)


def _verdicts(file: Path) -> dict[Pair, str]:
    """Each line's verdict, by key and caption."""
    found, places = dict[Pair, str](), dict[Pair, str]()
    for place, cells in read_table(file, ("verdict",), ("caption",), optional=[KEY_COLUMNS]):
        if cells is None:
            raise UserError(f"{file}, {place}: more or fewer cells than the header has; mend the line")
        verdict, caption, key = cells
        if key is None:
            raise UserError(f"{file}: no column is named key; give the file as audit.html hands it out")
        if verdict not in VERDICTS:
            raise UserError(f"{file}, {place}: verdict {verdict!r}; write right or wrong, or remove the line")
        if found.setdefault((key, caption), verdict) != verdict:
            raise UserError(
                f"{file}, {place}: pair {key!r} with {caption!r} is {verdict}, but {found[key, caption]} by"
                f" {places[key, caption]}; remove one of them"
            )
        places.setdefault((key, caption), place)
    return found
