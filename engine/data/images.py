"""Images of any source as batches for a tower: read, decoded and resized by C++ threads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _loader
from ..errors import ShardError, UserError
from .ahead import Ahead
from .pictures import by_pillow
from .shards import BadSample, BadShard
from .sources import Source, open_source
from .threaded import ThreadedLoader

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.uint8: "uint8"}


@dataclass(frozen=True)
class ImageBatch:
    """Images of one batch and what their source says of them; entry i of each list belongs to image i."""

    images: torch.Tensor  # [images, 3, size, size]; the loader's memory, which returns to it when the last view dies
    keys: list[str]
    shards: list[str]  # names of the tar or table
    files: list[str]  # paths of the files that hold the encoded images
    offsets: list[int]  # of the encoded image in its file, in bytes; in a .parquet the number of its cell
    lengths: list[int]
    captions: list[list[str]]  # at least one each; none where `captions=False` let an image without pass
    noise: list[list[bool | None]]  # of each caption: whether it is wrong, where the source tells
    text_ids: list[list[str]]  # of each caption, none where the source has none
    sources: list[str]  # the .json members' "source", empty without one
    captions_en: list[list[str]]  # and their "captions_en"
    uncaptioned: list[str | None]  # why an image has no captions
    json: list[bytes | None]  # the .json members
    encoded: list[bytes | None]  # with `keep_encoded`
    consumed: list[int]  # samples of the order up to each image and with it, good and bad
    origins: list[int]  # which of the loader's sources it came from
    visits: list[int]  # which of the epoch's visits of that source it is

    def __len__(self) -> int:
        return len(self.keys)


class ImageLoader(ThreadedLoader):
    """Batches of images from any source, cut, resized and normalised as CLIP is trained, by C++ threads.

        with ImageLoader("shards/", batch_size=256, seed=1) as loader:
            for epoch in range(10):
                for batch in loader:
                    features = tower(batch.images.to(device, non_blocking=True))

    A `for` goes on where the last one stopped and ends with the epoch; the next one is the next epoch, and setting
    `epoch` starts that one. A batch counts as consumed when it is handed out: `state()` is the position behind it,
    whatever was made ahead, and `restore()` goes there without reading the images before it.

    - source: whatever `open_source` reads, its path or URL, or a list of these. In a tar, a sample is a run of members
      with one name up to the first dot: an image with captions in .txt or .json. Of the others, each 4,096 images in
      the order of the source count as a shard. Those in a .parquet, and remote ones, are written to a temporary file, a
      few shards ahead.
    - size: images are float or uint8 [images, 3, size, size].
    - train: a random part of the image (torchvision's RandomResizedCrop with `scale` and `ratio`), in an order shuffled
      by shards and by a buffer of `shuffle_buffer` samples, drawn from once a quarter of it is full. Else the middle
      (Resize, then CenterCrop), in the shards' own order.
    - threads: decoding threads, by default one for each core this process may use. Batches are the same for any number.
    - seed, epoch, rank, world_size: the order depends on these and on the source alone. Ranks share all samples out
      between them: whole shards as far as they go round, every world_size-th sample of the others. So ranks may have
      different numbers of batches.
    - weights: how many times an epoch visits each source, once without. The fraction is a visit of a share of its
      samples, which are drawn anew each epoch.
    - shares: how this loader shares the order of its rank with others: for each (skip, block, number, of), one after
      the other, runs of `block` samples of what is left behind the first `skip` go round `of` loaders, of which this
      one is `number`. Each reads its own samples alone, and without `indexes` every shard's headers.
    - mean, std: of each channel, for values in 0..1; not applied to uint8.
    - dtype: torch.float32, torch.bfloat16 or torch.uint8. channels_last: in that memory format.
    - flip: mirror one image in two.
    - scaled_decoding: decode a JPEG at a half, a quarter or an eighth of its size where it has pixels enough: faster,
      but 640 x 480 photographs to 224 were off by 0.9/255 on average, 15/255 at one value in a thousand, 39/255 at
      most. Without it, images are those of Pillow but for rounding (2/255 at most); the middle is that of Hugging
      Face's processors of CLIP, which may lie half a pixel before torchvision's.
    - indexes: a folder where the tars' indexes are kept: with them `restore()` and `shares` jump to their samples
      instead of reading the headers of those before.
    - max_bad_shards: so many shards of an epoch may be missing or not whole, and are named in `bad_shards`; the next
      one is a UserError, after the samples before it in the order. Loaders that share an order must lack the same ones.
    - captions: False lets samples without captions pass.
    - keep_encoded: keep each image's file in `ImageBatch.encoded`.
    - drop_last: leave out an epoch's last incomplete batch.
    - prefetch: batches made ahead at most. Images lie in pinned memory where CUDA is there.

    Other formats that Pillow reads (GIF, BMP, TIFF, AVIF, HEIC with pillow-heif) take a slow path, one at a time;
    `slow_pictures` counts them. Samples that cannot be used are skipped and named in `bad_samples`; rows without a
    caption are named by the first loader of an order. Both are of the current epoch. Transparency lies over white;
    orientation (EXIF, XMP) is applied; images of more than 100 million pixels are refused. After a fork, a
    RuntimeError in the child.
    """

    def __init__(
        self,
        source: str | Path | Source | Sequence[str | Path | Source],
        *,
        batch_size: int,
        size: int = 224,
        train: bool = True,
        threads: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] = (),
        shares: Sequence[tuple[int, int, int, int]] = (),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
        scaled_decoding: bool = False,
        shuffle_buffer: int = 1000,
        indexes: Path | None = None,
        max_bad_shards: int = 0,
        captions: bool = True,
        keep_encoded: bool = False,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        given = [source] if isinstance(source, str | Path | Source) else source
        opened = [one if isinstance(one, Source) else open_source(one) for one in given]
        weights = weights or [1.0] * len(opened)
        held = len(weights) == len(opened) and all(0 < weight <= 100 for weight in weights)
        _check(held, f"weights: {list(weights)} of {len(opened)} sources; give each one above 0, and 100 at most")
        self._parts, self._visits, parts_shares = [], [], []
        for origin, (one, weight) in enumerate(zip(opened, weights, strict=True)):
            parts = one.parts
            for visit in range(math.ceil(weight)):
                self._parts += parts
                self._visits += [(origin, visit)] * len(parts)
                parts_shares += [min(weight - visit, 1.0)] * len(parts)
        _check(batch_size >= 1, f"batch_size: {batch_size}; give 1 or more")
        _check(1 <= size <= 4096, f"size: {size}; give 1 to 4096 pixels")
        _check(threads is None or threads >= 1, f"threads: {threads}; give 1 or more")
        _check(0 <= seed < 2**64, f"seed: {seed}; give 0 to 2^64 - 1")
        _check(0 <= rank < world_size, f"rank: {rank} of world_size {world_size}; give 0 to {world_size - 1}")
        for skip, block, number, of in shares:
            held = skip >= 0 and block >= 1 and 0 <= number < of
            _check(held, f"shares: {skip, block, number, of}; give a skip from 0, a block from 1, and number below of")
        _check(len(mean) == len(std) == 3 and min(std) > 0, f"mean, std: {mean}, {std}; give 3 numbers, std above 0")
        _check(dtype in DTYPES, f"dtype: {dtype}; give one of {', '.join(map(str, DTYPES))}")
        _check(0 < scale[0] <= scale[1] <= 1, f"scale: {scale}; give two ascending shares of an image, up to 1")
        _check(0 < ratio[0] <= ratio[1], f"ratio: {ratio}; give two ascending ratios of width to height")
        _check(1 <= shuffle_buffer < 2**31, f"shuffle_buffer: {shuffle_buffer}; give 1 or more")
        _check(max_bad_shards >= 0, f"max_bad_shards: {max_bad_shards}; give 0 or more")
        _check(prefetch >= 1, f"prefetch: {prefetch}; give 1 or more")

        self.batch_size, self.size, self.dtype, self.channels_last = batch_size, size, dtype, channels_last
        self.seed, self.rank, self.world_size, self.prefetch = seed, rank, world_size, prefetch
        # Of all loaders of an order, the first one tells of them.
        first = rank == 0 and not any(number for _, _, number, _ in shares)
        visited = zip(self._parts, self._visits, strict=True)
        self._bad_rows = [row for part, (_, visit) in visited for row in part.bad if first and visit == 0]
        listings = [part.listing for part in self._parts]
        self._indexes, self._ahead = indexes, Ahead([], None)
        self._settings: dict[str, Any] = {
            "shards": [os.fsencode(part.path) for part in self._parts],
            "shard_shares": parts_shares,
            "listings": [None if listing is None else listing.columns() for listing in listings],
            "elsewhere": [part.elsewhere for part in self._parts],
            "max_bad_shards": max_bad_shards,
            "other": by_pillow,
            "batch_size": batch_size,
            "size": size,
            "train": train,
            "threads": threads or len(os.sched_getaffinity(0)),
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "shares": list(shares),
            "mean": tuple(mean),
            "std": tuple(std),
            "dtype": DTYPES[dtype],
            "channels_last": channels_last,
            "scale": scale,
            "ratio": ratio,
            "flip": flip,
            "scaled_decoding": scaled_decoding,
            "shuffle_buffer": shuffle_buffer,
            "captions": captions,
            "keep_encoded": keep_encoded,
            "drop_last": drop_last,
        }
        names = [part.path.name if part.listing is None else [part.path.name, part.pictures] for part in self._parts]
        order = [names, train, shuffle_buffer if train else 0, *shares]
        # Version of how a buffer is drawn from.
        order += [2] if train and shuffle_buffer > 1 else []
        order += [parts_shares] if min(parts_shares, default=1) < 1 else []
        self._identity = {
            "shards": hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16],
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }
        self._pinned = torch.cuda.is_available()
        self._free: deque[np.ndarray] = deque(maxlen=prefetch + 2)
        self._images = self._epoch = self._consumed = 0
        self._begun_with: list[tuple[int, int, str]] = []
        self._started = 0.0
        self._go_to(epoch, 0, {}, [])

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0, {}, [])

    @property
    def bad_counts(self) -> dict[str, int]:
        """How many samples of the current epoch were skipped, by cause, also before a restore."""
        return dict(self._bad_before + Counter(sample.cause for sample in self.bad_samples))

    @property
    def bad_shards(self) -> list[BadShard]:
        """Those of the current epoch that cannot be had or are not whole, also before a restore."""
        return [BadShard(self._parts[at].path.name, cause, at, samples) for at, samples, cause in self._bad_shards]

    @property
    def images_per_second(self) -> float:
        """Since this epoch's first batch was asked for, the consumer's own time included."""
        return self._images / max(time.perf_counter() - self._started, 1e-9) if self._images else 0.0

    def state(self) -> dict[str, Any]:
        """Where the consumer is: a small dictionary for this rank, which JSON can hold."""
        bad, shards = (self.bad_counts, self._bad_shards) if self._consumed else ({}, self._begun_with)
        place = {"epoch": self._epoch, "consumed": self._consumed}
        return {**self._identity, **place, "bad": bad, "bad_shards": [*map(list, shards)]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the batch that was consumed last when `state` was taken."""
        for name, expected in self._identity.items():
            if state.get(name) != expected:
                raise UserError(
                    f"loader state: {name} is {state.get(name)}, this loader has {expected}; make the loader with the"
                    " settings and shards that the state was taken with"
                )
        self._go_to(state["epoch"], state["consumed"], state["bad"], state["bad_shards"])

    def start(self) -> None:
        """Make the next batches now, before they are asked for."""
        if self._threads is None:
            self._start()

    def __next__(self) -> ImageBatch:
        started = time.perf_counter()
        try:
            self.start()
            images, records, bad, bad_shards, consumed, by_other = self._threads.next()
            self.waited_seconds += time.perf_counter() - started
            batch = None
            if images is not None:
                self._lend()
                batch = self._batch(images, records)
            self.bad_samples += [BadSample(self._parts[shard].path.name, key, cause) for shard, key, cause in bad]
            self._bad_shards += bad_shards
            self.slow_pictures += by_other
            self._consumed = consumed
        except _loader.ShardError as error:
            self._stop()
            raise ShardError(str(error)) from None
        except BaseException:
            # What the threads handed over, nobody received: they start again from the position.
            self._stop()
            if self._ahead.failure is not None:
                raise self._ahead.failure from None
            raise
        if batch is None:
            self._stop()
            self._epoch, self._consumed, self._begun_with = self._epoch + 1, 0, []
            raise StopIteration
        self._images += len(batch)
        return batch

    def _go_to(self, epoch: int, consumed: int, bad: dict[str, int], bad_shards: Sequence[Sequence[Any]]) -> None:
        _check(0 <= epoch < 2**32, f"epoch: {epoch}; give 0 to 2^32 - 1")
        self._stop()
        self._epoch, self._consumed, self._bad_before = epoch, consumed, Counter(bad)
        self.bad_samples: list[BadSample] = [*self._bad_rows] if consumed == 0 else []
        self._begun_with = [(int(shard), int(samples), str(cause)) for shard, samples, cause in bad_shards]
        self._bad_shards = [*self._begun_with]
        self.slow_pictures = 0

    def _start(self) -> None:
        self._require_open()
        if self._consumed == 0:
            self._go_to(self._epoch, 0, {}, self._begun_with)
        self._images, self._started = 0, time.perf_counter()
        self._ahead = Ahead(self._parts, self._indexes)
        self._threads = _loader.ImageLoader(
            **self._settings,
            epoch=self._epoch,
            consumed=self._consumed,
            bad_shards=self._bad_shards,
            keeper=self._ahead,
        )
        for _ in range(self.prefetch):
            self._lend()

    def _stop(self) -> None:
        # What waits for a fetch holds up the threads' end.
        self._ahead.stop()
        super()._stop()

    def _lend(self) -> None:
        """Give the threads memory for one more batch."""
        shape = (self.batch_size, 3, self.size, self.size)
        size = int(np.prod(shape)) * self.dtype.itemsize
        if self._pinned:
            # PyTorch's own pool: it knows when a copy to the GPU that was not waited for is done.
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            owner = self._free.pop() if self._free else np.empty(size, np.uint8)
            lease = owner.view()
            # A tensor over it, or a view of one, keeps the lease alive.
            weakref.finalize(lease, self._free.append, owner).atexit = False
            memory = torch.from_numpy(lease)
        images = memory.view(self.dtype)
        if self.channels_last:
            images = images.view(self.batch_size, self.size, self.size, 3).permute(0, 3, 1, 2)
        else:
            images = images.view(shape)
        self._threads.supply(memory.data_ptr(), images)

    def _batch(self, images: torch.Tensor, records: list[tuple[Any, ...]]) -> ImageBatch:
        (
            keys, shards, places, offsets, lengths, captions, noise, sources, captions_en, uncaptioned, jsons, encoded,
            consumed,
        ) = (list(column) for column in zip(*records, strict=True))  # fmt: skip
        parts = [self._ahead.parts[shard] for shard in shards]
        found = [part.place_of(*at) for part, *at in zip(parts, places, offsets, strict=True)]
        return ImageBatch(
            images=images[: len(records)],
            keys=keys,
            shards=[part.path.name for part in parts],
            files=[file for file, _ in found],
            offsets=[offset for _, offset in found],
            lengths=lengths,
            captions=captions,
            noise=noise,
            text_ids=[part.text_ids_of(place) for part, place in zip(parts, places, strict=True)],
            sources=sources,
            captions_en=captions_en,
            uncaptioned=uncaptioned,
            json=jsons,
            encoded=encoded,
            consumed=consumed,
            origins=[self._visits[shard][0] for shard in shards],
            visits=[self._visits[shard][1] for shard in shards],
        )


def _check(held: bool, message: str) -> None:
    if not held:
        raise UserError(message)
