"""Sources: pictures with captions or labels, in the formats that data sets are handed out in, read into one record.

*.tar                       webdataset or img2dataset shards, one or a folder of them
X_imgs.tsv, X_texts.jsonl   Chinese-CLIP's: id<TAB>base64 picture; {"text_id", "text", "image_ids"}
*.json                      AI Challenger's [{"image_id", "caption": […]}] or COCO's {"images", "annotations"}
*.csv, *.tsv, *.parquet     a table with a column of picture paths and one of captions
*.parquet                   as `datasets` writes it, with the pictures themselves in a column

Each of them may lie anywhere that fsspec reaches (s3://, gs://, hf://, https://), a tar may be what a command writes
(pipe:COMMAND), and several tars or .parquet may be named by braces and globs.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import IO, Any

import numpy as np

from ..errors import ShardError, UserError
from ..files.places import URL, Location, is_pattern, location
from .cache import Cache, fetch
from .captions import RECODE, captions_of, escaped, is_utf8, numbered_lines
from .listing import Listing, Strings, ends_of
from .remote import Described, described, expanded, inside, opened
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
    read_table,
)
from .unpack import fetched, unpacked

PART = 4096
IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
# How the names of files end that make a folder a source.
KINDS = (".tar", IMAGES, ".parquet")
WEB = re.compile(r"https?://\S+")
SHARD = re.compile(r"-?\d+(-of-\d+.*)?$")
BASE64_WORD = re.compile(r"[A-Za-z0-9+/_=-]{200,}")


@dataclass(frozen=True)
class Source:
    """Pictures with captions, to be read by `ImageLoader`: the tars `files`, or else what `listing` or `tables` name.

    A picture without captions stands in it only to be mistaken for another. `files` are those whose change makes it
    another source; `bad` are rows of text that make no picture. `tables` are the sources of a folder's files. `unpack`,
    of pictures in cells of a .parquet or in remote files, lists them where they are written to. `fetch`, of a tar that
    is elsewhere, gives it as a local file, or a ShardError soon after the event is set. Remote tars stay in `cache`.
    """

    path: Location
    files: Sequence[Location]
    listing: Listing | None = None
    bad: Sequence[BadSample] = ()
    tables: Sequence[Source] = ()
    unpack: Callable[[Listing, Event], Listing] | None = None
    fetch: Callable[[Event], IO[bytes]] | None = None
    cache: Cache | None = None

    @property
    def of_tars(self) -> bool:
        return self.listing is None and not self.tables

    @property
    def names_texts(self) -> bool:
        """Whether captions have ids, by which equal ones are told apart."""
        return any(part.listing is not None and part.listing.text_ids is not None for part in (self, *self.tables))

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

    def identity(self, stop: Event | None = None) -> Described | None:
        """Of a part that is a tar: changed with its content; None where nothing tells, or it cannot be had."""
        with suppress(ShardError):
            found = described(self.path, stop)
            return found if found.changed else None
        return None

    @property
    def parts(self) -> list[Source]:
        """The source in pieces, in order: a tar each, or PART pictures; the last one has the bad rows."""
        if self.tables:
            return [part for table in self.tables for part in table.parts]
        if self.fetch is not None:
            return [self]
        if self.listing is None:
            away: dict[Location, Callable[[Event], IO[bytes]]] = {
                tar: partial(fetch, tar, self.cache) for tar in self.files if isinstance(tar, URL)
            }
            return [Source(tar, [tar], fetch=away.get(tar)) for tar in self.files]
        starts = range(0, max(len(self.listing), 1), PART)
        parts = [replace(self, listing=self.listing.part(start, start + PART), bad=()) for start in starts]
        return [*parts[:-1], replace(parts[-1], bad=self.bad)]

    def place_of(self, picture: int, offset: int) -> tuple[str, int]:
        """(path, offset) by which a store names a picture of this part, which was read at `offset`."""
        if self.listing is None:
            return str(self.path), offset
        if self.listing.cells is not None and (cell := int(self.listing.cells[picture])) >= 0:
            return str(self.path), cell
        if self.listing.places is not None and (place := self.listing.places[picture]):
            return os.fsdecode(place), 0
        return os.fsdecode(self.listing.file_of(picture)), offset

    def text_ids_of(self, picture: int) -> list[str]:
        """The ids of a picture's captions; none where the source has none."""
        return [] if self.listing is None else self.listing.text_ids_of(picture)


@dataclass
class _Entry:
    """A picture that is not read yet; `length` -1: the whole file."""

    key: str
    file: Location
    offset: int = 0
    length: int = -1
    captions: list[str] = field(default_factory=list)
    text_ids: list[str] = field(default_factory=list)
    source: str = ""


def open_source(
    source: str | Path, images: Location | None = None, columns: Columns = USUAL, cache: Cache | None = None
) -> Source:
    """The pictures and captions at `source`; pictures that lie in files of their own are looked for under `images`.

    Without `images`, paths in a table start from the table's folder, and a .json finds its pictures in its own folder,
    where that is local also in the one above, or a folder in these. `columns` names those of a table. Remote tars are
    kept in `cache`, if there is one. UserError, with file and line or field, when the file cannot be read; a caption or
    picture that cannot be read comes as a BadSample.
    """
    path = location(source)
    if isinstance(path, Path) and not path.exists() and not is_pattern(path):
        raise UserError(f"source {path}: no such file or folder")
    path, held = _held(path)
    tars = [path] if held is None and path.suffix == ".tar" else _of_kind(held, ".tar")
    in_itself = bool(tars) or path.name.endswith((IMAGES, TEXTS))
    if held is not None and not tars:
        splits = _of_kind(held, IMAGES)
        if not splits and (tables := _of_kind(held, ".parquet")):
            return _tables_source(path, tables, images, columns)
        if len(splits) != 1:
            found = f"several splits, name one: {', '.join(map(str, splits))}"
            found = found if splits else f"no .tar, no .parquet and no *{IMAGES}"
            raise UserError(f"source {path}: the folder holds {found}")
        path, in_itself = splits[0], True
    check_folder(images, path, unused=in_itself)
    is_table = path.suffix in SUFFIXES and not in_itself
    if columns.given and not is_table:
        raise UserError(f"{columns.given[0]}: {path} is no table; leave it out")
    if tars:
        if any(isinstance(tar, URL) and tar.piped and not tar.removeprefix("pipe:").strip() for tar in tars):
            raise UserError(f"source {path}: names no command; give pipe:COMMAND, which writes a tar")
        return Source(path, tars, cache=cache)
    if path.name.endswith((IMAGES, TEXTS)):
        return _base64_source(path.with_name(path.name.removesuffix(TEXTS).removesuffix(IMAGES)), cache)
    if path.suffix == ".json":
        return _json_source(path, images)
    if is_table:
        return _table_source(path, images, columns, CAPTION_COLUMNS)
    raise UserError(f"source {path}: unknown format; give .tar, *{IMAGES}, .json, .csv, .tsv or .parquet")


def _held(path: Location) -> tuple[Location, Sequence[Location] | None]:
    """What `path` stands for, and the files of that where it is a folder or several files."""
    if is_pattern(path):
        files = expanded(path)
        if len(files) == 1:
            return _held(files[0])
        if {file.suffix for file in files} not in ({".tar"}, {".parquet"}):
            raise UserError(f"source {path}: stands for {len(files)} files; let all be .tar, or all .parquet")
        return path, files
    if isinstance(path, URL):
        return path, None if path.suffix in (".tar", ".json", ".jsonl", *SUFFIXES) else inside(path)
    return path, sorted(path.iterdir()) if path.is_dir() else None


def _of_kind(files: Sequence[Location] | None, ending: str) -> list[Location]:
    return [file for file in files or () if file.name.endswith(ending)]


def open_labelled(path: Location, images: Location | None = None, columns: Columns = USUAL) -> Source:
    """Pictures whose only caption is their label: a folder a class, or a table with columns of paths and labels."""
    check_folder(images, path, unused=isinstance(path, Path) and path.is_dir())
    if isinstance(path, URL) or path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"source {path}: no table; give a .csv, .tsv or .parquet, or a local folder a class")
        return _table_source(path, images, columns, LABEL_COLUMNS)
    if not path.is_dir():
        raise UserError(f"source {path}: no such file or folder; give a folder a class, or a table with a label column")
    entries = [
        replace(entry, captions=[Path(entry.key).parts[0]])
        for entry in _folder_entries(path)
        if len(Path(entry.key).parts) > 1
    ]
    return _source(path, [entry.file for entry in entries], entries)


def is_table(path: Location) -> bool:
    """Whether it is one table, of names of pictures or of pictures, and no more than one file."""
    single = not is_pattern(path) and (isinstance(path, URL) or path.is_file())
    return single and path.suffix in SUFFIXES and not path.name.endswith(IMAGES)


def open_pictures(
    path: Location, images: Location | None = None, columns: Columns = USUAL, cache: Cache | None = None
) -> Source:
    """What `open_source` reads, and pictures without captions: a folder of them, or a table that only names them."""
    if isinstance(path, Path) and path.is_dir() and not any(_of_kind(sorted(path.iterdir()), kind) for kind in KINDS):
        check_folder(images, path, unused=True)
        entries = _folder_entries(path)
        return _source(path, [entry.file for entry in entries], entries)
    if is_table(path):
        check_folder(images, path, unused=False)
        return _table_source(path, images, columns, CAPTION_COLUMNS, captioned=False)
    return open_source(path, images, columns, cache)


def _folder_entries(path: Path) -> list[_Entry]:
    return [
        _Entry(key=escaped(file.relative_to(path).as_posix()), file=file)
        for file in sorted(path.rglob("*"))
        if _is_picture(file.name) and not file.name.startswith(".")
    ]


def check_folder(images: Location | None, path: Location, *, unused: bool) -> None:
    """UserError when `images` is no folder, or `unused`: the pictures of `path` lie in itself."""
    if images is not None and unused:
        raise UserError(f"--images {images}: {path} holds its pictures itself; leave --images out")
    if isinstance(images, Path) and not images.is_dir():
        raise UserError(f"--images {images}: no such folder; give the one where the picture paths in {path} start")


def is_parallel(path: Location) -> bool:
    """Whether the .tsv at `path` is zh<TAB>en text, and neither a table with a header nor Chinese-CLIP's pictures.

    UserError when it holds pictures, but in no form that is read.
    """
    if path.suffix != ".tsv" or path.name.endswith(IMAGES) or (isinstance(path, Path) and not path.is_file()):
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
        if any(WEB.fullmatch(cell) for cell in cells):
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


def _tables_source(path: Location, files: list[Location], images: Location | None, columns: Columns) -> Source:
    """Of the shards of one split."""
    check_folder(images, path, unused=False)
    splits = sorted({SHARD.sub("", file.stem) for file in files})
    if len(splits) > 1:
        raise UserError(f"source {path}: holds several splits, {', '.join(splits)}; give each a folder of its own")
    sources = [_table_source(file, images, columns, CAPTION_COLUMNS) for file in files]
    return Source(path, files, tables=sources)


def _table_source(
    file: Location, images: Location | None, columns: Columns, texts: Kind, *, captioned: bool = True
) -> Source:
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
        return replace(_source(file, [file], rows, bad), unpack=partial(unpacked, file, folder, column))
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
    return _beside(_source(file, [file], entries.values(), bad), folder)


def _beside(source: Source, folder: Location) -> Source:
    """Pictures in files of their own, in `folder`: remote ones are fetched before they are read."""
    return replace(source, unpack=fetched) if isinstance(folder, URL) else source


def _check_name(picture: str) -> None:
    """ValueError, which tells why, where no file can have that name."""
    if not picture:
        raise ValueError("no picture named")
    if WEB.match(picture):
        raise ValueError("picture is a URL, not a file")
    if BASE64_WORD.fullmatch(picture):
        raise ValueError("picture is base64, not a file")
    if "\0" in picture or not is_utf8(picture):
        raise ValueError("no file can have this name")


def _check_closed(file: Location, place: str, captions: list[str]) -> None:
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


def _base64_source(stem: Location, cache: Cache | None) -> Source:
    images, texts = stem.with_name(stem.name + IMAGES), stem.with_name(stem.name + TEXTS)
    for file in (images, texts):
        if isinstance(file, Path) and not file.is_file():
            raise UserError(f"source {file}: no such file; *{IMAGES} and *{TEXTS} belong together")
    entries: dict[str, _Entry] = {}
    offset = 0
    stream = fetch(images, cache) if isinstance(images, URL) else images.open("rb")
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
    source = _source(images, [images, texts], entries.values(), bad, base64=True)
    if source.listing is None or not isinstance(images, URL):
        stream.close()
        return source
    memory, cells = Strings.of([os.fsencode(f"/proc/self/fd/{stream.fileno()}")]), source.listing.offset
    return replace(source, listing=replace(source.listing, files=memory, memory=stream, cells=cells))


def _add(entry: _Entry, captions: list[str], text_id: str) -> None:
    entry.captions += captions
    entry.text_ids += [text_id] if len(captions) == 1 else [f"{text_id}#{at}" for at in range(len(captions))]


def _json_source(file: Location, images: Location | None) -> Source:
    try:
        with opened(file) as stream:
            tree = _parse(stream.read().decode("utf-8-sig"), f"source {file}")
    except UnicodeDecodeError as error:
        raise UserError(f"source {file}: byte {error.start} is not UTF-8; {RECODE}") from error
    if isinstance(tree, list):
        entries, bad = _challenger_entries(file, tree)
    else:
        _record(tree, f"source {file}", images=list, annotations=list)
        entries, bad = _coco_entries(file, tree)
    folder = images or (file.parent if isinstance(file, URL) else None)
    for entry in entries.values():
        folder = folder or _picture_folder(Path(file), Path(entry.file))
        entry.file = folder / entry.file
    return _beside(_source(file, [file], entries.values(), bad), folder or Path())


def _challenger_entries(file: Location, tree: list[Any]) -> tuple[dict[str, _Entry], list[BadSample]]:
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


def _coco_entries(file: Location, tree: dict[str, Any]) -> tuple[dict[str, _Entry], list[BadSample]]:
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
    path: Location,
    files: list[Location],
    entries: Iterable[_Entry],
    bad: Sequence[BadSample] = (),
    *,
    base64: bool = False,
) -> Source:
    listed = list(entries)
    if not listed and not bad:
        raise UserError(f"source {path}: no picture in it")
    number_of: dict[Location, int] = {}
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
    source: str | Location, causes: Counter[str], first: str, samples: int, max_bad_share: float, remedy: str
) -> None:
    """UserError where more than `max_bad_share` of the samples were bad, or all; `first` names one of them."""
    bad = causes.total()
    if bad > max_bad_share * samples or bad == samples:
        counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
        raise UserError(
            f"source {source}: {bad / samples:.1%} of {samples} samples are bad ({counts}; first: {first}),"
            f" data.max_bad_share is {max_bad_share:.1%}; {remedy}"
        )
