"""What the C++ reader asks of Python while it reads: shards that are elsewhere, and the indexes of tars.

Shards are fetched by threads, a few ahead in the order in which they will be read. An index tells where the samples of
a tar begin: it is written when a tar was read to its end, and then leads to any sample without the headers before it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest

from ..errors import ShardError, UserError
from .sources import Source

AHEAD = 4  # shards on their way or here, beside the one that is read
RECORD = 512
Answer = tuple[bytes, dict[str, Any] | None, Any] | str

_living: WeakSet[Ahead] = WeakSet()


class Ahead:
    """The keeper of `_loader.ImageLoader`, for one pass over `parts`.

    `indexes`: the folder of the tars' indexes; None: there are none. A process that ends waits for no fetch.
    """

    def __init__(self, parts: Sequence[Source], indexes: Path | None) -> None:
        # Those that were fetched tell of their pictures' places as they lie here.
        self.parts = list(parts)
        self._indexes = indexes
        # What ends the pass, if it is none of the reader's own errors.
        self.failure: UserError | None = None
        self._files: dict[int, Path | None] = {}
        self._coming: dict[int, Future[Answer]] = {}
        self._stopped = Event()
        _living.add(self)

    def stop(self) -> None:
        """End what waits for a fetch, and the fetches."""
        self._stopped.set()

    def fetch(self, shard: int, following: Sequence[int]) -> Answer:
        """(path, columns, owner) of a shard, or why it cannot be had."""
        for number in (shard, *following[:AHEAD]):
            if number not in self._coming:
                self._coming[number] = Future()
                Thread(target=self._bring, args=(number, self._coming[number]), daemon=True).start()
        coming = self._coming[shard]
        while not coming.done():
            if self._stopped.is_set():
                return f"shard {self.parts[shard].path}: the fetch was stopped"
            with suppress(TimeoutError):
                coming.exception(timeout=0.1)
        # Asked for again it is fetched again: what is held here stays on the disk.
        del self._coming[shard]
        try:
            return coming.result()
        except UserError as error:
            self.failure = error
            raise

    def index(self, shard: int) -> npt.NDArray[np.uint32] | None:
        """uint32 [samples] of a tar: 512-byte records of each; None where there is none, or of another tar."""
        self._files[shard] = file = self._file(shard)
        if file is None:
            return None
        with suppress(OSError):
            content = file.read_bytes()
            if content[:8] == xxh3_64_digest(content[8:]):
                return np.frombuffer(content, np.uint32, offset=8)
        return None

    def keep(self, shard: int, records: npt.NDArray[np.uint32]) -> None:
        """Without room for it, the next reader walks along the headers, too."""
        file = self._file(shard)
        # Of a tar that changed while it was read, it may be an index of neither.
        if file is None or file != self._files.get(shard):
            return
        with suppress(OSError):
            content = records.tobytes()
            file.parent.mkdir(parents=True, exist_ok=True)
            # Other ranks may write the same one.
            aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
            aside.write_bytes(xxh3_64_digest(content) + content)
            os.replace(aside, file)

    def _file(self, shard: int) -> Path | None:
        known = None if self._indexes is None else self.parts[shard].identity(self._stopped)
        if self._indexes is None or known is None:
            return None
        return self._indexes / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.index"

    def _bring(self, shard: int, coming: Future[Answer]) -> None:
        part = self.parts[shard]
        try:
            if part.unpack is not None and part.listing is not None:
                listing = part.unpack(part.listing, self._stopped)
                self.parts[shard] = replace(part, listing=replace(listing, memory=None))
                coming.set_result((b"", listing.columns(), listing.memory))
            elif part.fetch is not None:
                file = part.fetch(self._stopped)
                coming.set_result((os.fsencode(f"/proc/self/fd/{file.fileno()}"), None, file))
        except ShardError as error:
            coming.set_result(str(error))
        except BaseException as error:
            coming.set_exception(error)


@atexit.register
def _stop_all() -> None:
    for ahead in _living:
        ahead.stop()
