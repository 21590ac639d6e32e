"""What happens to files at rest: a bit flips, an end is cut off, a file is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Damage = Callable[[Path, np.random.Generator], str]


def flip(file: Path, random: np.random.Generator) -> str:
    """One bit."""
    content = bytearray(file.read_bytes())
    bit = int(random.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    _overwrite(file, bytes(content))
    return f"bit {bit} of {8 * len(content)}"


def cut(file: Path, random: np.random.Generator) -> str:
    """To a random length, often to nothing."""
    content = file.read_bytes()
    length = 0 if random.random() < 0.3 else int(random.integers(len(content)))
    _overwrite(file, content[:length])
    return f"cut to {length} of {len(content)} bytes"


def remove(file: Path, random: np.random.Generator) -> str:
    file.unlink()
    return "removed"


DAMAGES: dict[str, Damage] = {"flip": flip, "cut": cut, "removed": remove}


def _overwrite(file: Path, content: bytes) -> None:
    # In place: another inode would be another file to whoever holds it open.
    with file.open("r+b") as stream:
        stream.truncate(len(content))
        stream.write(content)


def whole_files(folder: Path) -> list[Path]:
    """Files with any content under `folder`, in a fixed order."""
    if folder.is_file():
        return [folder]
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.is_symlink() and file.stat().st_size
    )
