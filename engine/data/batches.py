"""Batches: packed texts, frozen features, the bank of frozen rows, and which columns are no negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .. import _loader
from .store import Edges, TextStore, ranges

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
        return Segments(moved(self.cu_seqlens, device), self.groups, self.longest)


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
    # int64 [M], where a picture may come twice: equal pictures are none, either.
    image_ids_M: torch.Tensor | None = None
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

    The frozen tower never changes, so a row never goes stale. Only the integers are state. No step reads the store or
    takes time in the size of the bank.
    """

    def __init__(self, table: FrozenTable, size: int, seed: int, device: torch.device | None = None) -> None:
        self.table, self.device = table, device or torch.device("cpu")
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3])))
        self.ids = np.sort(generator.choice(len(table), min(size, len(table)), replace=False, shuffle=False))
        self.cursor = 0
        self._load()

    def _load(self) -> None:
        self.features_QD = self.table.rows(self.ids).to(self.device)
        # Where each row of the store lies in the bank, -1 for nowhere.
        self._slot_of = np.full(len(self.table) if len(self.ids) else 0, -1, np.int32)
        self._slot_of[self.ids] = np.arange(len(self.ids))
        # Slots that `add_to` has filled with other rows, and their own.
        self._covered: tuple[torch.Tensor, torch.Tensor] | None = None

    def add_to(self, batch: Batch, edges: Edges) -> None:
        """Give `batch` the rows that it does not hold already, and, by `edges`, the columns that are no negatives.

        These rows are the bank's own memory: they stand until the next call of `add_to` or `push`.
        """
        self._uncover()
        cells = [_loader.linked_pairs(*edges, batch.trained_ids_M, batch.frozen_ids_N, batch.first)]
        if len(self.ids):
            inside = self._slot_of[batch.frozen_ids_N]
            inside = np.unique(inside[inside >= 0]).astype(np.int64)
            # Rows of the batch in the first n slots make room for others in the last ones, and come back afterwards.
            n = len(self.ids) - len(inside)
            behind = np.ones(len(inside), bool)
            behind[inside[inside >= n] - n] = False
            holes, others = inside[inside < n], n + np.flatnonzero(behind)
            if len(holes):
                hole_H, other_H = (moved(torch.from_numpy(slots), self.device) for slots in (holes, others))
                self._covered = hole_H, self.features_QD.index_select(0, hole_H)
                self.features_QD.index_copy_(0, hole_H, self.features_QD.index_select(0, other_H))
            batch.bank_QD = self.features_QD[:n]
            self._slot_of[self.ids[inside]], self._slot_of[self.ids[others]] = -1, holes
            rows, columns = self._linked(edges, batch.trained_ids_M)
            self._slot_of[self.ids[inside]], self._slot_of[self.ids[others]] = inside, others
            cells.append((rows, columns + len(batch.frozen_ids_N)))
        rows, columns = (np.concatenate(part) for part in zip(*cells, strict=True))
        batch.excluded = torch.from_numpy(rows), torch.from_numpy(columns)

    def _uncover(self) -> None:
        if self._covered is not None:
            hole_H, row_HD = self._covered
            self.features_QD.index_copy_(0, hole_H, row_HD)
            self._covered = None

    def _linked(self, edges: Edges, left_ids: IntArray) -> tuple[IntArray, IntArray]:
        """(rows, slots) of the edges from `left_ids` into the bank, found from the edges: the bank is far longer."""
        indptr, indices = edges
        first, counts = indptr[left_ids], indptr[left_ids + 1] - indptr[left_ids]
        rows = np.repeat(np.arange(len(left_ids)), counts)
        slots = self._slot_of[indices[ranges(first, counts)]]
        found = slots >= 0
        return rows[found], slots[found].astype(np.int64)

    def push(self, ids_N: IntArray, trained_N: npt.NDArray[np.bool_], frozen_ND: torch.Tensor) -> None:
        """Put those rows of the batch of all ranks that are `trained` in the place of the oldest ones.

        `frozen_ND` are the rows of `ids_N`, as the store holds them.
        """
        self._uncover()
        places = np.flatnonzero(trained_N)
        new, first = np.unique(ids_N[places], return_index=True)
        absent = self._slot_of[new] < 0
        new, places = new[absent][: len(self.ids)], places[first[absent]][: len(self.ids)]
        if len(new) == 0:
            return
        slots = (self.cursor + np.arange(len(new))) % len(self.ids)
        self._slot_of[self.ids[slots]] = -1
        self.ids[slots] = new
        self._slot_of[new] = slots
        to_K, from_K = (moved(torch.from_numpy(part), self.device) for part in (slots, places))
        self.features_QD.index_copy_(0, to_K, frozen_ND.index_select(0, from_K))
        self.cursor = int((self.cursor + len(new)) % len(self.ids))

    def state(self) -> dict[str, Any]:
        return {"ids": self.ids, "cursor": np.int64(self.cursor)}

    def restore(self, state: dict[str, Any]) -> None:
        self.ids, self.cursor = state["ids"].copy(), int(state["cursor"])
        self._load()


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to CUDA by way of pinned memory, so that the copy is not waited for."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def packed_inputs(captions: PackedTexts) -> dict[str, Any]:
    """Arguments of the model for one packed row of captions."""
    return {
        "texts": torch.from_numpy(captions.order),
        "input_ids": captions.input_ids,
        "position_ids": captions.position_ids,
        "segments": Segments.of(captions.cu_seqlens),
    }
