"""Pictures as towers see them: decoded and cut square by the C++ loader, then normalised."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .. import _loader


def decode_square(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [size, size, 3], as `ImageLoader` with `train=False` makes it. ValueError where it is no picture."""
    return _loader.decode_square(encoded, size)


def normalise(pixels: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> torch.Tensor:
    """Pixels uint8 [M, S, S, 3] to normalised float [M, 3, S, S]."""
    return standardise(pixels.permute(0, 3, 1, 2).float() / 255, mean, std)


def standardise(
    planes: torch.Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> torch.Tensor:
    """Planes [M, 3, S, S] in 0..1 to mean 0 and deviation 1, by the tower's figures for each channel."""
    return (planes - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
