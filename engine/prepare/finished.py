"""Finished parts as a store is put together of them, some thousands of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..data.store import Store, ranges
from ..errors import UserError
from .parts import CAPTION_IDS, IMAGE_ID, bytes_of, features_file, tables_of, width_of
from .tokens import TOKENS, Flat


class Rows(NamedTuple):
    """Some rows of a part: `table` has the columns; `places` int [rows] are where their features stand in `features`
    fp16 [any, D]; the tokens of caption i of all their captions are `lengths[i]` of `tokens` from `starts[i]` on."""

    table: pa.Table
    features: npt.NDArray[np.float16]
    places: npt.NDArray[np.integer[Any]]
    tokens: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def tokens_of(self, captions: npt.NDArray[np.int64]) -> Flat:
        """Those of these captions end to end, and how many each has."""
        starts, lengths = self.starts[captions], self.lengths[captions]
        return self.tokens[ranges(starts, lengths)], lengths


@dataclass(frozen=True)
class Finished:
    """`file`: a part, or the origin of one, whose features are in the `store` that was made of it. `tokens`: the file
    of its captions' tokens; None: these are there, too."""

    file: Path
    tokens: Path | None
    store: Store | None = None

    def rows(self, token_dtype: np.dtype[Any]) -> Iterator[Rows]:
        tokenized = iter(()) if self.tokens is None else tables_of([self.tokens])
        first, own = 0, None
        for table in tables_of([self.file]):
            if self.store is None:
                own = self._own() if own is None else own
                features, places = own, np.arange(first, first := first + len(table))
            else:
                features, places = self.store.features, table[IMAGE_ID].to_numpy()
            if (tokens := next(tokenized, None)) is not None:
                flat = bytes_of(tokens[TOKENS]).view(token_dtype)
                lengths = pc.binary_length(tokens[TOKENS]).to_numpy().astype(np.int64) // token_dtype.itemsize
                yield Rows(table, features, places, flat, np.cumsum(lengths) - lengths, lengths)
            elif self.store is not None:
                ids = bytes_of(table[CAPTION_IDS]).view(np.int32)
                starts = self.store.offsets[ids]
                yield Rows(table, features, places, self.store.tokens, starts, self.store.offsets[ids + 1] - starts)
            else:
                raise UserError(f"part {self.file}: has no tokens; remove it and run the same command again")

    def _own(self) -> npt.NDArray[np.float16]:
        return np.memmap(features_file(self.file), np.float16, "r").reshape(-1, width_of(self.file))
