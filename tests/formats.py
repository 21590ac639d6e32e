"""Writers of small data sets in the formats that they are handed out in."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: int = 16) -> bytes:
    """A PNG of random pixels."""
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def chinese_clip(folder: Path, split: str, pictures: Mapping[Any, bytes], texts: Sequence[Mapping[str, Any]]) -> Path:
    """SPLIT_imgs.tsv, which is returned, and SPLIT_texts.jsonl."""
    images = folder / f"{split}_imgs.tsv"
    rows = (f"{name}\t{base64.b64encode(content).decode()}\n" for name, content in pictures.items())
    images.write_text("".join(rows))
    lines = (json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    (folder / f"{split}_texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return images


def files(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Each picture as the file of its name."""
    for name, content in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
