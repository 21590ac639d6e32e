"""Batches: packed texts, frozen features, the bank of frozen rows, and which columns are no negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .. import _loader
from .store import Edges, TextStore

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Where the texts of a packed row lie. `groups` are runs of texts of equal length: (first token, texts, length)."""

    cu_seqlens: torch.Tensor  # int32 [texts + 1]
    groups: tuple[tuple[int, int, int], ...]
    longest: int

    @classmethod
    def of(cls, cu_seqlens: npt.NDArray[np.int32]) -> Segments:
        """Segments from boundaries int32 [texts + 1]; neighbours of equal length share one attention call on CPUs."""
        lengths = np.diff(cu_seqlens)
        changes = np.flatnonzero(np.diff(lengths)) + 1
        first = np.concatenate([[0], changes])
        counts = np.diff(np.concatenate([first, [len(lengths)]]))
        groups = tuple((int(cu_seqlens[f]), int(n), int(lengths[f])) for f, n in zip(first, counts, strict=True))
        return cls(torch.from_numpy(cu_seqlens), groups, int(lengths.max()))

    def to(self, device: torch.device) -> Segments:
        return Segments(self.cu_seqlens.to(device), self.groups, self.longest)


@dataclass
class PackedTexts:
    """Texts in one row without padding: ids and positions int64 [T]; `order[i]` is the segment of text i."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: npt.NDArray[np.int32]
    order: IntArray


def pack(texts: TextStore, ids: IntArray, max_tokens: int) -> PackedTexts:
    """Pack the texts `ids`, shortest first, so that texts of equal length share one attention call."""
    lengths = np.minimum(texts.offsets[ids + 1] - texts.offsets[ids], max_tokens)
    by_length = np.argsort(lengths, kind="stable")
    input_ids, position_ids, cu_seqlens = _loader.pack_tokens(texts.tokens, texts.offsets, ids[by_length], max_tokens)
    order = np.empty(len(ids), np.int64)
    order[by_length] = np.arange(len(ids))
    return PackedTexts(torch.from_numpy(input_ids), torch.from_numpy(position_ids), cu_seqlens, order)


@dataclass
class Batch:
    """One rank's share of a step: M pairs here, N on all ranks, Q bank rows, D width.

    `inputs` are the model's arguments for one micro-batch each. `weights_N` are 0 for re-auditioned pairs. Where both
    sides train there are no frozen rows, and no pair has a row in a store: those arrays are empty.
    """

    rows_N: IntArray
    weights_N: npt.NDArray[np.float32]
    frozen_ids_N: IntArray
    trained_ids_M: IntArray
    frozen_MD: torch.Tensor | None  # fp16 as the store holds them; None where both sides train
    weights_M: torch.Tensor
    inputs: list[dict[str, Any]]
    masked: int  # masked positions on this rank
    tokens: int  # on this rank, masked texts among them
    first: int  # place of this rank's first pair among the N
    bank_QD: torch.Tensor | None = None
    # (row, column) pairs that are no negatives; columns count over the N images of all ranks and then the bank.
    excluded: tuple[torch.Tensor, torch.Tensor] | None = None
    # int64 [M], where no store links pairs: equal captions are no negatives of each other.
    caption_ids_M: torch.Tensor | None = None
    keys: Sequence[str] = ()


class BatchLoader(Protocol):
    """What the trainer asks of the loader of its batches; an iterator of them, by epochs."""

    epoch: int
    epoch_step: int
    kept: npt.NDArray[np.bool_]
    """bool [pairs of the source], those an epoch trains on; set between epochs."""

    @property
    def kept_share(self) -> float:
        """Of the pairs, those that the epoch trains on."""

    @property
    def ended(self) -> bool:
        """Whether this rank has no batch left in the epoch."""

    def __next__(self) -> Batch: ...

    def next_epoch(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class FrozenTable:
    """The frozen features, fp16 [n, D] in memory or mapped; `rows` gathers some, fp16 as they are."""

    def __init__(self, features: npt.NDArray[np.float16]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(_loader.gather_rows(self.features, ids))


class Bank:
    """Frozen rows that text->image sees beyond the batch: store rows in a ring, the same on all ranks, none twice.

    The frozen tower never changes, so a row never goes stale. Only the integers are state.
    """

    def __init__(self, table: FrozenTable, size: int, seed: int, device: torch.device | None = None) -> None:
        self.table, self.device = table, device
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3])))
        self.ids = np.sort(generator.choice(len(table), min(size, len(table)), replace=False, shuffle=False))
        self.cursor = 0
        self._load()

    def _load(self) -> None:
        self.features_QD = self.table.rows(self.ids).to(self.device)
        self._present = np.zeros(len(self.table), bool)
        self._present[self.ids] = True

    def add_to(self, batch: Batch, edges: Edges) -> None:
        """Give `batch` the rows that it does not hold already, and, by `edges`, the columns that are no negatives."""
        columns = batch.frozen_ids_N
        if len(self.ids):
            # Rows in the batch count as absent for a moment: nothing here takes time in the size of the store.
            inside = columns[self._present[columns]]
            self._present[inside] = False
            chosen = np.flatnonzero(self._present[self.ids])
            self._present[inside] = True
            batch.bank_QD = self.features_QD[torch.from_numpy(chosen).to(self.device)]
            columns = np.concatenate([columns, self.ids[chosen]])
        rows, excluded = _loader.linked_pairs(*edges, batch.trained_ids_M, columns, batch.first)
        batch.excluded = torch.from_numpy(rows), torch.from_numpy(excluded)

    def push(self, ids_N: IntArray) -> None:
        """Put the batch's rows in the place of the oldest ones."""
        new = np.unique(ids_N)
        new = new[~self._present[new]][: len(self.ids)]
        if len(new) == 0:
            return
        slots = (self.cursor + np.arange(len(new))) % len(self.ids)
        self._present[self.ids[slots]] = False
        self.ids[slots] = new
        self._present[new] = True
        self.features_QD[torch.from_numpy(slots).to(self.device)] = self.table.rows(new).to(self.device)
        self.cursor = int((self.cursor + len(new)) % len(self.ids))

    def state(self) -> dict[str, Any]:
        return {"ids": self.ids, "cursor": np.int64(self.cursor)}

    def restore(self, state: dict[str, Any]) -> None:
        self.ids, self.cursor = state["ids"].copy(), int(state["cursor"])
        self._load()


def packed_inputs(captions: PackedTexts) -> dict[str, Any]:
    """Arguments of the model for one packed row of captions."""
    return {
        "texts": torch.from_numpy(captions.order),
        "input_ids": captions.input_ids,
        "position_ids": captions.position_ids,
        "segments": Segments.of(captions.cu_seqlens),
    }
