"""Sources: pictures with captions or labels, in the formats that data sets are handed out in, read into one record.

*.tar                       webdataset or img2dataset shards, one or a folder of them
X_imgs.tsv, X_texts.jsonl   Chinese-CLIP's: id<TAB>base64 picture; {"text_id", "text", "image_ids"}
*.json                      AI Challenger's [{"image_id", "caption": […]}] or COCO's {"images", "annotations"}
*.csv, *.tsv, *.parquet     a table with a column of picture paths and one of captions
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..errors import UserError, reading
from .listing import Listing, Strings, ends_of
from .shards import IMAGE_SUFFIXES

PART = 4096
IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
PICTURE_COLUMNS = ("image", "image_path", "path", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "title")
LABEL_COLUMNS = ("label",)
BASE64_WORD = re.compile(r"[A-Za-z0-9+/_=-]{200,}")


@dataclass(frozen=True)
class Source:
    """Pictures with captions, to be read by `ImageLoader`: the tars `files`, or else what `listing` names.

    A picture without captions stands in it only to be mistaken for another. `files` are those whose change makes it
    another source; `pictures` is their number, None where only reading tells.
    """

    path: Path
    files: Sequence[Path]
    listing: Listing | None = None

    @property
    def pictures(self) -> int | None:
        return None if self.listing is None else len(self.listing)

    @property
    def parts(self) -> list[Source]:
        """The source in pieces, in order: a tar each, or PART pictures."""
        if self.listing is None:
            return [Source(tar, [tar]) for tar in self.files]
        starts = range(0, len(self.listing), PART)
        return [Source(self.path, self.files, self.listing.part(start, start + PART)) for start in starts]

    def file_of(self, picture: int) -> str:
        """The path of the file in which a picture of this part lies."""
        return str(self.path) if self.listing is None else os.fsdecode(self.listing.file_of(picture))

    def text_ids_of(self, picture: int) -> list[str]:
        """The ids of a picture's captions; none where the source has none."""
        return [] if self.listing is None else self.listing.text_ids_of(picture)


@dataclass
class _Entry:
    """A picture that is not read yet; `length` -1: the whole file."""

    key: str
    file: Path
    offset: int = 0
    length: int = -1
    captions: list[str] = field(default_factory=list)
    text_ids: list[str] = field(default_factory=list)


def open_source(path: Path, images: Path | None = None) -> Source:
    """The pictures and captions at `path`; pictures that lie in files of their own are looked for under `images`.

    Without `images`, paths in a table start from the table's folder, and a .json finds its pictures in its own folder,
    the one above, or a folder in these. UserError, with file and line or field, when the captions cannot be read;
    a picture that cannot be read comes as a BadSample.
    """
    if not path.exists():
        raise UserError(f"source {path}: no such file or folder")
    if path.is_dir() and not is_tars(path):
        splits = sorted(path.glob(f"*{IMAGES}"))
        if len(splits) != 1:
            held = f"several splits, name one: {', '.join(map(str, splits))}" if splits else f"no .tar and no *{IMAGES}"
            raise UserError(f"source {path}: the folder holds {held}")
        path = splits[0]
    in_itself = is_tars(path) or path.name.endswith((IMAGES, TEXTS))
    check_folder(images, path, unused=in_itself)
    if is_tars(path):
        return Source(path, [path] if path.is_file() else sorted(path.glob("*.tar")))
    if path.name.endswith((IMAGES, TEXTS)):
        return _base64_source(path.with_name(path.name.removesuffix(TEXTS).removesuffix(IMAGES)))
    if path.suffix == ".json":
        return _source(path, [path], _json_entries(path, images))
    if path.suffix in (".csv", ".tsv", ".parquet"):
        return _source(path, [path], _table_entries(path, images, CAPTION_COLUMNS))
    raise UserError(f"source {path}: unknown format; give .tar, *{IMAGES}, .json, .csv, .tsv or .parquet")


def open_labelled(path: Path, images: Path | None = None) -> Source:
    """Pictures whose only caption is their label: a folder a class, or a table with columns of paths and labels."""
    check_folder(images, path, unused=path.is_dir())
    if path.is_file():
        return _source(path, [path], _table_entries(path, images, LABEL_COLUMNS))
    if not path.is_dir():
        raise UserError(f"source {path}: no such file or folder; give a folder a class, or a table with a label column")
    entries = [
        _Entry(key=file.relative_to(path).as_posix(), file=file, captions=[folder.name])
        for folder in sorted(path.iterdir())
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    return _source(path, [entry.file for entry in entries], entries)


def check_folder(images: Path | None, path: Path, *, unused: bool) -> None:
    """UserError when `images` is no folder, or `unused`: the pictures of `path` lie in itself."""
    if images is not None and unused:
        raise UserError(f"--images {images}: {path} holds its pictures itself; leave --images out")
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such folder; give the one where the picture paths in {path} start")


def is_tars(path: Path) -> bool:
    """Whether `path` is a tar or a folder of them."""
    return path.suffix == ".tar" if path.is_file() else any(path.glob("*.tar"))


def is_parallel(path: Path) -> bool:
    """Whether the .tsv at `path` is zh<TAB>en text, and neither a table with a header nor Chinese-CLIP's pictures.

    UserError when it holds pictures, but in no form that is read.
    """
    if path.suffix != ".tsv" or not path.is_file() or path.name.endswith(IMAGES):
        return False
    first = [[cell.strip() for cell in line.split("\t")] for _, line in islice(_lines(path), 2)]
    header = [cell.strip('"').lower() for cell in first[0]] if first else []
    pictured = any(cell in PICTURE_COLUMNS for cell in header)
    # In parallel text, too, an English side may be the word "image".
    if pictured and (any(cell in CAPTION_COLUMNS for cell in header) or all(cell.isascii() for cell in header)):
        return False
    for number, cells in enumerate(first, 1):
        if any(Path(cell).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES for cell in cells):
            raise UserError(
                f"source {path}, line {number}: names a picture file, but line 1 does not name the columns; let it be"
                f" a header with one of {', '.join(PICTURE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
            )
        if any(BASE64_WORD.fullmatch(cell) for cell in cells):
            raise UserError(
                f"source {path}, line {number}: holds base64, as Chinese-CLIP's pictures do; name it *{IMAGES} and put"
                f" *{TEXTS} beside it"
            )
    return True


def read_table(file: Path, *kinds: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of each row of a .csv, .tsv or .parquet; `kinds` are the names each wanted column may have.

    UserError when a column is missing or there twice, a cell is empty, or a line is broken.
    """
    if not file.is_file():
        raise UserError(f"table {file}: no such file")
    rows = _parquet_rows(file, kinds) if file.suffix == ".parquet" else _text_rows(file, kinds)
    for place, cells in rows:
        for cell, kind in zip(cells, kinds, strict=True):
            if not cell:
                raise UserError(f"table {file}, {place}: empty {' or '.join(kind)}; fill it in or take the row out")
        yield place, cells


def _parquet_rows(file: Path, kinds: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, list[str]]]:
    with reading("table", file, "it is not whole, or no Parquet; write it anew, or copy it again"):
        names = pq.read_schema(file).names
        columns = [names[_column(file, names, kind)] for kind in kinds]
        table = pq.read_table(file, columns=columns)
    for number, cells in enumerate(zip(*(table[name].to_pylist() for name in columns), strict=True), 1):
        yield f"row {number}", ["" if cell is None else str(cell).strip() for cell in cells]


def _text_rows(file: Path, kinds: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, list[str]]]:
    lines = csv.reader(
        (line for _, line in _lines(file)), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True
    )
    try:
        header = next(lines, [])
        columns = [_column(file, header, kind) for kind in kinds]
        for row in lines:
            if row and len(row) != len(header):
                raise UserError(
                    f"table {file}, line {lines.line_num}: {len(row)} cells under a header of {len(header)};"
                    " put cells that hold the separator in double quotes"
                )
            if row:
                yield f"line {lines.line_num}", [row[column].strip() for column in columns]
    except csv.Error as error:
        raise UserError(f"table {file}, line {lines.line_num}: {error}") from error


def _column(file: Path, names: list[str], kind: tuple[str, ...]) -> int:
    found = [number for number, name in enumerate(names) if name.strip().lower() in kind]
    if len(found) != 1:
        raise UserError(f"table {file}: columns {', '.join(names)}; exactly one must be named {' or '.join(kind)}")
    return found[0]


def _table_entries(file: Path, images: Path | None, texts: tuple[str, ...]) -> Iterable[_Entry]:
    entries: dict[str, _Entry] = {}
    for _, (picture, text) in read_table(file, PICTURE_COLUMNS, texts):
        entry = entries.setdefault(picture, _Entry(picture, (images or file.parent) / picture))
        entry.captions.append(text)
    return entries.values()


def _base64_source(stem: Path) -> Source:
    images, texts = stem.with_name(stem.name + IMAGES), stem.with_name(stem.name + TEXTS)
    for file in (images, texts):
        if not file.is_file():
            raise UserError(f"source {file}: no such file; *{IMAGES} and *{TEXTS} belong together")
    entries: dict[str, _Entry] = {}
    offset = 0
    with images.open("rb") as stream:
        for number, row in enumerate(stream, 1):
            key, tab, picture = row.partition(b"\t")
            name = key.decode("utf-8", "replace").strip()
            if not tab or not name or name in entries:
                fault = f"image id {name} stands there twice" if name in entries else "not id<TAB>base64 picture"
                raise UserError(f"source {images}, line {number}: {fault}; mend or take out the line")
            entries[name] = _Entry(name, images, offset + len(key) + 1, len(picture.rstrip()))
            offset += len(row)
    seen: dict[str, int] = {}
    for number, line in _lines(texts):
        if not line.strip():
            continue
        place = f"source {texts}, line {number}"
        record = _record(_parse(line, place), place, text_id=(int, str), text=str, image_ids=list)
        text_id = str(record["text_id"])
        if text_id in seen:
            raise UserError(f"{place}: text_id {text_id} stands on line {seen[text_id]}, too; take one out")
        seen[text_id] = number
        if not record["image_ids"]:
            raise UserError(
                f"{place}: image_ids is empty, as in test splits whose answers are not public; give another split"
            )
        for image in map(str, dict.fromkeys(record["image_ids"])):
            if image not in entries:
                raise UserError(f"{place}: image_ids names {image}, which {images} lacks; the files do not match")
            entries[image].captions.append(record["text"].strip())
            entries[image].text_ids.append(text_id)
    return _source(images, [images, texts], entries.values(), base64=True)


def _json_entries(file: Path, images: Path | None) -> Iterable[_Entry]:
    try:
        tree = _parse(file.read_text(encoding="utf-8-sig"), f"source {file}")
    except UnicodeDecodeError as error:
        raise UserError(f"source {file}: byte {error.start} is not UTF-8; convert it with iconv -t UTF-8") from error
    if isinstance(tree, list):
        entries = _challenger_entries(file, tree)
    else:
        _record(tree, f"source {file}", images=list, annotations=list)
        entries = _coco_entries(file, tree)
    folder = images
    for entry in entries.values():
        folder = folder or _picture_folder(file, entry.file)
        entry.file = folder / entry.file
    return entries.values()


def _challenger_entries(file: Path, tree: list[Any]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for number, record in enumerate(tree):
        place = f"source {file}, entry {number}"
        image = str(_record(record, place, image_id=(str, int), caption=list)["image_id"])
        entry = entries.setdefault(image, _Entry(image, Path(image)))
        for caption in record["caption"]:
            entry.captions.append(_record({"caption": caption}, place, caption=str)["caption"].strip())
            entry.text_ids.append(f"{image}#{len(entry.text_ids)}")
    return entries


def _coco_entries(file: Path, tree: dict[str, Any]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for number, record in enumerate(tree["images"]):
        _record(record, f"source {file}, images[{number}]", id=(int, str), file_name=str)
        entries[str(record["id"])] = _Entry(str(record["id"]), Path(record["file_name"]))
    for number, record in enumerate(tree["annotations"]):
        place = f"source {file}, annotations[{number}]"
        image = str(_record(record, place, image_id=(int, str), caption=str)["image_id"])
        if image not in entries:
            raise UserError(f"{place}: image_id {image} is not among images; mend or take out the entry")
        entries[image].captions.append(record["caption"].strip())
        entries[image].text_ids.append(str(number))
    return entries


def _picture_folder(file: Path, first: Path) -> Path:
    near = file.absolute().parent
    for above in (near, near.parent):
        for folder in (above, *sorted(path for path in above.iterdir() if path.is_dir())):
            if (folder / first).is_file():
                return folder
    raise UserError(f"source {file}: its first picture, {first}, lies in no folder near it; give --images FOLDER")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}, line {number}: not UTF-8; convert the file with iconv -t UTF-8") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON, {error}; mend it or copy the file again") from error


def _record(record: Any, place: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """`record`, if it has these fields of these types and no text among them is blank."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with {', '.join(fields)}")
    for name, kind in fields.items():
        value = record.get(name)
        if not isinstance(value, kind) or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{place}: field {name} is missing, empty or of the wrong type; mend or take out the entry")
    return record


def _source(path: Path, files: list[Path], entries: Iterable[_Entry], *, base64: bool = False) -> Source:
    listed = list(entries)
    if not listed:
        raise UserError(f"source {path}: no picture in it")
    number_of: dict[Path, int] = {}
    file = np.array([number_of.setdefault(entry.file, len(number_of)) for entry in listed], np.int32)
    text_ids = [text_id.encode("utf-8", "surrogatepass") for entry in listed for text_id in entry.text_ids]
    listing = Listing(
        files=Strings.of(map(os.fsencode, number_of)),
        file=file,
        offset=np.array([entry.offset for entry in listed], np.int64),
        length=np.array([entry.length for entry in listed], np.int64),
        base64=base64,
        keys=Strings.of(entry.key.encode("utf-8", "surrogatepass") for entry in listed),
        captions=Strings.of(caption.encode("utf-8", "surrogatepass") for entry in listed for caption in entry.captions),
        caption_ends=ends_of(len(entry.captions) for entry in listed),
        text_ids=Strings.of(text_ids) if text_ids else None,
    )
    return Source(path, files, listing)
