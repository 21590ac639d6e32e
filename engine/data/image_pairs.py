"""Images and captions that both train, from any source of them: tokens are made as batches come, no store is needed."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ..config import Config, DataSource, ImageTower
from ..errors import UserError, tell
from .batches import Batch, BatchLoader, pack, packed_inputs
from .images import ImageBatch, ImageLoader
from .pairs import PairSource
from .pictures import standardise
from .pixels import augment
from .sources import Source
from .store import Texts, edges

T = TypeVar("T")
Share = tuple[int, int, int, int]


class ImagePairs(PairSource):
    """Captioned images of `sources`, which are those of `data.sources` in their order. It has no rows: nothing is known
    of a pair before it is read."""

    def __init__(self, sources: Sequence[Source], tower: ImageTower, tokenizer: PreTrainedTokenizerBase) -> None:
        nothing = np.empty(0, np.int32)
        super().__init__(
            trained_ids=nothing,
            frozen_ids=nothing,
            features=np.empty((0, 1), np.float16),
            edges=edges(nothing, nothing, 0),
        )
        if not sources:
            raise UserError("data.sources: not set; training.tower=both reads images and captions from there")
        self.sources, self.tower, self.tokenizer = sources, tower, tokenizer

    def batches(self, config: Config, rank: int, world_size: int) -> BatchLoader:
        return ImagePairLoader(self, config, rank, world_size)


@dataclass(frozen=True)
class _Pair:
    """Caption `text` of picture `image` in `batch`; `behind`: samples of its order that are consumed with it, and how
    many pairs of the next one."""

    batch: ImageBatch
    image: int
    text: int
    behind: tuple[int, int]


class _Order:
    """Pairs of the pictures of `images`, of which the first one has `given` pairs behind it."""

    def __init__(self, images: ImageLoader, shown: Sequence[DataSource], given: int) -> None:
        self.images, self._shown, self._given = images, shown, given
        self._waiting: deque[_Pair] = deque()

    def take(self, count: int) -> list[_Pair] | None:
        """The next pairs; None where fewer are left."""
        while len(self._waiting) < count:
            batch = next(self.images, None)
            if batch is None:
                return None
            for image, consumed in enumerate(batch.consumed):
                texts = self._texts(batch, image)
                for at in range(self._given, len(texts)):
                    behind = (consumed, 0) if at + 1 == len(texts) else (consumed - 1, at + 1)
                    self._waiting.append(_Pair(batch, image, texts[at], behind))
                self._given = 0
        return [self._waiting.popleft() for _ in range(count)]

    def _texts(self, batch: ImageBatch, image: int) -> Sequence[int]:
        """Which of a picture's captions are shown."""
        source, count = self._shown[batch.origins[image]], len(batch.captions[image])
        if source.captions == "all":
            return range(count)
        visit = self.images.epoch * max(1, math.floor(source.weight)) + batch.visits[image]
        return [0 if source.captions == "first" else visit % count]


class ImagePairLoader:
    """Batches of M = batch_size / world_size pairs of this rank, on ImageLoader's orders.

    There are as many orders as ranks began the run, and each gives as many pairs to a global batch. Where ranks are
    fewer now, one reads several orders; where they are more, several share one, in runs as long as what each gives to a
    batch. So ranks may change and batches stay, but for a shared order's bad samples: each of its readers steps over
    its own. No pair comes more often in an epoch than its source weighs. A bad shard, of which data.max_bad_shards are
    allowed, stays out until the epoch ends, whatever is stopped and started; ranks that share an order must lack the
    same ones. Where samples of a tar begin is kept in the run's `index` folder.

    An image with several captions shows what its source's `captions` says: the first, another one on each visit, or
    all, each in a pair of its own, one after the other. A shared order is shared by images, so that all captions shift
    pairs between batches, too. Ranks may have different numbers of batches: the epoch is over when one of them has
    `ended`. So one batch is held ahead.
    """

    def __init__(self, source: ImagePairs, config: Config, rank: int, world_size: int) -> None:
        self.source, self.config, self.rank, self.world_size = source, config, rank, world_size
        self.epoch_step = self.step = 0
        self.kept_share = 1.0
        # The source has no rows, so none can be left out.
        self.kept = np.empty(0, np.bool_)
        self.m = config.training.batch_size // world_size
        self.orders = world_size
        self._shown = list(config.data.sources.values())
        self._all = any(source.captions == "all" for source in self._shown)
        self._again = self._all or any(source.weight > 1 for source in self._shown)
        self._mine: list[_Order] = []
        self._ahead: list[list[_Pair]] = []
        self._over = False
        self._begin(0)

    @property
    def ended(self) -> bool:
        self._look_ahead()
        return self._over

    def __next__(self) -> Batch:
        self._look_ahead()
        if self._over:
            if self.epoch_step == 0:
                raise UserError(
                    f"training.batch_size: {self.config.training.batch_size} pairs, but data.sources give rank"
                    f" {self.rank} too few for one; lower it, or give more"
                )
            self.next_epoch()
            raise StopIteration
        ahead, self._ahead = self._ahead, []
        self._behind = [pairs[-1].behind for pairs in ahead]
        batch = self._batch([pair for pairs in ahead for pair in pairs])
        self.epoch_step += 1
        self.step += 1
        return batch

    def next_epoch(self) -> None:
        """Go to the start of the next epoch, whatever this rank has left of this one."""
        self._begin(self.epoch + 1)

    def state(self) -> dict[str, Any]:
        """Where all ranks are, each of which must call: a rank's samples count with its bad ones."""
        counters = {name: np.int64(getattr(self, name)) for name in ("epoch", "epoch_step", "step", "orders")}
        known = [[(bad.number, bad.samples) for bad in order.images.bad_shards] for order in self._mine]
        of_all = self._of_all((self._behind, known))
        behind = np.array([place for places, _ in of_all for place in places], np.int64)
        bad = [found for _, of_orders in of_all for found in of_orders]
        numbers = [(part, shard, samples) for part, found in enumerate(bad) for shard, samples in found]
        shares = np.array(self._shares, np.int64).reshape(len(self._shares), -1, 4)
        held = {"shares": shares, "consumed": behind[:, 0], "given": behind[:, 1]}
        return {**counters, **held, "bad_shards": np.array(numbers, np.int64).reshape(-1, 3)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the batch that was consumed last when `state` was taken; every rank must call."""
        if missing := {"epoch", "epoch_step", "step", "orders", "shares", "consumed"} - state.keys():
            raise UserError(
                f"loader state: {', '.join(sorted(missing))} missing, so another version wrote it; start a new run"
            )
        self.step, self.orders = int(state["step"]), int(state["orders"])
        shares = [[tuple(share) for share in part] for part in state["shares"].tolist()]
        consumed = state["consumed"]
        # Earlier versions gave one pair of a picture.
        given = state.get("given", np.zeros_like(consumed))
        behind = list(zip(consumed.tolist(), given.tolist(), strict=True))
        bad: list[list[Any]] = [[] for _ in shares]
        for part, shard, samples in state.get("bad_shards", np.empty((0, 3), np.int64)).tolist():
            bad[part].append((shard, samples, "it was bad before the run was stopped"))
        self._go_to(int(state["epoch"]), int(state["epoch_step"]), shares, behind, bad)
        # What is left may make a batch for the ranks that there were, and none for these.
        if any(self._of_all(self.ended)):
            self.next_epoch()

    def close(self) -> None:
        for order in self._mine:
            order.images.close()

    def _begin(self, epoch: int) -> None:
        nothing: list[list[Any]] = [[] for _ in range(self.orders)]
        self._go_to(epoch, 0, nothing, [(0, 0)] * self.orders, nothing)

    def _go_to(
        self,
        epoch: int,
        epoch_step: int,
        shares: list[list[Share]],
        behind: list[tuple[int, int]],
        bad: list[list[Any]],
    ) -> None:
        """Read this rank's of the given parts of the orders `behind` the samples, and pairs of the next one, of each.

        Where they do not go round, each is split into as many as do.
        """
        self.close()
        times = math.lcm(len(shares), self.world_size) // len(shares)
        pairs = self.config.training.batch_size // (len(shares) * times)
        if times > 1:
            parts = list(zip(shares, behind, strict=True))
            shares = [[*part, (skip, pairs, number, times)] for part, (skip, _) in parts for number in range(times)]
            # The first of them goes on with the picture that stands next.
            behind = [(0, 0 if number else given) for _, (_, given) in parts for number in range(times)]
            bad = [found for found in bad for _ in range(times)]
        self.epoch, self.epoch_step, self._shares = epoch, epoch_step, shares
        each = len(shares) // self.world_size
        mine = range(self.rank * each, (self.rank + 1) * each)
        self._behind = [behind[part] for part in mine]
        self._ahead, self._over = [], False
        images = [
            ImageLoader(
                self.source.sources,
                weights=[source.weight for source in self._shown],
                batch_size=pairs,
                size=self.source.tower.size,
                # Cuts are made by `augment`, which also turns and colours.
                scale=(1.0, 1.0),
                ratio=(1.0, 1.0),
                dtype=torch.uint8,
                threads=max(1, len(os.sched_getaffinity(0)) // each),
                seed=self.config.seed,
                rank=part * self.orders // len(shares),
                world_size=self.orders,
                shares=shares[part],
                indexes=self.config.run / "index",
                max_bad_shards=self.config.data.max_bad_shards,
                # Some pictures may make a batch of pairs.
                drop_last=not self._all,
            )
            for part in mine
        ]
        for part, loader, (consumed, _) in zip(mine, images, self._behind, strict=True):
            loader.restore({**loader.state(), "epoch": epoch, "consumed": consumed, "bad_shards": bad[part]})
        given = [given for _, given in self._behind]
        self._mine = [_Order(loader, self._shown, begun) for loader, begun in zip(images, given, strict=True)]

    def _of_all(self, word: T) -> list[T]:
        words: list[Any] = [word] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(words, word)
        return words

    def _look_ahead(self) -> None:
        if not self._ahead and not self._over:
            known = [len(order.images.bad_shards) for order in self._mine]
            found = [order.take(self.m // len(self._mine)) for order in self._mine]
            for order, before in zip(self._mine, known, strict=True):
                for bad in order.images.bad_shards[before:]:
                    allowed = self.config.data.max_bad_shards
                    tell(f"{bad.cause}; left out of this epoch, data.max_bad_shards allows {allowed}")
            self._ahead = [pairs for pairs in found if pairs is not None]
            self._over = len(self._ahead) < len(found)

    def _batch(self, pairs: list[_Pair]) -> Batch:
        m, training = self.m, self.config.training
        first = self.rank * m
        captions = [pair.batch.captions[pair.image][pair.text] for pair in pairs]
        generator = torch.Generator().manual_seed(((self.config.seed << 40) + self.step) % 2**63)
        # Drawn for the whole batch, then sliced: the views do not depend on the world size.
        draws = torch.rand((training.batch_size, 11), generator=generator)[first : first + m]
        of_batches = [list(of_one) for _, of_one in groupby(pairs, lambda pair: id(pair.batch))]
        planes = torch.cat([_images(part) for part in of_batches])
        views = augment(planes.float() / 255, draws, training.augmentation)
        pixels = standardise(views, self.source.tower.mean, self.source.tower.std)
        texts = Texts.of(self.source.tokenizer(captions)["input_ids"])
        micro = training.micro_batch_size or m
        inputs, tokens = [], 0
        for start in range(0, m, micro):
            packed = pack(texts, np.arange(start, start + micro), training.max_caption_tokens)
            inputs.append({"pixels": pixels[start : start + micro], **packed_inputs(packed)})
            tokens += len(packed.input_ids)
        nothing = np.empty(0, np.int64)
        return Batch(
            rows_N=nothing,
            weights_N=np.ones(training.batch_size, np.float32),
            frozen_ids_N=nothing,
            trained_ids_M=nothing,
            frozen_MD=None,
            weights_M=torch.ones(m),
            inputs=inputs,
            masked=0,
            tokens=tokens,
            first=first,
            caption_ids_M=torch.tensor([_id(caption) for caption in captions]),
            image_ids_M=torch.tensor([_picture_id(pair) for pair in pairs]) if self._again else None,
            keys=[pair.batch.keys[pair.image] for pair in pairs],
        )


class HeldOutImages:
    """All images of a source, uint8 [n, S, S, 3], and their distinct captions, for validation."""

    def __init__(self, source: Source, tower: ImageTower, tokenizer: PreTrainedTokenizerBase) -> None:
        loader = ImageLoader(
            source, batch_size=256, size=tower.size, train=False, dtype=torch.uint8, channels_last=True
        )
        text_of: dict[str, int] = {}
        pixels: list[torch.Tensor] = []
        text_ids, image_ids = [], []
        with loader:
            for batch in loader:
                for image, captions in enumerate(batch.captions, sum(len(part) for part in pixels)):
                    text_ids += [text_of.setdefault(caption, len(text_of)) for caption in captions]
                    image_ids += [image] * len(captions)
                pixels.append(batch.images.permute(0, 2, 3, 1).clone())
        if not pixels:
            raise UserError(f"data.validation: {source.path} holds no usable image with a caption")
        self.pixels = torch.cat(pixels)
        self.texts = Texts.of(tokenizer(list(text_of))["input_ids"])
        self.to_images = edges(np.array(text_ids), np.array(image_ids), len(text_of))
        self.to_texts = edges(np.array(image_ids), np.array(text_ids), len(self.pixels))


def _images(pairs: Sequence[_Pair]) -> torch.Tensor:
    """Of pairs of one batch; the batch's own memory where they are all of it."""
    images, rows = pairs[0].batch.images, [pair.image for pair in pairs]
    return images if rows == list(range(len(images))) else images[rows]


def _picture_id(pair: _Pair) -> int:
    return _id(f"{pair.batch.files[pair.image]}:{pair.batch.offsets[pair.image]}")


def _id(text: str) -> int:
    """int64, equal for equal texts on all ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
