"""Pictures with captions through the frozen image tower, in parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..config import Config
from ..data import sources
from ..data.images import ImageBatch, ImageLoader
from ..data.shards import BadSample, Sample
from ..data.sources import is_tars, open_source
from ..errors import UserError
from ..model.frozen import FrozenImages, image_tower_name
from .parts import Item, Made, digest
from .recipe import Part, Recipe, described, fp16_rows

ENCODE_BATCH = 256


def picture_recipe(source: Path, config: Config, images: Path | None) -> Recipe:
    """Of what `open_source` reads."""
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(lambda: FrozenImages(config))
    opened = open_source(source, images)
    if is_tars(source):
        parts = [Part([name, described(tar)], partial(_shard_part, encoder, tar)) for tar in opened.files]
    else:
        of = [name, *map(described, opened.files), None if images is None else os.path.realpath(images)]
        parts = [
            Part([*of, sources.PART, number], partial(_source_part, encoder, part))
            for number, part in enumerate(opened.parts)
        ]
    return Recipe(opened.files, name, parts, opened.pictures, outside=not is_tars(source))


def _shard_part(load: Callable[[], FrozenImages], shard: Path, bar: Any) -> Made:
    items: list[Item] = []
    encoder = load()
    tower, started = encoder.tower, time.perf_counter()
    with ImageLoader(
        shard, batch_size=ENCODE_BATCH, size=tower.size, train=False, mean=tower.mean, std=tower.std, keep_encoded=True
    ) as loader:
        for batch in loader:
            rows = encoder.encode_pixels(batch.images)
            features = fp16_rows(rows, [f"shard {shard}, sample {key}" for key in batch.keys])
            items += map(_item, _samples(shard, batch), features)
            bar.update(len(batch))
            _show_wait(bar, loader.waited_seconds, started)
        return items, loader.bad_samples


def _samples(shard: Path, batch: ImageBatch) -> Iterator[Sample]:
    for at, key in enumerate(batch.keys):
        yield Sample(
            key=key,
            image=batch.encoded[at] or b"",
            shard=shard,
            offset=batch.offsets[at],
            length=batch.lengths[at],
            captions=batch.captions[at],
            noise=[entry.get("noise") for entry in batch.entries[at]],
            source=str((batch.records[at] or {}).get("source", "")),
        )


def _source_part(load: Callable[[], FrozenImages], part: Callable[[], Iterator[Sample | BadSample]], bar: Any) -> Made:
    encoder = load()
    items: list[Item] = []
    bad: list[BadSample] = []
    started, waited = time.perf_counter(), encoder.waited_seconds
    for found in encoder.encode_samples(map(_captioned, part())):
        if isinstance(found, BadSample):
            bad.append(found)
        else:
            sample, feature_D = found
            items += [_item(sample, *fp16_rows(feature_D[None], [f"picture {sample.key} of {sample.shard}"]))]
        bar.update()
        _show_wait(bar, encoder.waited_seconds - waited, started)
    return items, bad


def _captioned(sample: Sample | BadSample) -> Sample | BadSample:
    if isinstance(sample, Sample) and not sample.captions:
        return BadSample(sample.shard.name, sample.key, "image without caption")
    return sample


def _item(sample: Sample, feature: bytes) -> Item:
    return Item(
        hash=digest(sample.image),
        feature=feature,
        key=sample.key,
        source=sample.source,
        shard=str(sample.shard.resolve()),
        offset=sample.offset,
        length=sample.length,
        captions=sample.captions,
        noise=sample.noise,
    )


def _show_wait(bar: Any, waited_seconds: float, started: float) -> None:
    share = waited_seconds / max(time.perf_counter() - started, 1e-9)
    bar.set_postfix(waited_for_data=f"{share:.0%}", refresh=False)
