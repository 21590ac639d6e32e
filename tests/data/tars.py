"""Tars of random pictures, and a loader over them; a test that fails prints the seed of both."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from efficientclip import ImageLoader
from efficientclip.data.images import ImageBatch

SEED = int(np.random.default_rng().integers(2**31))
Files = Iterable[tuple[str, bytes]]


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some noise."""
    rng = np.random.default_rng([SEED, seed])
    y, x = np.mgrid[:height, :width] / 100
    phases = rng.uniform(0, 6, (3, 2))
    waves = np.stack([np.sin(x * 3 * (c + 1) + phases[c, 0]) * np.cos(y * 4 + phases[c, 1]) for c in range(3)], -1)
    pixels = 128 + 90 * waves + 40 * (np.sin(x * 7 + y * 9) > 0.3)[..., None] + rng.normal(0, 6, waves.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpegs(count: int, *, first: int = 0, size: int = 40) -> list[tuple[str, bytes]]:
    """Samples of captions "caption <number>", each of its own picture."""
    rng = np.random.default_rng([SEED, first, count])
    files = []
    for number in range(first, first + count):
        width, height = (int(side) for side in rng.integers(size // 2, size, 2))
        files.append((f"{number:06d}.jpg", encode(photograph(width, height, number), "JPEG")))
        files.append((f"{number:06d}.txt", f"caption {number}".encode()))
    return files


def loader(source: Any, **options: Any) -> ImageLoader:
    given: dict[str, Any] = {"batch_size": 16, "size": 32, "threads": 2, "seed": SEED, "shuffle_buffer": 30}
    return ImageLoader(source, **(given | options))


def numbers(batches: Iterable[ImageBatch]) -> list[int]:
    return [int(key) for batch in batches for key in batch.keys]
