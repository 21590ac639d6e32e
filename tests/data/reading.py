"""All samples of a source, as `ImageLoader` hands them out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientclip import ImageLoader
from efficientclip.data.shards import BadSample
from efficientclip.data.sources import Source
from efficientclip.files.places import Location, location


@dataclass(frozen=True)
class Sample:
    key: str
    image: bytes
    shard: Location
    offset: int
    length: int
    captions: list[str]
    text_ids: list[str]
    source: str


def opened(source: Source | Path, **options: Any) -> ImageLoader:
    given: dict[str, Any] = {"batch_size": 2, "size": 8, "train": False, "captions": False, "keep_encoded": True}
    return ImageLoader(source, **(given | options))


def read(source: Source | Path) -> tuple[list[Sample], list[BadSample]]:
    """The good ones in their order, and the bad ones."""
    samples = []
    with opened(source) as loader:
        for batch in loader:
            for at, image in enumerate(batch.encoded):
                place = location(batch.files[at]), batch.offsets[at], batch.lengths[at]
                said = batch.captions[at], batch.text_ids[at], batch.sources[at]
                assert batch.noise[at] == [None] * len(batch.captions[at])
                samples.append(Sample(batch.keys[at], image or b"", *place, *said))
        return samples, loader.bad_samples
