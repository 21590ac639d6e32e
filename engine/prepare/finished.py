"""Finished parts as a store is put together of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.store import Store, ranges
from ..errors import UserError
from .parts import CAPTION_IDS, IMAGE_ID, ROWS_AT_ONCE, bytes_of, features_file, tables_of, width_of
from .tokens import TOKENS, Flat


@dataclass(frozen=True)
class Finished:
    """`file`: a part, or the origin of one, whose features are in the `store` that was made of it. `tokens`: the file
    of its captions' tokens; None: these are there, too."""

    file: Path
    tokens: Path | None
    store: Store | None = None

    def features(self, chosen: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.float16]]:
        """fp16 [any, D] of the rows that are `chosen`, bool [rows], in order, some thousands at a time."""
        places: npt.NDArray[np.integer[Any]] = np.flatnonzero(chosen)
        if not len(places):
            return
        if self.store is None:
            held_KD = np.memmap(features_file(self.file), np.float16, "r").reshape(-1, width_of(self.file))
        else:
            held_KD = self.store.features
            places = pq.read_table(self.file, columns=[IMAGE_ID])[IMAGE_ID].to_numpy()[places]
        for start in range(0, len(places), ROWS_AT_ONCE):
            yield held_KD[places[start : start + ROWS_AT_ONCE]]

    def tokens_of(self, chosen: npt.NDArray[np.bool_], token_dtype: np.dtype[Any]) -> Iterator[Flat]:
        """The tokens of those of all its captions, end to end, that are `chosen`, bool [captions], some thousands at a
        time, and how many each has."""
        first = 0
        for table in tables_of([self.tokens or self.file], [TOKENS if self.tokens else CAPTION_IDS]):
            if self.tokens is not None:
                flat: npt.NDArray[Any] = bytes_of(table[TOKENS]).view(token_dtype)
                lengths = pc.binary_length(table[TOKENS]).to_numpy().astype(np.int64) // token_dtype.itemsize
                starts = np.cumsum(lengths) - lengths
            elif self.store is None:
                raise UserError(f"part {self.file}: has no tokens; remove it and run the same command again")
            else:
                ids = bytes_of(table[CAPTION_IDS]).view(np.int32)
                flat, starts = self.store.tokens, self.store.offsets[ids]
                lengths = self.store.offsets[ids + 1] - starts
            here = np.flatnonzero(chosen[first : (first := first + len(lengths))])
            yield flat[ranges(starts[here], lengths[here])], lengths[here]
