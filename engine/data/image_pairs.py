"""Images and captions that both train, from tar shards: tokens are made as batches come, no store is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ..config import Config, ImageTower
from ..errors import UserError
from .batches import Batch, BatchLoader, pack, packed_inputs
from .images import ImageBatch, ImageLoader
from .pairs import PairSource
from .pictures import standardise
from .pixels import augment
from .store import Texts, edges


class ImagePairs(PairSource):
    """Captioned images of `shards`. It has no rows: nothing is known of a pair before it is read."""

    def __init__(self, shards: Sequence[Path], tower: ImageTower, tokenizer: PreTrainedTokenizerBase) -> None:
        nothing = np.empty(0, np.int32)
        super().__init__(
            trained_ids=nothing,
            frozen_ids=nothing,
            features=np.empty((0, 1), np.float16),
            edges=edges(nothing, nothing, 0),
        )
        if not shards:
            raise UserError("data.shards: not set; training.tower=both reads images and captions from tars")
        self.shards, self.tower, self.tokenizer = shards, tower, tokenizer

    def batches(self, config: Config, rank: int, world_size: int) -> BatchLoader:
        return ImagePairLoader(self, config, rank, world_size)


class ImagePairLoader:
    """Batches of M = batch_size / world_size pairs of this rank, on ImageLoader's order.

    An image with several captions shows another one each epoch. Ranks may have different numbers of batches: the epoch
    is over when one of them has `ended`. So one batch is held ahead.
    """

    def __init__(self, source: ImagePairs, config: Config, rank: int, world_size: int) -> None:
        training = config.training
        self.source, self.config, self.rank, self.world_size = source, config, rank, world_size
        self.epoch = self.epoch_step = self.step = 0
        self.kept_share = 1.0
        # The source has no rows, so none can be left out.
        self.kept = np.empty(0, np.bool_)
        self.m = training.batch_size // world_size
        self.images = ImageLoader(
            list(source.shards),
            batch_size=self.m,
            size=source.tower.size,
            # Cuts are made by `augment`, which also turns and colours.
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            dtype=torch.uint8,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            drop_last=True,
        )
        self._ahead: ImageBatch | None = None
        self._over = False
        self._consumed = 0

    @property
    def ended(self) -> bool:
        self._look_ahead()
        return self._over

    def __next__(self) -> Batch:
        self._look_ahead()
        images, self._ahead = self._ahead, None
        if images is None:
            if self.epoch_step == 0:
                raise UserError(
                    f"training.batch_size: {self.config.training.batch_size} pairs, but data.shards gives rank"
                    f" {self.rank} fewer than {self.m}; lower it, or give more shards"
                )
            self.next_epoch()
            raise StopIteration
        self._consumed = self.images.state()["consumed"]
        batch = self._batch(images)
        self.epoch_step += 1
        self.step += 1
        return batch

    def next_epoch(self) -> None:
        """Go to the start of the next epoch, whatever this rank has left of this one."""
        self._go_to(self.epoch + 1, 0, 0)

    def state(self) -> dict[str, Any]:
        """Where all ranks are, each of which must call: a rank's samples count with its bad ones."""
        consumed: list[int] = [self._consumed] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(consumed, self._consumed)
        counters = {name: np.int64(getattr(self, name)) for name in ("epoch", "epoch_step", "step")}
        return {**counters, "consumed": np.array(consumed, np.int64)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the batch that was consumed last when `state` was taken."""
        if len(state["consumed"]) != self.world_size:
            raise UserError(
                f"loader state: of {len(state['consumed'])} ranks, these are {self.world_size}; a run of both towers"
                " goes on with as many ranks as it began with"
            )
        self.step = int(state["step"])
        self._go_to(int(state["epoch"]), int(state["epoch_step"]), int(state["consumed"][self.rank]))

    def close(self) -> None:
        self.images.close()

    def _go_to(self, epoch: int, epoch_step: int, consumed: int) -> None:
        self.epoch, self.epoch_step, self._consumed = epoch, epoch_step, consumed
        self._ahead, self._over = None, False
        self.images.restore({**self.images.state(), "epoch": epoch, "consumed": consumed, "bad": {}})

    def _look_ahead(self) -> None:
        if self._ahead is None and not self._over:
            self._ahead = next(self.images, None)
            self._over = self._ahead is None

    def _batch(self, images: ImageBatch) -> Batch:
        m, training = self.m, self.config.training
        captions = [texts[self.epoch % len(texts)] for texts in images.captions]
        draws = torch.rand((m, 11), generator=torch.Generator().manual_seed(self._seed()))
        views = augment(images.images.float() / 255, draws, training.augmentation)
        pixels = standardise(views, self.source.tower.mean, self.source.tower.std)
        texts = Texts.of(self.source.tokenizer(captions)["input_ids"])
        micro = training.micro_batch_size or m
        inputs, tokens = [], 0
        for first in range(0, m, micro):
            packed = pack(texts, np.arange(first, first + micro), training.max_caption_tokens)
            inputs.append({"pixels": pixels[first : first + micro], **packed_inputs(packed)})
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
            first=self.rank * m,
            caption_ids_M=torch.tensor([_id(caption) for caption in captions]),
            keys=images.keys,
        )

    def _seed(self) -> int:
        return ((self.config.seed << 40) + self.step * self.world_size + self.rank) % 2**63


class HeldOutImages:
    """All images of a tar or a folder of them, uint8 [n, S, S, 3], and their distinct captions, for validation."""

    def __init__(self, path: Path, tower: ImageTower, tokenizer: PreTrainedTokenizerBase) -> None:
        loader = ImageLoader(path, batch_size=256, size=tower.size, train=False, dtype=torch.uint8, channels_last=True)
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
            raise UserError(f"data.validation: {path} holds no usable image with a caption")
        self.pixels = torch.cat(pixels)
        self.texts = Texts.of(tokenizer(list(text_of))["input_ids"])
        self.to_images = edges(np.array(text_ids), np.array(image_ids), len(text_of))
        self.to_texts = edges(np.array(image_ids), np.array(text_ids), len(self.pixels))


def _id(caption: str) -> int:
    """int64, equal for equal captions on all ranks."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little", signed=True)
