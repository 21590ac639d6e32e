"""Sources: pictures with captions or labels, in the formats that data sets are handed out in, read into one record.

*.tar                       webdataset or img2dataset shards, one or a folder of them
X_imgs.tsv, X_texts.jsonl   Chinese-CLIP's: id<TAB>base64 picture; {"text_id", "text", "image_ids"}
*.json                      AI Challenger's [{"image_id", "caption": […]}] or COCO's {"images", "annotations"}
*.csv, *.tsv, *.parquet     a table with a column of picture paths and one of captions
*.parquet                   as `datasets` writes it, with the pictures themselves in a column
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Event
from typing import IO, Any

import numpy as np

from ..errors import UserError, writing
from .captions import RECODE, captions_of, escaped, is_utf8, numbered_lines
from .listing import Listing, Strings, ends_of
from .shards import IMAGE_SUFFIXES, BadSample
from .tables import (
    CAPTION_COLUMNS,
    KEY_COLUMNS,
    LABEL_COLUMNS,
    PICTURE_COLUMNS,
    SEPARATORS,
    SOURCE_COLUMNS,
    SUFFIXES,
    USUAL,
    Columns,
    Kind,
    column_count,
    header_of,
    named,
    picture_column,
    read_cells,
    read_table,
)

PART = 4096
IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
URL = re.compile(r"https?://\S+")
SHARD = re.compile(r"-?\d+(-of-\d+.*)?$")
BASE64_WORD = re.compile(r"[A-Za-z0-9+/_=-]{200,}")


@dataclass(frozen=True)
class Source:
    """Pictures with captions, to be read by `ImageLoader`: the tars `files`, or else what `listing` or `tables` name.

    A picture without captions stands in it only to be mistaken for another. `files` are those whose change makes it
    another source; `bad` are rows of text that make no picture. `tables` are the sources of a folder's files. `unpack`,
    of pictures in cells of a .parquet, lists them where they are written to. `fetch`, of a tar that is elsewhere, gives
    it as a local file until the event is set.
    """

    path: Path
    files: Sequence[Path]
    listing: Listing | None = None
    bad: Sequence[BadSample] = ()
    tables: Sequence[Source] = ()
    unpack: Callable[[Listing], Listing] | None = None
    fetch: Callable[[Event], IO[bytes]] | None = None

    @property
    def pictures(self) -> int | None:
        """How many, with the bad rows; None where only reading tells."""
        if self.tables:
            return sum(table.pictures or 0 for table in self.tables)
        return None if self.listing is None else len(self.listing) + len(self.bad)

    @property
    def elsewhere(self) -> bool:
        """Whether the pictures of a part are not at hand for the reader."""
        return self.unpack is not None or self.fetch is not None

    @property
    def identity(self) -> list[Any]:
        """Of a part that is a tar: changed with its content."""
        found = self.path.stat()
        return [os.path.realpath(self.path), found.st_size, found.st_mtime_ns]

    @property
    def parts(self) -> list[Source]:
        """The source in pieces, in order: a tar each, or PART pictures; the last one has the bad rows."""
        if self.tables:
            return [part for table in self.tables for part in table.parts]
        if self.fetch is not None:
            return [self]
        if self.listing is None:
            return [Source(tar, [tar]) for tar in self.files]
        starts = range(0, max(len(self.listing), 1), PART)
        parts = [replace(self, listing=self.listing.part(start, start + PART), bad=()) for start in starts]
        return [*parts[:-1], replace(parts[-1], bad=self.bad)]

    def place_of(self, picture: int, offset: int) -> tuple[str, int]:
        """(path, offset) by which a store names a picture of this part, which was read at `offset`."""
        if self.listing is None:
            return str(self.path), offset
        if self.listing.cells is not None and (cell := int(self.listing.cells[picture])) >= 0:
            return str(self.path), cell
        return os.fsdecode(self.listing.file_of(picture)), offset

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
    source: str = ""


def open_source(path: Path, images: Path | None = None, columns: Columns = USUAL) -> Source:
    """The pictures and captions at `path`; pictures that lie in files of their own are looked for under `images`.

    Without `images`, paths in a table start from the table's folder, and a .json finds its pictures in its own folder,
    the one above, or a folder in these. `columns` names those of a table. UserError, with file and line or field, when
    the file cannot be read; a caption or picture that cannot be read comes as a BadSample.
    """
    if not path.exists():
        raise UserError(f"source {path}: no such file or folder")
    if path.is_dir() and not is_tars(path):
        splits = sorted(path.glob(f"*{IMAGES}"))
        if not splits and (tables := sorted(path.glob("*.parquet"))):
            return _tables_source(path, tables, images, columns)
        if len(splits) != 1:
            held = f"several splits, name one: {', '.join(map(str, splits))}"
            held = held if splits else f"no .tar, no .parquet and no *{IMAGES}"
            raise UserError(f"source {path}: the folder holds {held}")
        path = splits[0]
    in_itself = is_tars(path) or path.name.endswith((IMAGES, TEXTS))
    check_folder(images, path, unused=in_itself)
    is_table = path.suffix in SUFFIXES and not in_itself
    if columns.given and not is_table:
        raise UserError(f"{columns.given[0]}: {path} is no table; leave it out")
    if is_tars(path):
        return Source(path, [path] if path.is_file() else sorted(path.glob("*.tar")))
    if path.name.endswith((IMAGES, TEXTS)):
        return _base64_source(path.with_name(path.name.removesuffix(TEXTS).removesuffix(IMAGES)))
    if path.suffix == ".json":
        return _json_source(path, images)
    if is_table:
        return _table_source(path, images, columns, CAPTION_COLUMNS)
    raise UserError(f"source {path}: unknown format; give .tar, *{IMAGES}, .json, .csv, .tsv or .parquet")


def open_labelled(path: Path, images: Path | None = None, columns: Columns = USUAL) -> Source:
    """Pictures whose only caption is their label: a folder a class, or a table with columns of paths and labels."""
    check_folder(images, path, unused=path.is_dir())
    if path.is_file():
        return _table_source(path, images, columns, LABEL_COLUMNS)
    if not path.is_dir():
        raise UserError(f"source {path}: no such file or folder; give a folder a class, or a table with a label column")
    entries = [
        replace(entry, captions=[Path(entry.key).parts[0]])
        for entry in _folder_entries(path)
        if len(Path(entry.key).parts) > 1
    ]
    return _source(path, [entry.file for entry in entries], entries)


def open_pictures(path: Path, images: Path | None = None, columns: Columns = USUAL) -> Source:
    """What `open_source` reads, and pictures without captions: a folder of them, or a table that only names them."""
    if path.is_dir() and not any(any(path.glob(f"*{held}")) for held in (".tar", IMAGES, ".parquet")):
        check_folder(images, path, unused=True)
        entries = _folder_entries(path)
        return _source(path, [entry.file for entry in entries], entries)
    if path.is_file() and path.suffix in SUFFIXES and not path.name.endswith(IMAGES):
        check_folder(images, path, unused=False)
        return _table_source(path, images, columns, CAPTION_COLUMNS, captioned=False)
    return open_source(path, images, columns)


def _folder_entries(path: Path) -> list[_Entry]:
    return [
        _Entry(key=escaped(file.relative_to(path).as_posix()), file=file)
        for file in sorted(path.rglob("*"))
        if _is_picture(file.name) and not file.name.startswith(".")
    ]


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
    lines = [line for _, line in islice(numbered_lines(path), 2)]
    for separator in SEPARATORS if lines else ():
        header = header_of(lines[0], separator)
        pictured = any(name in PICTURE_COLUMNS for name in header)
        captioned = any(name in CAPTION_COLUMNS for name in header)
        # In parallel text, too, an English side may be the word "image".
        if pictured and (captioned or (separator == "\t" and all(name.isascii() for name in header))):
            return False
    for number, cells in enumerate(([cell.strip() for cell in line.split("\t")] for line in lines), 1):
        if any(URL.fullmatch(cell) for cell in cells):
            raise UserError(
                f"source {path}, line {number}: holds a URL, so it is no parallel text; download the pictures first,"
                " for instance by img2dataset, and give the .tar files that it writes"
            )
        if any(_is_picture(cell) for cell in cells):
            raise UserError(
                f"source {path}, line {number}: names a picture file, but line 1 does not name the columns; let it be"
                f" a header with one of {', '.join(PICTURE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}, or name"
                " its own by --image-column and --caption-column"
            )
        if any(BASE64_WORD.fullmatch(cell) for cell in cells):
            raise UserError(
                f"source {path}, line {number}: holds base64, as Chinese-CLIP's pictures do; name it *{IMAGES} and put"
                f" *{TEXTS} beside it"
            )
    return True


def _tables_source(path: Path, files: list[Path], images: Path | None, columns: Columns) -> Source:
    """Of the shards of one split."""
    check_folder(images, path, unused=False)
    splits = sorted({SHARD.sub("", file.stem) for file in files})
    if len(splits) > 1:
        raise UserError(f"source {path}: holds several splits, {', '.join(splits)}; give each a folder of its own")
    sources = [_table_source(file, images, columns, CAPTION_COLUMNS) for file in files]
    return Source(path, files, tables=sources)


def _table_source(file: Path, images: Path | None, columns: Columns, texts: Kind, *, captioned: bool = True) -> Source:
    pictures, texts = named(columns.image, PICTURE_COLUMNS), named(columns.caption, texts)
    optional, folder = [SOURCE_COLUMNS, named(columns.key, KEY_COLUMNS)], images or file.parent
    wanted, optional = ([texts], optional) if captioned else ([], [texts, *optional])
    bad: list[BadSample] = []
    column = picture_column(file, pictures)
    if column is not None:
        rows, width = [], column_count(file)
        for row, (place, cells) in enumerate(read_table(file, *wanted, optional=optional)):
            text, source, key = cells or ("", "", "")
            try:
                captions = captions_of(text) if captioned or text else []
                rows.append(_Entry(key or place, file, row * width + column, captions=captions, source=source or ""))
            except ValueError as error:
                bad.append(BadSample(file.name, place, str(error)))
        return replace(_source(file, [file], rows, bad), unpack=partial(_unpacked, file, folder, column))
    entries: dict[tuple[str, ...], _Entry] = {}
    quoted = file.suffix != ".parquet"
    for place, cells in read_table(file, pictures, *wanted, optional=optional):
        try:
            if cells is None:
                raise ValueError("more or fewer cells than the header has")
            picture, text, source, key = cells
            captions = captions_of(text) if captioned or text else []
            _check_name(picture)
        except ValueError as error:
            bad.append(BadSample(file.name, place, str(error)))
            continue
        if quoted:
            _check_closed(file, place, captions)
        one = (picture, source or "", key or picture)
        entries.setdefault(one, _Entry(one[2], folder / picture, source=one[1])).captions.extend(captions)
    return _source(file, [file], entries.values(), bad)


def _unpacked(file: Path, folder: Path, column: int, packed: Listing) -> Listing:
    """Of pictures that lie in a column of `file`, as bytes or as {bytes, path}; their offsets are numbers of cells."""
    picture_of = {row: picture for picture, row in enumerate((packed.offset // column_count(file)).tolist())}
    where, cells = np.full((len(packed), 3), -1, np.int64), packed.offset.copy()
    first, last = min(picture_of, default=0), max(picture_of, default=-1)
    with writing(Path(gettempdir())):
        memory = TemporaryFile()  # noqa: SIM115
        files = [os.fsencode(f"/proc/self/fd/{memory.fileno()}")]
        for row, cell in enumerate(read_cells(file, column, first, last - first + 1), first):
            if (picture := picture_of.get(row)) is None:
                continue
            held = cell if isinstance(cell, dict) else {"bytes": cell}
            content, path = held.get("bytes"), held.get("path")
            if content:
                where[picture] = 0, memory.tell(), len(content)
                memory.write(content)
            elif path and "\0" not in path:
                where[picture], cells[picture] = (len(files), 0, -1), -1
                files.append(os.fsencode(folder / path))
        memory.flush()
    file_N, offset_N, length_N = np.ascontiguousarray(where.T)
    return replace(
        packed,
        files=Strings.of(files),
        file=file_N.astype(np.int32),
        offset=offset_N,
        length=length_N,
        cells=cells,
        memory=memory,
    )


def _check_name(picture: str) -> None:
    """ValueError, which tells why, where no file can have that name."""
    if not picture:
        raise ValueError("no picture named")
    if URL.match(picture):
        raise ValueError("picture is a URL, not a file")
    if BASE64_WORD.fullmatch(picture):
        raise ValueError("picture is base64, not a file")
    if "\0" in picture or not is_utf8(picture):
        raise ValueError("no file can have this name")


def _check_closed(file: Path, place: str, captions: list[str]) -> None:
    """UserError where a quote that is never closed made one caption of several lines."""
    for caption in captions:
        for line in caption.split("\n") if "\n" in caption else ():
            if any(_is_picture(cell) for cell in re.split(r"[,;|\t]", line)):
                raise UserError(
                    f"table {file}, {place}: a quote opens a caption of several lines, in which {line[:80]!r} is a row"
                    " of its own; double the quotes that belong to a text"
                )


def _is_picture(cell: str) -> bool:
    return Path(cell.strip()).suffix.lower().removeprefix(".") in IMAGE_SUFFIXES


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
    bad: list[BadSample] = []
    for number, line in numbered_lines(texts):
        if not line.strip():
            continue
        place = f"source {texts}, line {number}"
        record = _record(_parse(line, place), place, text_id=(int, str), text=object, image_ids=list)
        text_id = str(record["text_id"])
        if text_id in seen:
            raise UserError(f"{place}: text_id {text_id} stands on line {seen[text_id]}, too; take one out")
        seen[text_id] = number
        if not record["image_ids"]:
            raise UserError(
                f"{place}: image_ids is empty, as in test splits whose answers are not public; give another split"
            )
        named_images = list(map(str, dict.fromkeys(record["image_ids"])))
        for image in named_images:
            if image not in entries:
                raise UserError(f"{place}: image_ids names {image}, which {images} lacks; the files do not match")
        try:
            captions = captions_of(record["text"])
        except ValueError as error:
            bad.append(BadSample(texts.name, f"line {number}", str(error)))
            continue
        for image in named_images:
            _add(entries[image], captions, text_id)
    return _source(images, [images, texts], entries.values(), bad, base64=True)


def _add(entry: _Entry, captions: list[str], text_id: str) -> None:
    entry.captions += captions
    entry.text_ids += [text_id] if len(captions) == 1 else [f"{text_id}#{at}" for at in range(len(captions))]


def _json_source(file: Path, images: Path | None) -> Source:
    try:
        tree = _parse(file.read_text(encoding="utf-8-sig"), f"source {file}")
    except UnicodeDecodeError as error:
        raise UserError(f"source {file}: byte {error.start} is not UTF-8; {RECODE}") from error
    if isinstance(tree, list):
        entries, bad = _challenger_entries(file, tree)
    else:
        _record(tree, f"source {file}", images=list, annotations=list)
        entries, bad = _coco_entries(file, tree)
    folder = images
    for entry in entries.values():
        folder = folder or _picture_folder(file, entry.file)
        entry.file = folder / entry.file
    return _source(file, [file], entries.values(), bad)


def _challenger_entries(file: Path, tree: list[Any]) -> tuple[dict[str, _Entry], list[BadSample]]:
    entries: dict[str, _Entry] = {}
    bad: list[BadSample] = []
    for number, record in enumerate(tree):
        place = f"entry {number}"
        image = str(_record(record, f"source {file}, {place}", image_id=(str, int), caption=object)["image_id"])
        try:
            _check_name(image)
            captions = captions_of(record["caption"])
        except ValueError as error:
            bad.append(BadSample(file.name, place, str(error)))
            continue
        entry = entries.setdefault(image, _Entry(image, Path(image)))
        for caption in captions:
            _add(entry, [caption], f"{image}#{len(entry.text_ids)}")
    return entries, bad


def _coco_entries(file: Path, tree: dict[str, Any]) -> tuple[dict[str, _Entry], list[BadSample]]:
    entries: dict[str, _Entry] = {}
    bad: list[BadSample] = []
    misnamed: set[str] = set()
    for number, record in enumerate(tree["images"]):
        place = f"images[{number}]"
        image = str(_record(record, f"source {file}, {place}", id=(int, str), file_name=str)["id"])
        try:
            _check_name(record["file_name"])
            entries[image] = _Entry(escaped(image), Path(record["file_name"]))
        except ValueError as error:
            bad.append(BadSample(file.name, place, str(error)))
            misnamed.add(image)
    for number, record in enumerate(tree["annotations"]):
        place = f"annotations[{number}]"
        image = str(_record(record, f"source {file}, {place}", image_id=(int, str), caption=object)["image_id"])
        if image not in entries and image not in misnamed:
            raise UserError(f"source {file}, {place}: image_id {image} is not among images; mend or take out the entry")
        try:
            captions = captions_of(record["caption"])
        except ValueError as error:
            bad.append(BadSample(file.name, place, str(error)))
            continue
        if image in entries:
            _add(entries[image], captions, str(number))
    return entries, bad


def _picture_folder(file: Path, first: Path) -> Path:
    near = file.absolute().parent
    for above in (near, near.parent):
        for folder in (above, *sorted(path for path in above.iterdir() if path.is_dir())):
            if (folder / first).is_file():
                return folder
    raise UserError(f"source {file}: its first picture, {first}, lies in no folder near it; give --images FOLDER")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON, {error}; mend it or copy the file again") from error


def _record(record: Any, place: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """`record`, if it has these fields of these types and no text among them is blank; an `object` may be anything."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with {', '.join(fields)}")
    for name, kind in fields.items():
        value = record.get(name)
        blank = kind is not object and isinstance(value, str) and not value.strip()
        if name not in record or not isinstance(value, kind) or blank:
            raise UserError(f"{place}: field {name} is missing, empty or of the wrong type; mend or take out the entry")
    return record


def _source(
    path: Path, files: list[Path], entries: Iterable[_Entry], bad: Sequence[BadSample] = (), *, base64: bool = False
) -> Source:
    listed = list(entries)
    if not listed and not bad:
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
        sources=Strings.of(entry.source.encode("utf-8", "surrogatepass") for entry in listed),
        captions=Strings.of(caption.encode("utf-8", "surrogatepass") for entry in listed for caption in entry.captions),
        caption_ends=ends_of(len(entry.captions) for entry in listed),
        text_ids=Strings.of(text_ids) if text_ids else None,
    )
    return Source(path, files, listing, bad)


def require_few(
    source: str | Path, causes: Counter[str], first: str, samples: int, max_bad_share: float, remedy: str
) -> None:
    """UserError where more than `max_bad_share` of the samples were bad, or all; `first` names one of them."""
    bad = causes.total()
    if bad > max_bad_share * samples or bad == samples:
        counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
        raise UserError(
            f"source {source}: {bad / samples:.1%} of {samples} samples are bad ({counts}; first: {first}),"
            f" data.max_bad_share is {max_bad_share:.1%}; {remedy}"
        )
