"""Arrays larger than memory, in files that nobody sees and that end with the process."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import writing


def scratch(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path | None = None) -> npt.NDArray[Any]:
    """An array in a file without a name, in `folder` or TMPDIR.

    Its room is taken at once: a mapped page that finds the disk full would kill the process.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size == 0:
        return np.empty(shape, dtype)
    place = folder or Path(gettempdir())
    with writing(place), TemporaryFile(dir=place) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "r+", shape=shape)
