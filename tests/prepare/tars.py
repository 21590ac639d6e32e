"""Tiny tars and tables of pictures with captions."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.formats import files

CAPTIONS = {0: ["猫", "红鸟"], 1: ["狗"], 2: ["猫"]}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(number: int, caption: str = "猫") -> dict[str, bytes]:
    return {f"{number:03d}.png": png(number), f"{number:03d}.txt": caption.encode()}


def write_shards(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        write_tar(folder / f"{number}.tar", good(2 * number) | good(2 * number + 1))
    return folder


def as_table(folder: Path, pictures: Mapping[int, bytes], suffix: str = ".csv") -> Path:
    files(folder / "images", {f"{n}.png": content for n, content in pictures.items()})
    rows = [(f"images/{n}.png", caption) for n, captions in CAPTIONS.items() for caption in captions]
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(("image", "caption"), zip(*rows, strict=True), strict=True))), file)
    else:
        separator = "," if suffix == ".csv" else "\t"
        file.write_text("".join(separator.join(row) + "\n" for row in [("Image", "caption"), *rows]), encoding="utf-8")
    return file
