"""Pictures with captions through the frozen image tower, in parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from ..config import Config
from ..data import sources
from ..data.cache import Cache
from ..data.images import ImageBatch
from ..data.remote import Described, at_once, described
from ..data.sources import Source, open_source
from ..data.tables import USUAL, Columns
from ..errors import ShardError, UserError
from ..files.places import Location, resolved
from ..model.frozen import FrozenImages, image_tower_name
from .parts import Item, Made, digest
from .recipe import Part, Recipe, fp16_rows


def picture_recipe(
    sources_of: Mapping[str, Location], config: Config, images: Location | None = None, columns: Columns = USUAL
) -> Recipe:
    """Of what `open_source` reads, by the name of the source; those of "" are of what their samples say."""
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(lambda: FrozenImages(config))
    files: list[Location] = []
    known: list[Described | None] = []
    parts: list[Part] = []
    counts: list[int | None] = []
    outside = False
    for source_name, path in sources_of.items():
        opened = open_source(path, images, columns, Cache.of(config.data))
        told = list(at_once(_described, opened.files))
        refused = {file: one for file, one in zip(opened.files, told, strict=True) if isinstance(one, ShardError)}
        found = [one if isinstance(one, Described) else None for one in told]
        shards: Sequence[Location | None]
        if opened.of_tars:
            shards = opened.files
            named: list[list[Any]] = [[name, one or str(tar)] for tar, one in zip(opened.files, found, strict=True)]
        else:
            for why in refused.values():
                raise why
            folder = None if images is None else resolved(images)
            named = [[name, *found, folder, sources.PART, *columns.given, at] for at in range(len(opened.parts))]
            shards = [None] * len(named)
        for of, part, shard in zip(named, opened.parts, shards, strict=True):
            whole = [*of, {"source": source_name}] if source_name else of
            make = partial(_made, encoder, part, source_name)
            if shard in refused:
                # Read all the same, nothing would tell later whether it has changed.
                make = partial(_refuse, refused[shard])
            parts.append(Part(whole, make, shard))
        files += opened.files
        known += found
        counts.append(opened.pictures)
        outside |= not opened.of_tars
    total = None if None in counts else sum(count or 0 for count in counts)
    return Recipe(files, known, name, parts, total, outside)


def _described(file: Location) -> Described | ShardError:
    try:
        return described(file)
    except ShardError as error:
        return error


def _refuse(why: ShardError, _: Any) -> Made:
    raise why


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
            shard=resolved(batch.files[at]),
            offset=batch.offsets[at],
            length=batch.lengths[at],
            captions=batch.captions[at],
            noise=batch.noise[at],
        )
