"""Pictures with captions through the frozen image tower, in parts."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NoReturn

import pyarrow as pa

from ..config import Config
from ..data import sources
from ..data.cache import Cache
from ..data.images import ImageBatch, ImageLoader
from ..data.remote import Described, at_once, described
from ..data.shards import BadSample
from ..data.sources import Source, open_source
from ..data.tables import USUAL, Columns
from ..errors import ShardError, UserError
from ..files.places import Location, resolved
from ..hardware import cores_of_rank
from ..model.frozen import FrozenImages, image_tower_name
from .parts import Making, batch_of
from .recipe import Part, Recipe, fp16_rows


def picture_recipe(
    sources_of: Mapping[str, Location], config: Config, images: Location | None = None, columns: Columns = USUAL
) -> Recipe:
    """Of what `open_source` reads, by the name of the source; those of "" are of what their samples say."""
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(partial(_encoder, config))
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
        pieces = opened.parts
        if opened.of_tars:
            shards = opened.files
            sizes = [max(0, one.size) if one else 0 for one in found]
            named: list[list[Any]] = [[name, one or str(tar)] for tar, one in zip(opened.files, found, strict=True)]
        else:
            for why in refused.values():
                raise why
            folder = None if images is None else resolved(images)
            of_part = [_part_of(piece, found, at) for at, piece in enumerate(pieces)]
            # Equal parts, of a table that repeats itself, are told apart by their order.
            times = Counter[str]()
            named = []
            for one in of_part:
                named.append([name, *one, folder, *columns.given, times[str(one)]])
                times[str(one)] += 1
            shards = [None] * len(named)
            sizes = [piece.pictures or 0 for piece in pieces]
        for of, piece, shard, size in zip(named, pieces, shards, sizes, strict=True):
            whole = [*of, {"source": source_name}] if source_name else of
            make: Callable[[], Making] = partial(_Pictures, encoder, piece, source_name)
            if shard in refused:
                # Read all the same, nothing would tell later whether it has changed.
                make = partial(_refuse, refused[shard])
            parts.append(Part(whole, make, size, shard))
        files += opened.files
        known += found
        counts.append(opened.pictures)
        outside |= not opened.of_tars
    total = None if None in counts else sum(count or 0 for count in counts)
    return Recipe(files, known, name, parts, total, outside)


def _encoder(config: Config) -> FrozenImages:
    """UserError where the tower has no space of its own."""
    frozen = FrozenImages(config)
    if frozen.drawn:
        raise UserError(
            f"model.image_tower.pretrained: {frozen.tower.pretrained} has no projection, and a random one would be the"
            " space that texts learn; make it one by `efficientclip fit-head`, and name that run here"
        )
    return frozen


def _part_of(piece: Source, found: Sequence[Described | None], at: int) -> list[Any]:
    """What a part of a table is known by: its rows and pictures, where these lie beside it, so that of a longer table
    what is new is made alone; else its files."""
    if piece.listing is None or not piece.listing.of_files:
        return [*found, sources.PART, at]
    used, state = piece.listing.used, hashlib.sha256()
    for place in range(len(used.ends) - 1):
        # Remote ones are known by their names alone.
        with suppress(OSError, ValueError):
            told = os.stat(used[place])
            state.update(f"{place} {told.st_size} {told.st_mtime_ns}".encode())
    return [piece.listing.digest(), state.hexdigest(), [[bad.key, bad.cause] for bad in piece.bad]]


def _described(file: Location) -> Described | ShardError:
    try:
        return described(file)
    except ShardError as error:
        return error


def _refuse(why: ShardError) -> NoReturn:
    raise why


def _place(batch: ImageBatch, row: int) -> str:
    return f"picture {batch.keys[row]} of {batch.files[row]}"


class _Pictures:
    """A part of pictures on its way through the tower."""

    def __init__(self, load: Callable[[], FrozenImages], part: Source, source_name: str) -> None:
        self._load, self._part, self._source_name = load, part, source_name
        self._loader: ImageLoader | None = None
        self._resolved: dict[str, str] = {}
        self.bad: list[BadSample] = []
        self.slow = 0

    def start(self) -> None:
        self._begun().start()

    def batches(self, bar: Any) -> Iterator[pa.RecordBatch]:
        loader, started = self._begun(), time.perf_counter()
        for batch in loader:
            features_MD = self._load().encode_pixels(batch.images)
            yield self._columns(batch, fp16_rows(features_MD, partial(_place, batch)))
            bar.update(len(batch))
            share = loader.waited_seconds / max(time.perf_counter() - started, 1e-9)
            slow = {"by_pillow": loader.slow_pictures} if loader.slow_pictures else {}
            bar.set_postfix(waited_for_data=f"{share:.0%}", **slow, refresh=False)
        self.bad, self.slow = loader.bad_samples, loader.slow_pictures

    def _begun(self) -> ImageLoader:
        if self._loader is None:
            self._loader = self._load().loader(self._part, keep_encoded=True, threads=cores_of_rank())
        return self._loader

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _columns(self, batch: ImageBatch, features_MD: Any) -> pa.RecordBatch:
        for file in {*batch.files} - self._resolved.keys():
            self._resolved[file] = resolved(file)
        return batch_of(
            features_MD,
            [encoded or b"" for encoded in batch.encoded],
            key=batch.keys,
            source=[self._source_name] * len(batch) if self._source_name else batch.sources,
            shard=[self._resolved[file] for file in batch.files],
            offset=batch.offsets,
            length=batch.lengths,
            captions=batch.captions,
            noise=batch.noise,
        )
