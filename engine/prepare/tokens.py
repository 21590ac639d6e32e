"""Tokens of parts' captions: made by the rank that makes the part, and kept as long as part and tokenizer stay.

STORE.partial/tokens-OF-BY-SHA.parquet    by digests of the part's content, of the tokenizer and of its own
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ..data.store import Store, ranges
from ..errors import writing
from ..files.digests import digest_of, is_named_by
from ..hardware import cores_of_rank
from .parts import CAPTION_IDS, OPTIONS, binary_of, tables_of
from .writer import token_dtype

TOKENS = "tokens"
SCHEMA = pa.schema([(TOKENS, pa.binary())])
Flat = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


class Tokens:
    """Makes the tokens of parts, one part at a time, beside whatever else the rank does."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, by: str) -> None:
        """`by`: the fingerprint of the tokenizer."""
        # Its own threads are those of this rank.
        os.environ.setdefault("RAYON_NUM_THREADS", str(cores_of_rank()))
        self._folder, self.tokenizer, self._by = folder, _uncut(tokenizer), by
        self._dtype = token_dtype(len(tokenizer))
        self._beside, self._ended = ThreadPoolExecutor(1), Event()
        self._coming: dict[int, Future[str]] = {}
        self._last: Future[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beside.shutdown(cancel_futures=True)

    def begin(self, at: int, part: Path) -> None:
        """Those of the part of that number, or of its origin; an error with those of the part before is raised here."""
        if self._last is not None:
            self._last.result()
        self._last = self._coming[at] = self._beside.submit(self._make, part)

    def files(self) -> dict[int, str]:
        """Names of the files by the numbers of the parts, once all are made."""
        return {at: coming.result() for at, coming in self._coming.items()}

    def are_in(self, origin: Path, store: Store) -> bool:
        """Whether `store` tells which of its tokens, if by this tokenizer, `origin` has; earlier versions did not."""
        return store.manifest["tokenizer"] == self._by and CAPTION_IDS in pq.read_schema(origin).names

    def _make(self, part: Path) -> str:
        name = f"{TOKENS}-{part.stem.rpartition('-')[2]}-{self._by}"
        for file in self._folder.glob(f"{name}-*.parquet"):
            if is_named_by(file):
                return file.name
            file.unlink()
        aside = self._folder / f".{name}-{os.getpid()}.partial"
        try:
            with writing(self._folder), pq.ParquetWriter(aside, SCHEMA, **OPTIONS) as writer:
                for flat, lengths in self._of_captions(part):
                    writer.write_table(self._table(flat, lengths), row_group_size=max(1, len(lengths)))
            # Not fsynced: what a power cut breaks is told by the digest, and made again in seconds.
            file = self._folder / f"{name}-{digest_of(aside)}.parquet"
            os.replace(aside, file)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        return file.name

    def _of_captions(self, part: Path) -> Iterator[Flat]:
        for table in tables_of([part], ["captions"]):
            if self._ended.is_set():
                raise InterruptedError
            # A caption on many pictures is tokenized once.
            texts = pc.list_flatten(table["captions"].combine_chunks()).dictionary_encode()
            flat, lengths = tokens_of(self.tokenizer, texts.dictionary.to_pylist())
            starts = np.cumsum(lengths) - lengths
            number = texts.indices.to_numpy()
            yield flat[ranges(starts[number], lengths[number])], lengths[number]

    def _table(self, flat: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> pa.Table:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return pa.table([binary_of(flat.astype(self._dtype, copy=False), ends)], schema=SCHEMA)


def _uncut(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same, but that it gives texts all of their tokens and no padding."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Flat:
    """The tokens of `texts` by a tokenizer that is `_uncut`, end to end, and how many each has."""
    if tokenizer.is_fast:
        lists = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    else:
        lists = tokenizer(texts)["input_ids"] if texts else []
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths
