"""Pictures for the image tower: decode, resize the short side, centre crop, normalise."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

# As in csrc/picture.hpp.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def decode_square(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [size, size, 3]; transparency lies over white. Raises OSError or ValueError on a broken picture."""
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise OSError(str(error)) from error
    if picture.size != (size, size):
        # The box that torchvision's Resize and CenterCrop leave, as in csrc/transform.cpp.
        short = min(picture.size)
        (left, right), (top, bottom) = (_middle(side, short, size) for side in picture.size)
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(picture)


def _middle(side: int, short: int, size: int) -> tuple[float, float]:
    """Where the crop begins and ends on one side of a picture, in its own pixels."""
    scaled = int(size * side / short)
    edge = round((scaled - size) / 2)
    return edge * side / scaled, min((edge + size) * side / scaled, side)


def normalise(pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """Pixels uint8 [M, S, S, 3] to normalised float [M, 3, S, S]."""
    return standardise(pixels.permute(0, 3, 1, 2).float() / 255, mean, std)


def standardise(
    planes: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Planes [M, 3, S, S] in 0..1 to mean 0 and deviation 1, by the tower's figures for each channel."""
    return (planes - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
