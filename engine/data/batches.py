"""Batches: which pairs a step trains on, and their packed tokens, frozen features and forbidden negatives.

Everything is a function of (seed, epoch, step) and of the kept pairs, never of the rank: each rank computes the whole
global batch's row numbers and takes its slice, so any world size sees the same pairs in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import _loader
from ..errors import UserError
from .store import Store, TextStore, edges

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


@dataclass(frozen=True)
class GlobalBatch:
    """Pair rows of one step over all ranks, the kept pairs and the re-auditioned ones among them."""

    rows_N: IntArray
    weights_N: npt.NDArray[np.float32]


class EpochPlan:
    """The order of one epoch: kept pairs shuffled, with a share of each batch given to dropped pairs at weight 0."""

    def __init__(
        self, *, kept: npt.NDArray[np.bool_], batch_size: int, reaudition_share: float, seed: int, epoch: int
    ) -> None:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, 1])))
        self.trained = generator.permutation(np.flatnonzero(kept))
        self.dropped = generator.permutation(np.flatnonzero(~kept))
        self.auditions = min(round(batch_size * reaudition_share), len(self.dropped))
        self.batch_size = batch_size
        self.steps = len(self.trained) // (batch_size - self.auditions)
        if self.steps == 0:
            raise UserError(
                f"training.batch_size: {batch_size} pairs, but only {len(self.trained)} are left to train on;"
                " lower it, or let confidence.selection drop less"
            )

    def batch(self, step: int) -> GlobalBatch:
        """Rows of the epoch's step; the last incomplete batch of an epoch is left out, another one each epoch."""
        n = self.batch_size - self.auditions
        trained = self.trained[step * n : (step + 1) * n]
        again = np.arange(step * self.auditions, (step + 1) * self.auditions) % max(len(self.dropped), 1)
        weights = np.ones(self.batch_size, np.float32)
        weights[n:] = 0
        return GlobalBatch(np.concatenate([trained, self.dropped[again]]), weights)


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
class MaskedTexts:
    """Packed unpaired texts with MLM masks: positions int64 [K] into the row, labels int64 [K]."""

    packed: PackedTexts
    positions: torch.Tensor
    labels: torch.Tensor


class MaskedTextBatches:
    """Unpaired texts in a shuffled endless stream; masks are keyed by (seed, pass, text), never by rank."""

    def __init__(
        self, texts: TextStore, *, texts_per_batch: int, mask_share: float, max_tokens: int, seed: int
    ) -> None:
        if len(texts) < texts_per_batch:
            raise UserError(f"mlm.texts_per_batch: {texts_per_batch}, but store {texts.path} holds {len(texts)} texts")
        self.texts, self.texts_per_batch = texts, texts_per_batch
        self.mask_share, self.max_tokens, self.seed = mask_share, max_tokens, seed
        self.special = np.array(texts.manifest["special_tokens"])
        self.mask_token, self.vocabulary = texts.manifest["mask_token"], texts.manifest["vocabulary"]
        self.steps_per_pass = len(texts) // texts_per_batch
        self._pass, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int, rank: int, world_size: int) -> MaskedTexts:
        """This rank's masked texts of the global step `step`."""
        number, offset = divmod(step, self.steps_per_pass)
        if number != self._pass:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, number, 2])))
            self._pass, self._order = number, generator.permutation(len(self.texts))
        rows = self._order[offset * self.texts_per_batch : (offset + 1) * self.texts_per_batch]
        ids = np.array_split(rows, world_size)[rank]
        packed = pack(self.texts, ids, self.max_tokens)
        input_ids = packed.input_ids.numpy()
        positions, labels = [], []
        for text, segment in zip(ids, packed.order, strict=True):
            start, end = packed.cu_seqlens[segment], packed.cu_seqlens[segment + 1]
            chosen, tokens = self._mask(input_ids[start:end], int(text), number)
            positions.append(start + chosen)
            labels.append(input_ids[start + chosen].copy())
            input_ids[start + chosen] = tokens
        return MaskedTexts(
            packed,
            torch.from_numpy(np.concatenate([*positions, np.empty(0, np.int64)]).astype(np.int64)),
            torch.from_numpy(np.concatenate([*labels, np.empty(0, np.int64)]).astype(np.int64)),
        )

    def _mask(self, tokens: IntArray, text: int, number: int) -> tuple[IntArray, IntArray]:
        """Chosen positions and what stands there: 80 % mask, 10 % a random token, 10 % the token itself (BERT)."""
        generator = np.random.Generator(np.random.Philox(key=[(self.seed << 32) + number, text]))
        ordinary = np.flatnonzero(~np.isin(tokens, self.special))
        if len(ordinary) == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        count = max(1, round(len(ordinary) * self.mask_share))
        chosen = np.sort(generator.choice(ordinary, count, replace=False))
        action = generator.random(count)
        random = generator.integers(0, self.vocabulary, count)
        replaced = np.where(action < 0.8, self.mask_token, np.where(action < 0.9, random, tokens[chosen]))
        return chosen, replaced


@dataclass
class Batch:
    """One rank's share of a step: M pairs here, N on all ranks, Q bank rows, D width.

    `inputs` are the model's arguments for one micro-batch each; `excluded` holds (row, column) pairs that are no
    negatives, columns counted over the N images of all ranks and then the bank.
    """

    inputs: list[dict[str, Any]]
    frozen_MD: torch.Tensor
    bank_QD: torch.Tensor | None
    excluded: tuple[torch.Tensor, torch.Tensor]
    weights_M: torch.Tensor
    masked: int
    tokens: int
    whole: GlobalBatch


class FrozenTable:
    """The frozen features, fp16 [n, D] in memory or mapped; `rows` gathers some as fp32."""

    def __init__(self, features: npt.NDArray[np.float16]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(_loader.gather_rows(self.features, ids)).float()


class Bank:
    """Frozen rows that text->image sees beyond the batch: store rows in a ring, the same on all ranks, none twice.

    The frozen tower never changes, so a row never goes stale. Only the integers are state.
    """

    def __init__(self, table: FrozenTable, size: int, seed: int, device: torch.device | None = None) -> None:
        self.table, self.device = table, device
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 3])))
        self.ids = np.sort(generator.permutation(len(table))[:size])
        self.cursor = 0
        self._load()

    def _load(self) -> None:
        self.features_QD = self.table.rows(self.ids).to(self.device)
        self._present = np.zeros(len(self.table), bool)
        self._present[self.ids] = True

    def outside(self, ids_N: IntArray) -> tuple[IntArray, torch.Tensor | None]:
        """Ids and features of the bank rows that are not in the batch already."""
        if len(self.ids) == 0:
            return self.ids, None
        in_batch = np.zeros(len(self.table), bool)
        in_batch[ids_N] = True
        chosen = np.flatnonzero(~in_batch[self.ids])
        return self.ids[chosen], self.features_QD[torch.from_numpy(chosen).to(self.device)]

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


class PairSource:
    """What the trainer reads: pairs between a trained side and frozen rows. Subclasses make the trained inputs."""

    def __init__(
        self, *, trained_ids: IntArray, frozen_ids: IntArray, features: npt.NDArray[np.float16], n_trained: int
    ) -> None:
        self.trained_ids, self.frozen_ids = trained_ids, frozen_ids
        self.table = FrozenTable(features)
        self.edges = edges(trained_ids, frozen_ids, n_trained)

    def __len__(self) -> int:
        return len(self.trained_ids)

    def names(self, rows: IntArray) -> list[str]:
        """How a user finds these pairs again."""
        raise NotImplementedError

    def inputs(self, rows_M: IntArray, step: int, rank: int, world_size: int) -> tuple[list[dict[str, Any]], int, int]:
        """Arguments of the model for each micro-batch, the masked positions and the tokens among them."""
        raise NotImplementedError

    def batch(self, whole: GlobalBatch, bank: Bank, step: int, rank: int, world_size: int) -> Batch:
        """This rank's slice of a global batch."""
        m = len(whole.rows_N) // world_size
        mine = slice(rank * m, (rank + 1) * m)
        rows_M, frozen_N = whole.rows_N[mine], self.frozen_ids[whole.rows_N]
        bank_ids, bank_QD = bank.outside(frozen_N)
        rows, columns = _loader.linked_pairs(
            *self.edges, self.trained_ids[rows_M], np.concatenate([frozen_N, bank_ids]), rank * m
        )
        inputs, masked, tokens = self.inputs(rows_M, step, rank, world_size)
        return Batch(
            inputs=inputs,
            frozen_MD=self.table.rows(frozen_N[mine]),
            bank_QD=bank_QD,
            excluded=(torch.from_numpy(rows), torch.from_numpy(columns)),
            weights_M=torch.from_numpy(whole.weights_N[mine]),
            masked=masked,
            tokens=tokens,
            whole=whole,
        )


class CaptionPairs(PairSource):
    """Captions against the frozen features of a store, with masked unpaired texts packed behind them."""

    def __init__(
        self,
        store: Store,
        *,
        max_tokens: int,
        micro_batch_size: int | None = None,
        masked_texts: MaskedTextBatches | None = None,
    ) -> None:
        super().__init__(
            trained_ids=store.caption_ids,
            frozen_ids=store.image_ids,
            features=store.features,
            n_trained=len(store.offsets) - 1,
        )
        self.store, self.max_tokens = store, max_tokens
        self.micro_batch_size, self.masked_texts = micro_batch_size, masked_texts

    def names(self, rows: IntArray) -> list[str]:
        return self.store.pairs()["key"].take(rows).to_pylist()

    def inputs(self, rows_M: IntArray, step: int, rank: int, world_size: int) -> tuple[list[dict[str, Any]], int, int]:
        size = self.micro_batch_size or len(rows_M)
        masked = None if self.masked_texts is None else self.masked_texts.batch(step, rank, world_size)
        inputs = []
        for start in range(0, len(rows_M), size):
            ids = self.trained_ids[rows_M[start : start + size]]
            last = start + size >= len(rows_M)
            inputs.append(packed_inputs(pack(self.store, ids, self.max_tokens), masked if last else None))
        tokens = sum(len(arguments["input_ids"]) for arguments in inputs)
        return inputs, 0 if masked is None else len(masked.labels), tokens


def packed_inputs(captions: PackedTexts, masked: MaskedTexts | None = None) -> dict[str, Any]:
    """Arguments of the model for one packed row of captions, with masked texts behind them."""
    input_ids, position_ids, cu_seqlens = captions.input_ids, captions.position_ids, captions.cu_seqlens
    arguments: dict[str, Any] = {"texts": torch.from_numpy(captions.order)}
    if masked is not None:
        arguments["masked_positions"] = masked.positions + len(input_ids)
        arguments["masked_labels"] = masked.labels
        input_ids = torch.cat([input_ids, masked.packed.input_ids])
        position_ids = torch.cat([position_ids, masked.packed.position_ids])
        cu_seqlens = np.concatenate([cu_seqlens, cu_seqlens[-1] + masked.packed.cu_seqlens[1:]])
    return {**arguments, "input_ids": input_ids, "position_ids": position_ids, "segments": Segments.of(cu_seqlens)}
