"""The ranks of one `prepare`: rank 0 decides who makes which part, and hears what became of it.

They meet in a few words, never in a collective, which would give up while one of them works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import UserError
from ..stopping import GOES_ON

POLL_SECONDS = 0.1
SILENT_SECONDS = 120


class Words(Protocol):
    """As torch's stores have them."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class Ranks:
    """This rank among `world`; without `words` it is alone. `signs` counts a rank's signs of life."""

    def __init__(
        self,
        words: Words | None = None,
        rank: int = 0,
        world: int = 1,
        signs: Callable[[int], int] = lambda rank: 0,
    ) -> None:
        self.rank, self.world = rank, world
        self._words, self._signs = words, signs
        self._said: dict[str, Any] = {}
        self._counted = 0

    def tell(self, name: str, word: Any) -> None:
        """`word`, as JSON can hold it, to whoever asks for that name."""
        self._said[name] = word
        if self._words is not None:
            self._words.set(name, json.dumps(word, ensure_ascii=False))

    def hear(self, name: str, of: int = 0) -> Any:
        """What rank `of` tells by that name; waits for it as long as that rank lives."""
        if name not in self._said and self._words is not None:
            signs, heard = -1, time.monotonic()
            while not self._words.check([name]):
                time.sleep(POLL_SECONDS)
                # Rank 0's end is every rank's end.
                if of > 0 and (now := self._signs(of)) != signs:
                    signs, heard = now, time.monotonic()
                if of > 0 and time.monotonic() > heard + SILENT_SECONDS:
                    raise UserError(f"rank {of}: silent for {SILENT_SECONDS} s; {GOES_ON}")
            self._said[name] = json.loads(self._words.get(name))
        return self._said[name]

    def count_bad_shard(self) -> int:
        """How many shards all ranks have left out by now, with this one."""
        self._counted += 1
        return self._counted if self._words is None else self._words.add("bad shards", 1)


def dealt(parts: Sequence[int], sizes: Sequence[int], world: int) -> list[list[int]]:
    """Each rank's share of `parts`, in their order: the largest first, each to whom the least was dealt."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for part in sorted(parts, key=lambda part: -sizes[part]):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += max(1, sizes[part])
    return [sorted(share) for share in shares]
