"""Pairs to train on, and the loader that makes their batches ahead of the trainer, in C++ threads.

A batch is a function of (seed, epoch, step) and of the kept pairs, never of rank or thread: each rank knows the whole
global batch's rows and takes its slice, so any world size sees the same pairs in the same order.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import _loader
from ..config import Config
from ..errors import UserError
from .batches import Batch, BatchLoader, FrozenTable, IntArray, Segments
from .store import Edges, Sources, Store, TextStore, edges
from .threaded import ThreadedLoader

SPECIAL, CONTINUING = 1, 2
# How often an epoch visits pairs: the group of each, uint8 [pairs], and the weight of each group, float64.
Weights = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class MaskedTexts:
    """Unpaired texts in a shuffled endless stream, masked as BERT does; masks are keyed by (seed, pass, text).

    `per_batch` texts of each global batch are packed behind the captions of a rank's first micro-batch: where gradients
    accumulate, ZeRO-3 keeps an old one of each weight that the first micro-batch does not use.
    """

    texts: TextStore
    per_batch: int
    mask_share: float = 0.15
    max_tokens: int = 64
    whole_words: bool = False

    def __post_init__(self) -> None:
        if len(self.texts) < self.per_batch:
            raise UserError(
                f"mlm.texts_per_batch: {self.per_batch}, but store {self.texts.path} holds {len(self.texts)} texts"
            )

    def arguments(self) -> dict[str, Any]:
        """What the C++ loader needs of them."""
        manifest = self.texts.manifest
        kinds = np.zeros(manifest["vocabulary"], np.uint8)
        if self.whole_words:
            # transformers takes seconds to import, and nothing else here needs it.
            from .tokenizer import load_tokenizer

            pieces = load_tokenizer(self.texts.path / "tokenizer").convert_ids_to_tokens(list(range(len(kinds))))
            kinds[[piece.startswith("##") for piece in pieces]] = CONTINUING
            if not kinds.any():
                raise UserError(f"mlm.whole_word: no token of {self.texts.path}'s tokenizer continues a word by ##")
        kinds[manifest["special_tokens"]] = SPECIAL
        return {
            "tokens": self.texts.tokens,
            "offsets": self.texts.offsets,
            "texts_per_batch": self.per_batch,
            "max_tokens": self.max_tokens,
            "token_kinds": kinds,
            "mask_token": manifest["mask_token"],
            "mask_share": self.mask_share,
            "whole_words": self.whole_words,
        }


def weighted(of: npt.NDArray[np.integer[Any]], weights: Sequence[float]) -> Weights | None:
    """Weights of pairs whose sources are `of`, numbers in `weights`; None where all are 1."""
    values, group = np.unique(np.asarray(weights, np.float64), return_inverse=True)
    if (values == 1).all():
        return None
    if len(values) > 256:
        raise UserError(f"data.sources: {len(values)} different weights; give 256 at most")
    return group.astype(np.uint8)[of], values


class PairSource:
    """Pairs between a trained side and frozen rows: ids int32 [pairs] of both, features fp16 [frozen rows, D]."""

    captions: TextStore | None = None
    masked: MaskedTexts | None = None
    weights: Weights | None = None
    by_hand: npt.NDArray[np.int8] | None = None
    """[pairs], what a person told of them: 1 right, -1 wrong, 0 nothing. Those that are wrong are never visited."""

    def __init__(
        self,
        *,
        trained_ids: npt.NDArray[np.int32],
        frozen_ids: npt.NDArray[np.int32],
        features: npt.NDArray[np.float16],
        edges: Edges,
    ) -> None:
        self.trained_ids, self.frozen_ids, self.edges = trained_ids, frozen_ids, edges
        self.table = FrozenTable(features)

    def __len__(self) -> int:
        return len(self.trained_ids)

    def names(self, rows: IntArray) -> list[str]:
        """How a user finds these pairs again."""
        raise NotImplementedError

    def by_source(self) -> Sources | None:
        """What the pairs are of, where that is told."""
        return None

    def inputs(self, trained_ids_M: IntArray, step: int, rank: int, world_size: int) -> dict[str, Any]:
        """The model's arguments, where the trained side is no text."""
        raise NotImplementedError

    def batches(self, config: Config, rank: int, world_size: int) -> BatchLoader:
        """The loader of a run."""
        training = config.training
        return PairLoader(
            self,
            batch_size=training.batch_size,
            reaudition_share=config.confidence.reaudition_share,
            max_tokens=training.max_caption_tokens,
            micro_batch_size=training.micro_batch_size,
            tokens_per_micro_batch=training.tokens_per_micro_batch,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )


class CaptionPairs(PairSource):
    """Captions against the frozen features of a store, with masked unpaired texts packed behind them.

    Of `rows` alone, int64 [pairs], where they are given: edges between other rows are unknown then. `weights`: how
    often an epoch visits the pairs of a source, by its name in the store, once if it is not named. `by_hand`, int8 of
    the store's pairs: as `PairSource.by_hand`.
    """

    def __init__(
        self,
        store: Store,
        masked: MaskedTexts | None = None,
        rows: IntArray | None = None,
        weights: Mapping[str, float] = MappingProxyType({}),
        by_hand: npt.NDArray[np.int8] | None = None,
    ) -> None:
        captions, images = store.caption_ids, store.image_ids
        if rows is not None:
            captions, images = captions[rows], images[rows]
        super().__init__(
            trained_ids=captions,
            frozen_ids=images,
            features=store.features,
            edges=store.caption_edges if rows is None else edges(captions, images, len(store.offsets) - 1),
        )
        self.captions, self.masked, self.store, self.rows = store, masked, store, rows
        of: npt.NDArray[np.integer[Any]] = np.zeros(len(self), np.uint8)
        visits = [1.0]
        if weights:
            found = self.by_source()
            if absent := [name for name in weights if name not in found.names]:
                raise UserError(
                    f"data.sources.{absent[0]}: store {store.path} has no such source; it has"
                    f" {', '.join(repr(name) for name in found.names[:20])}"
                )
            of, visits = found.of, [weights.get(name, 1.0) for name in found.names]
        if by_hand is not None:
            self.by_hand = by_hand if rows is None else by_hand[rows]
            of, visits = np.where(self.by_hand < 0, len(visits), of), [*visits, 0.0]
        self.weights = weighted(of, visits)

    def names(self, rows: IntArray) -> list[str]:
        return self.store.pairs(rows if self.rows is None else self.rows[rows], ["key"])["key"].to_pylist()

    def by_source(self) -> Sources:
        found = self.store.sources()
        return found if self.rows is None else replace(found, of=found.of[self.rows])


class PairLoader(ThreadedLoader):
    """Batches of a store's pairs, shuffled anew each epoch, made ahead by C++ threads; arrays are not copied.

        with PairLoader(Store(path), batch_size=4096, seed=1) as loader:
            for epoch in range(10):
                for batch in loader:
                    ...

    A `for` goes on where the last one stopped and ends with the epoch. A batch counts as consumed when it is handed
    out: `state()` is the position behind it, whatever was made ahead, and `restore()` goes there, also with another
    `world_size`. `batch_size` pairs count over all ranks; an epoch's last incomplete batch is left out.

    - kept: bool [pairs], the pairs an epoch trains on; may be set between two epochs. `reaudition_share` of each batch
      is given to the others, at weight 0.
    - max_tokens: longer captions are cut, their last token kept.
    - micro_batch_size, tokens_per_micro_batch: how `Batch.inputs` is split, by pairs or by tokens; all ranks get as
      many.
    - threads, prefetch: batches are the same for any number; `prefetch` finished ones wait at most.

    `waited_seconds` is the time spent waiting for batches. Raises UserError for settings that do not fit the store or
    a store whose files disagree, RuntimeError in a forked child.
    """

    def __init__(
        self,
        pairs: Store | PairSource,
        *,
        batch_size: int,
        kept: npt.NDArray[np.bool_] | None = None,
        reaudition_share: float = 0.0,
        max_tokens: int = 77,
        micro_batch_size: int | None = None,
        tokens_per_micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        prefetch: int = 4,
    ) -> None:
        super().__init__()
        self.source = CaptionPairs(pairs) if isinstance(pairs, Store) else pairs
        self.batch_size, self.reaudition_share, self.seed = batch_size, reaudition_share, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.epoch_step = self.step = 0
        captions, masked, local = self.source.captions, self.source.masked, max(batch_size // max(world_size, 1), 1)
        self._settings: dict[str, Any] = {
            "trained_ids": self.source.trained_ids,
            "frozen_ids": self.source.frozen_ids,
            "features": self.source.table.features,
            "captions": None if captions is None else (captions.tokens, captions.offsets),
            "masked": None if masked is None else masked.arguments(),
            "weights": self.source.weights,
            "batch_size": batch_size,
            "rank": rank,
            "world_size": world_size,
            "max_tokens": max_tokens,
            "pairs_per_micro_batch": micro_batch_size or local,
            "tokens_per_micro_batch": tokens_per_micro_batch or 0,
            "seed": seed,
            "threads": threads,
            "prefetch": prefetch,
        }
        weights = self.source.weights or ()
        self._weights_crc = zlib.crc32(b"".join(array.tobytes() for array in weights))
        by_hand = self.source.by_hand
        self._wrong_bits = None if by_hand is None else np.packbits(by_hand < 0, bitorder="little")
        if kept is None:
            bits = np.full(-(-len(self.source) // 8), 255, np.uint8)
            # Bits behind the last pair stay 0: they are counted.
            bits[-1:] >>= -len(self.source) % 8
            self._keep(bits)
        else:
            self.kept = kept

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Pairs that the epoch trains on, bool [pairs]; all others are re-auditioned at weight 0."""
        return np.unpackbits(self._kept_bits, count=len(self.source), bitorder="little").view(bool)

    @kept.setter
    def kept(self, kept: npt.NDArray[np.bool_]) -> None:
        if self.epoch_step != 0:
            raise ValueError(f"kept pairs may change between epochs only, and {self.epoch_step} batches are consumed")
        if kept.dtype != bool or kept.shape != (len(self.source),):
            raise ValueError(f"kept must be bool [{len(self.source)}], not {kept.dtype} {list(kept.shape)}")
        self._stop()
        self._keep(np.packbits(kept, bitorder="little"))

    def _keep(self, bits: npt.NDArray[np.uint8]) -> None:
        wrong = self._wrong_bits
        self._kept_bits = bits if wrong is None else bits & ~wrong
        # What is wrong is visited at its weight, 0, and would be a candidate of re-auditions otherwise.
        self._visited_bits = bits if wrong is None else bits | wrong
        self.kept_count = int(np.bitwise_count(self._kept_bits).sum(dtype=np.int64))
        dropped = len(self.source) - int(np.bitwise_count(self._visited_bits).sum(dtype=np.int64))
        self._auditions = min(round(self.batch_size * self.reaudition_share), dropped)
        self._steps: int | None = None
        if self.steps == 0:
            raise UserError(
                f"training.batch_size: {self.batch_size} pairs, but only {self._visits()} are left to train on;"
                " lower it, or let confidence.selection drop less"
            )

    @property
    def steps(self) -> int:
        """Batches in the whole epoch."""
        if self._steps is None:
            self._steps = self._visits() // (self.batch_size - self._auditions)
        return self._steps

    def _visits(self) -> int:
        """Of kept pairs in the epoch."""
        weights, pairs = self.source.weights, len(self.source)
        if weights is None:
            return self.kept_count
        return _loader.count_visits(self._kept_bits, weights, pairs, self.seed, self.epoch)

    @property
    def kept_share(self) -> float:
        return self.kept_count / len(self.source)

    @property
    def ended(self) -> bool:
        """Whether the epoch has no batch left."""
        return self.epoch_step == self.steps

    def __next__(self) -> Batch:
        if self.ended:
            self.next_epoch()
            raise StopIteration
        started = time.perf_counter()
        try:
            if self._threads is None:
                self._start()
            arrays = self._threads.next()
        except (IndexError, ValueError) as error:
            raise UserError(f"pairs of epoch {self.epoch}, step {self.epoch_step}: {error}") from error
        self.waited_seconds += time.perf_counter() - started
        batch = self._batch(arrays)
        self.step += 1
        self.epoch_step += 1
        return batch

    def next_epoch(self) -> None:
        """Go to the start of the next epoch; nothing of it is made before its first batch is asked for."""
        self._stop()
        self.epoch += 1
        self.epoch_step = 0
        self._steps = None

    def state(self) -> dict[str, Any]:
        """Where the consumer is, as small arrays: n/8 bytes and some integers."""
        weighted = {"weights": np.int64(self._weights_crc)} if self._weights_crc else {}
        return {
            **weighted,
            "epoch": np.int64(self.epoch),
            "epoch_step": np.int64(self.epoch_step),
            "step": np.int64(self.step),
            "kept": self._kept_bits,
            "identity": np.array([len(self.source), self.batch_size, self.seed], np.int64),
            "reaudition_share": np.float64(self.reaudition_share),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the batch that was consumed last when `state` was taken."""
        if missing := self.state().keys() - state.keys():
            raise UserError(
                f"loader state: {', '.join(sorted(missing))} missing, so another version wrote it; start a new run"
            )
        found = [*(int(value) for value in state["identity"]), float(state["reaudition_share"])]
        expected = [len(self.source), self.batch_size, self.seed, self.reaudition_share]
        if int(state.get("weights", 0)) != self._weights_crc:
            raise UserError("loader state: other weights of its sources; make the loader with those it was taken with")
        if found != expected:
            raise UserError(
                f"loader state: of (pairs, batch_size, seed, reaudition_share) = {found}, this loader has {expected};"
                " make the loader with the settings that the state was taken with"
            )
        self._stop()
        self.epoch, self.epoch_step, self.step = (int(state[name]) for name in ("epoch", "epoch_step", "step"))
        self._keep(np.asarray(state["kept"], np.uint8).copy())

    def _start(self) -> None:
        self._require_open()
        self._threads = _loader.PairLoader(
            **self._settings,
            kept=self._visited_bits,
            auditions=self._auditions,
            epoch=self.epoch,
            epoch_step=self.epoch_step,
            step=self.step,
        )

    def _batch(self, arrays: dict[str, Any]) -> Batch:
        m = len(arrays["trained_ids"])
        first = self.rank * m
        tokens = arrays["input_ids"]
        if self.source.captions is None:
            inputs = [self.source.inputs(arrays["trained_ids"], self.step, self.rank, self.world_size)]
        else:
            masked_in = None if self.source.masked is None else 0
            inputs = [
                micro_inputs(arrays, number, masked=number == masked_in)
                for number in range(len(arrays["micro_batches"]))
            ]
        return Batch(
            rows_N=arrays["rows"],
            weights_N=arrays["weights"],
            frozen_ids_N=arrays["frozen_ids"],
            trained_ids_M=arrays["trained_ids"],
            frozen_MD=torch.from_numpy(arrays["features"]),
            weights_M=torch.from_numpy(arrays["weights"][first : first + m]),
            inputs=inputs,
            masked=len(arrays["masked_labels"]),
            tokens=len(tokens),
            first=first,
        )


def micro_inputs(arrays: dict[str, Any], number: int, *, masked: bool) -> dict[str, Any]:
    """The model's arguments for one micro-batch, as views."""
    begin, end, first_token, last_token, first_text, last_text = arrays["micro_batches"][number]
    arguments: dict[str, Any] = {
        "texts": torch.from_numpy(arrays["segments"][begin:end]),
        "input_ids": torch.from_numpy(arrays["input_ids"][first_token:last_token]),
        "position_ids": torch.from_numpy(arrays["position_ids"][first_token:last_token]),
        # Each earlier micro-batch has one boundary more than texts.
        "segments": Segments.of(arrays["cu_seqlens"][first_text + number : last_text + number + 1]),
    }
    if masked:
        # Also where this rank has none: under ZeRO-3 the head's weights are gathered by all ranks together.
        arguments["masked_positions"] = torch.from_numpy(arrays["masked_positions"])
        arguments["masked_labels"] = torch.from_numpy(arrays["masked_labels"])
    return arguments
