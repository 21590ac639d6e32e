"""Pictures as towers see them: decoded and cut square by the C++ loader, then normalised."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import _loader

# As in csrc/picture.hpp.
MAX_PIXELS = 100_000_000
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def decode_square(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [size, size, 3], as `ImageLoader` with `train=False` makes it. ValueError where it is no picture."""
    return _loader.decode_square(encoded, size, by_pillow)


def by_pillow(encoded: bytes) -> tuple[int, int, bytes] | str:
    """(width, height, RGBA pixels) of a picture that is no JPEG, PNG or WebP, or why it cannot be used.

    The slow path of the C++ decoder, whose threads call it. Of a moving picture it is the first frame.
    """
    _add_heic()
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return "image too large"
            picture = _turned(opened)
            if picture.mode.startswith("I;16"):
                # The upper eight bits, where Pillow would make white of all above 255.
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return *picture.size, picture.convert("RGBA").tobytes()
    except UnidentifiedImageError:
        heic = encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC_BRANDS
        return "HEIC image, which needs pillow-heif" if heic else "undecodable image"
    except Image.DecompressionBombError:
        return "image too large"
    except Exception as error:
        # Pillow's readers raise whatever their parsing meets.
        return "truncated image" if "truncated" in str(error).lower() else "undecodable image"


def suffix_of(encoded: bytes) -> str:
    """What its file is called in a tar, by its content. ValueError where it is no picture."""
    _add_heic()
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            name = (opened.format or "").lower()
    except OSError as error:
        raise ValueError(str(error)) from error
    # A JPEG of several pictures has a format of its own.
    return name if name in _loader.IMAGE_SUFFIXES else "jpg"


def _turned(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        # Broken EXIF is no reason to refuse the pixels; broken pixels fail again.
        return picture


@cache
def _add_heic() -> None:
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def normalise(pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """Pixels uint8 [M, S, S, 3] to normalised float [M, 3, S, S]."""
    return standardise(pixels.permute(0, 3, 1, 2).float() / 255, mean, std)


def standardise(
    planes: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Planes [M, 3, S, S] in 0..1 to mean 0 and deviation 1, by the tower's figures for each channel."""
    return (planes - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
