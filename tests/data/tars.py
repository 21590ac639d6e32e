"""Tars of random pictures, a loader over them, and what Pillow makes of a picture; a test prints the seed of all."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from efficientclip import ImageLoader
from efficientclip.data.images import ImageBatch
from efficientclip.data.pictures import decode_square

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


def rgb(encoded: bytes) -> Image.Image:
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def pillow_square(encoded: bytes, size: int) -> np.ndarray:
    """What Hugging Face's processors of CLIP make of it: its short side resized (bicubic, antialiased), then cut."""
    picture = rgb(encoded)
    short = min(picture.size)
    picture = picture.resize(tuple(int(size * side / short) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def two_passes(picture: Image.Image, size: int) -> list[np.ndarray]:
    """Resize and crop of the middle in double precision, whole bytes after each pass: rows first, and columns first."""
    short, weights = min(picture.size), []
    for side in picture.size:
        scaled = int(size * side / short)
        scale = side / scaled
        centres = ((scaled - size) // 2 + np.arange(size) + 0.5) * scale
        x = np.abs((np.arange(side) + 0.5 - centres[:, None]) / max(scale, 1))
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        filtered = np.where(x < 1, near, np.where(x < 2, far, 0))
        weights.append(filtered / filtered.sum(1, keepdims=True))
    across, down = weights
    passes = ("xk,jkc->jxc", across), ("yj,jxc->yxc", down)

    def done(order: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
        pixels = np.asarray(picture, np.float64)
        for subscripts, by in order:
            pixels = np.clip(np.floor(np.einsum(subscripts, by, pixels) + 0.5), 0, 255)
        return pixels

    return [done(passes), done(passes[::-1])]


def check_square(found: np.ndarray, encoded: bytes, size: int, name: str) -> None:
    """The loader's square is that of two passes, rows of the turned picture first, and Pillow's are those of either
    order, by cost: rounding and clipping between the passes let the order tell."""
    orders = two_passes(rgb(encoded), size)
    np.testing.assert_array_equal(decode_square(encoded, size), found)
    for made, of in ((found, orders[:1]), (pillow_square(encoded, size), orders)):
        error = min((np.abs(made - order) for order in of), key=np.max)
        assert error.mean() < 0.4 and error.max() <= 2, name


def squares(folder: Path, files: dict[str, bytes], **options: Any) -> dict[str, np.ndarray]:
    """Each file by its name, through the loader, as uint8 [size, size, 3]."""
    write_tar(folder / "squares.tar", files.items())
    found = {}
    with loader(
        folder / "squares.tar", **({"train": False, "captions": False, "dtype": torch.uint8} | options)
    ) as batches:
        for batch in batches:
            found |= {key: image.permute(1, 2, 0).numpy() for key, image in zip(batch.keys, batch.images, strict=True)}
        assert batches.bad_samples == []
    return {name: found[name.split(".")[0]] for name in files}
