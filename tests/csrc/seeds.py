"""Small shards and pictures of every kind, for mutations to start from: seeds.py FOLDER."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_seeds(folder: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(0, 60, (40, 48, 3))
    slope = np.add.outer(np.arange(40) * 5, np.arange(48) * 3)[..., None]
    picture = Image.fromarray((slope + noise).clip(0, 255).astype(np.uint8))
    transparent = picture.copy()
    transparent.putalpha(picture.convert("L"))
    turned = Image.Exif()
    turned[0x112] = 6
    kinds = {
        "exif.jpg": (picture, {"exif": turned}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "grey.jpg": (picture.convert("L"), {}),
        "rgba.png": (transparent, {}),
        "palette.png": (picture.quantize(16), {"transparency": 2}),
        "exif.png": (picture.convert("L"), {"exif": turned}),
        "lossless.webp": (transparent, {"lossless": True, "exif": turned}),
        "lossy.webp": (picture, {}),
        "moving.webp": (picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
    }
    for name, (kind, options) in kinds.items():
        kind.save(folder / name, **options)
    grey = (folder / "grey.jpg").read_bytes()
    for name, tar_format in {"gnu.tar": tarfile.GNU_FORMAT, "pax.tar": tarfile.PAX_FORMAT}.items():
        with tarfile.open(folder / name, "w", format=tar_format) as tar:
            for key in ("a", "图" * 60 + "/b"):
                for suffix, content in {
                    "jpg": grey,
                    "txt": "标题".encode(),
                    "json": rb'{"caption": "x", "captions": [{"text": "\u00e9"}, "b"], "n": [1e5, -0.5]}',
                }.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [folder / name for name in (*kinds, "gnu.tar", "pax.tar")]


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
