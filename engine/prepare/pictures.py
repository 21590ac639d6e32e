"""Pictures with captions through the frozen image tower, in parts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..config import Config
from ..data import sources
from ..data.images import ImageBatch
from ..data.sources import Source, is_tars, open_source
from ..data.tables import USUAL, Columns
from ..errors import UserError
from ..model.frozen import FrozenImages, image_tower_name
from .parts import Item, Made, digest
from .recipe import Part, Recipe, described, fp16_rows


def picture_recipe(
    sources_of: Mapping[str, Path], config: Config, images: Path | None = None, columns: Columns = USUAL
) -> Recipe:
    """Of what `open_source` reads, by the name of the source; those of "" are of what their samples say."""
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(lambda: FrozenImages(config))
    files: list[Path] = []
    parts: list[Part] = []
    counts: list[int | None] = []
    for source_name, path in sources_of.items():
        opened = open_source(path, images, columns)
        if is_tars(path):
            known: list[list[Any]] = [[name, described(tar)] for tar in opened.files]
        else:
            folder = None if images is None else os.path.realpath(images)
            of = [name, *map(described, opened.files), folder, sources.PART, *columns.given]
            known = [[*of, number] for number in range(len(opened.parts))]
        for of, part in zip(known, opened.parts, strict=True):
            named = [*of, {"source": source_name}] if source_name else of
            parts.append(Part(named, partial(_made, encoder, part, source_name)))
        files += opened.files
        counts.append(opened.pictures)
    total = None if None in counts else sum(count or 0 for count in counts)
    return Recipe(files, name, parts, total, outside=not all(map(is_tars, sources_of.values())))


def _made(load: Callable[[], FrozenImages], part: Source, source_name: str, bar: Any) -> Made:
    items: list[Item] = []
    encoder = load()
    started = time.perf_counter()
    with encoder.loader(part, keep_encoded=True) as loader:
        for batch in loader:
            rows = encoder.encode_pixels(batch.images)
            places = [f"picture {key} of {file}" for key, file in zip(batch.keys, batch.files, strict=True)]
            items += _items(batch, fp16_rows(rows, places), source_name)
            bar.update(len(batch))
            share = loader.waited_seconds / max(time.perf_counter() - started, 1e-9)
            slow = {"by_pillow": loader.slow_pictures} if loader.slow_pictures else {}
            bar.set_postfix(waited_for_data=f"{share:.0%}", **slow, refresh=False)
        return Made(items, loader.bad_samples, loader.slow_pictures)


def _items(batch: ImageBatch, features: list[bytes], source_name: str) -> Iterator[Item]:
    for at, feature in enumerate(features):
        yield Item(
            hash=digest(batch.encoded[at] or b""),
            feature=feature,
            key=batch.keys[at],
            source=source_name or batch.sources[at],
            shard=os.path.realpath(batch.files[at]),
            offset=batch.offsets[at],
            length=batch.lengths[at],
            captions=batch.captions[at],
            noise=batch.noise[at],
        )
