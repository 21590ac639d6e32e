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
from ..data.images import ImageBatch
from ..data.sources import Source, is_tars, open_source
from ..data.tables import Columns
from ..errors import UserError
from ..model.frozen import FrozenImages, image_tower_name
from .parts import Item, Made, digest
from .recipe import Part, Recipe, described, fp16_rows


def picture_recipe(source: Path, config: Config, images: Path | None, columns: Columns) -> Recipe:
    """Of what `open_source` reads."""
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(lambda: FrozenImages(config))
    opened = open_source(source, images, columns)
    tars = is_tars(source)
    if tars:
        known: list[list[Any]] = [[name, described(tar)] for tar in opened.files]
    else:
        folder = None if images is None else os.path.realpath(images)
        of = [name, *map(described, opened.files), folder, sources.PART, *columns.given]
        known = [[*of, number] for number in range(len(opened.parts))]
    parts = [Part(of, partial(_made, encoder, part)) for of, part in zip(known, opened.parts, strict=True)]
    return Recipe(opened.files, name, parts, opened.pictures, outside=not tars)


def _made(load: Callable[[], FrozenImages], part: Source, bar: Any) -> Made:
    items: list[Item] = []
    encoder = load()
    started = time.perf_counter()
    with encoder.loader(part, keep_encoded=True) as loader:
        for batch in loader:
            rows = encoder.encode_pixels(batch.images)
            places = [f"picture {key} of {file}" for key, file in zip(batch.keys, batch.files, strict=True)]
            items += _items(batch, fp16_rows(rows, places))
            bar.update(len(batch))
            share = loader.waited_seconds / max(time.perf_counter() - started, 1e-9)
            slow = {"by_pillow": loader.slow_pictures} if loader.slow_pictures else {}
            bar.set_postfix(waited_for_data=f"{share:.0%}", **slow, refresh=False)
        return Made(items, loader.bad_samples, loader.slow_pictures)


def _items(batch: ImageBatch, features: list[bytes]) -> Iterator[Item]:
    for at, feature in enumerate(features):
        yield Item(
            hash=digest(batch.encoded[at] or b""),
            feature=feature,
            key=batch.keys[at],
            source=batch.sources[at],
            shard=os.path.realpath(batch.files[at]),
            offset=batch.offsets[at],
            length=batch.lengths[at],
            captions=batch.captions[at],
            noise=batch.noise[at],
        )
