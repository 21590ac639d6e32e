"""Pictures of the concepts, each style's own, as squares of one size, and their shards."""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..files.atomic import write_atomically
from .concepts import HELD_OUT_STYLE, TRAIN_STYLES, Concept, Picture


def render(cache: Path, packages: dict[str, Path], concepts: list[Concept], size: int) -> dict[str, dict[str, bytes]]:
    """Square RGB PNGs over white, by style and concept key."""
    pngs = {}
    for style in (*TRAIN_STYLES, HELD_OUT_STYLE):
        file = cache / f"{style}-{size}.tar"
        if not file.is_file():
            wanted = {concept.key for concept in concepts}
            sources = _sources(style, packages, concepts)
            drawn = {
                key: square(content, size)
                for key, content in tqdm(sources, total=len(concepts), desc=f"pictures, {style}", unit="picture")
                if key in wanted
            }
            write_tar(file, [(f"{key}.png", content) for key, content in sorted(drawn.items())])
        with tarfile.open(file) as tar:
            pngs[style] = {
                member.name.removesuffix(".png"): stream.read()
                for member in tar
                if (stream := tar.extractfile(member)) is not None
            }
    return pngs


def _sources(style: str, packages: dict[str, Path], concepts: list[Concept]) -> Iterator[tuple[str, bytes]]:
    """(concept key, PNG or SVG) of one style."""
    package = packages[{"openmoji": "openmoji", "fluent": "fluentui-emoji"}.get(style, f"emoji-datasource-{style}")]
    by_slug: dict[str, str] = {}
    for concept in concepts:
        by_slug.setdefault(slug(concept.english[0]), concept.key)
    folder = {"openmoji": "package/color/svg/", "fluent": "package/icons/modern/"}.get(
        style, f"package/img/{style}/64/"
    )
    seen: set[str] = set()
    with tarfile.open(package) as tar:
        for member in tar:
            if not member.name.startswith(folder) or member.name.count("/") != folder.count("/"):
                continue
            stem = member.name.removeprefix(folder).rpartition(".")[0].lower()
            if style == "fluent":
                key = by_slug.get(stem) or by_slug.get(stem.removesuffix("-default"), "")
            else:
                key = "-".join(point for point in stem.split("-") if point != "fe0f")
            stream = tar.extractfile(member)
            if key and key not in seen and stream is not None:
                seen.add(key)
                yield key, stream.read()


def slug(name: str) -> str:
    """An English name as a file is called by it."""
    plain = "".join(c for c in unicodedata.normalize("NFD", name.lower()) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("’", "").replace("'", "")).strip("-")


def square(content: bytes, size: int) -> bytes:
    """A PNG or SVG as an RGB PNG of that edge, over white."""
    if not content.startswith(b"\x89PNG"):
        # An optional dependency, whose absence check_tools reports.
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=size, height=size))
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA")
    edge = max(picture.size)
    ground = Image.new("RGBA", (edge, edge), "white")
    ground.alpha_composite(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    if edge != size:
        ground = ground.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    ground.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, split: str, pictures: Iterable[Picture]) -> None:
    """A webdataset tar of `key.png` and `key.json`, the same bytes for the same input."""
    members = []
    for picture in pictures:
        key = f"{picture.style}-{picture.concept.key}"
        record = {
            "captions": picture.captions,
            "captions_en": list(picture.concept.english),
            "source": picture.style,
            "concept": picture.concept.key,
            "subgroup": picture.concept.subgroup,
            "split": split,
        }
        members += [
            (f"{key}.png", picture.png),
            (f"{key}.json", json.dumps(record, ensure_ascii=False).encode()),
        ]
    write_tar(path, members)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """The same bytes for the same (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write_atomically(path, buffer.getvalue())
