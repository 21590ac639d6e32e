"""`efficientclip encode MODEL SOURCE OUT`: features of pictures and texts, for search by any vector database."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .. import __version__
from ..data.cache import Cache
from ..data.captions import numbered_lines, stripped
from ..data.sources import check_folder, open_pictures
from ..data.tables import USUAL, Columns
from ..errors import UserError
from ..files.aside import clear_aside, made_aside
from ..files.atomic import written_aside
from ..files.ownership import MADE_BY, claim, claim_file
from ..files.places import Location
from .evaluate import caption_features
from .exported import is_exported, open_model
from .run import BAD_SHARDS, TEXTS_AT_ONCE, Run, is_store, open_data

Format = Literal["parquet", "npy", "faiss"]
# Rows of a row group; of each kind as many are held at most.
ROWS = 1 << 14
NAMES = {"image": "images", "text": "texts"}
FILES = [f"{name}.{ending}" for name in NAMES.values() for ending in ("npy", "faiss", "txt")]


@dataclass(frozen=True)
class Part:
    """Rows of one kind, `features` L2-normalised [n, D]. A picture's caption is its first; without one it has None."""

    kind: Literal["image", "text"]
    keys: list[str]
    captions: list[str | None]
    features: npt.NDArray[np.float16]


class Writer(Protocol):
    def write(self, part: Part) -> None: ...


def encode(
    model: Path,
    source: Location,
    out: Path,
    form: Format = "parquet",
    images: Location | None = None,
    columns: Columns = USUAL,
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """Write the features of all pictures and texts of `source` to `out`; {"image": rows, "text": rows, "left_out": …}.

    `model` is a run or what `open_model` opens. `source` is a store, what `open_pictures` reads, or plain text (.txt),
    a text a line, whose keys are the numbers of the lines. Each caption of a picture is a text under its key. Bad
    samples are left out under data.max_bad_share of the run. Rows are written as they are made: memory holds some
    thousand, but for faiss, whose index holds all.
    """
    # oneDNN keeps what it made for each number of tokens, by default 1,024 times: gigabytes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    out_of = _parquet if form == "parquet" else _folder
    bad, rows = Counter[str](), Counter[str]()
    opening = out_of(model, source, out, form, replace)
    run = open_model(model)
    with opening as writer:
        for part in _parts(run, source, images, columns, bad):
            writer.write(part)
            rows[part.kind] += len(part.keys)
    return {**{kind: rows[kind] for kind in NAMES}, "left_out": dict(bad)}


def _parts(run: Run, source: Location, images: Location | None, columns: Columns, bad: Counter[str]) -> Iterator[Part]:
    text = source.suffix == ".txt"
    if text or is_store(source):
        check_folder(images, source, unused=True)
        if columns.given:
            raise UserError(f"{columns.given[0]}: {source} is no table; leave it out")
        yield from _lines(run, source) if text else _stored(run, source, bad)
        return
    waiting: list[tuple[str, str]] = []
    opened = open_pictures(source, images, columns, Cache.of(run.config.data))
    for batch, features_MD in run.encode_source(opened, bad):
        shown = [captions[0] if captions else None for captions in batch.captions]
        yield Part("image", batch.keys, shown, features_MD.astype(np.float16))
        waiting += [(key, text) for key, captions in zip(batch.keys, batch.captions, strict=True) for text in captions]
        while len(waiting) >= TEXTS_AT_ONCE:
            yield _texts(run, waiting[:TEXTS_AT_ONCE])
            del waiting[:TEXTS_AT_ONCE]
    if waiting:
        yield _texts(run, waiting)


def _lines(run: Run, source: Location) -> Iterator[Part]:
    waiting: list[tuple[str, str]] = []
    found = False
    with tqdm(desc=source.name, unit="text") as bar:
        for number, line in numbered_lines(source):
            if text := stripped(line):
                waiting.append((str(number), text))
            if len(waiting) == TEXTS_AT_ONCE:
                yield _texts(run, waiting)
                bar.update(len(waiting))
                found, waiting = True, []
        if waiting:
            yield _texts(run, waiting)
            bar.update(len(waiting))
        elif not found:
            raise UserError(f"source {source}: empty, no text found")


def _texts(run: Run, keyed: list[tuple[str, str]]) -> Part:
    keys, texts = [key for key, _ in keyed], [text for _, text in keyed]
    return Part("text", keys, [*texts], run.encode_texts(texts).astype(np.float16))


def _stored(run: Run, source: Location, bad: Counter[str]) -> Iterator[Part]:
    """Each image of a store under the key and caption of its first pair, and the caption of each pair as a text."""
    if is_exported(run.folder):
        raise UserError(
            f"store {source}: holds features of a run's own image tower, which an export does not tell; give the run as"
            " MODEL, or the pictures as SOURCE"
        )
    with open_data(run, source) as store, tqdm(total=len(store), desc=store.path.name, unit="pair") as bar:
        bad.update(store.manifest.get("bad_counts", {}))
        bad.update({BAD_SHARDS: len(found)} if (found := store.manifest.get("bad_shards")) else {})
        text_KD, told_I = caption_features(run, store), np.zeros(len(store.features), bool)
        for table in store.pair_tables(["key", "caption", "image_id", "caption_id", "length"]):
            for start in range(0, len(table), ROWS):
                pairs = table.slice(start, ROWS)
                keys, captions = pairs["key"].to_pylist(), pairs["caption"].to_pylist()
                image_N, first = pairs["image_id"].to_numpy(), dict[int, int]()
                # A teacher's sentence is no picture.
                for at in np.flatnonzero(~told_I[image_N] & (pairs["length"].to_numpy() > 0)).tolist():
                    first.setdefault(int(image_N[at]), at)
                told_I[[*first]] = True
                if first:
                    places = first.values()
                    named = [keys[at] for at in places], [captions[at] for at in places]
                    yield Part("image", *named, store.features[[*first]])
                yield Part("text", keys, captions, text_KD[pairs["caption_id"].to_numpy()].astype(np.float16))
                bar.update(len(pairs))


def _parquet(model: Path, source: Location, out: Path, form: Format, replace: bool) -> AbstractContextManager[Writer]:
    if os.path.realpath(out) == os.path.realpath(source):
        raise UserError(f"{out}: is the source, which stays as it is; name another file")
    target = claim_file(out, "table", replace=replace)

    @contextmanager
    def opened() -> Iterator[Writer]:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as aside, ExitStack() as files:
            writer = _Table(aside, files)
            yield writer
            writer.end()

    return opened()


def _folder(model: Path, source: Location, out: Path, form: Format, replace: bool) -> AbstractContextManager[Writer]:
    faiss = None
    if form == "faiss":
        try:
            faiss = import_module("faiss")
        except ImportError as error:
            raise UserError("--format faiss: the package faiss-cpu is not installed; pip install faiss-cpu") from error

    def claimed() -> None:
        sources = [model, *([source] if isinstance(source, Path) else [])]
        claim(out, "features", sources=sources, existing="replace" if replace else "refuse", files=FILES)

    clear_aside(out, "features", "encoding")
    claimed()

    @contextmanager
    def opened() -> Iterator[Writer]:
        with made_aside(out, "features", "encoding", claimed) as folder, ExitStack() as files:
            writer = _Indexes(folder, files, faiss) if faiss else _Arrays(folder, files)
            yield writer
            writer.end()
            files.close()

    return opened()


class _Table:
    """Columns key, caption, kind and feature; a row group has rows of one kind."""

    def __init__(self, file: Path, files: ExitStack) -> None:
        self._file, self._files = file, files
        self._writer: pq.ParquetWriter | None = None
        self._held: dict[str, list[pa.RecordBatch]] = {kind: [] for kind in NAMES}

    def write(self, part: Part) -> None:
        width = part.features.shape[1]
        schema = pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                ("caption", pa.string()),
                pa.field("kind", pa.string(), nullable=False),
                pa.field("feature", pa.list_(pa.float16(), width), nullable=False),
            ],
            {"made_by": f"{MADE_BY} {__version__}"},
        )
        if self._writer is None:
            made = pq.ParquetWriter(self._file, schema, use_dictionary=["kind"])
            self._writer = self._files.enter_context(made)
        features = pa.FixedSizeListArray.from_arrays(pa.array(part.features.ravel()), width)
        columns = [
            pa.array(part.keys),
            pa.array(part.captions, pa.string()),
            pa.repeat(part.kind, len(part.keys)),
            features,
        ]
        held = self._held[part.kind]
        held.append(pa.RecordBatch.from_arrays(columns, schema=schema))
        if sum(map(len, held)) >= ROWS:
            self._flush(held)

    def end(self) -> None:
        for held in self._held.values():
            self._flush(held)

    def _flush(self, held: list[pa.RecordBatch]) -> None:
        if held and self._writer is not None:
            self._writer.write_table(pa.Table.from_batches(held))
        held.clear()


class _Arrays:
    """images.npy, texts.npy, and beside each a .txt, whose lines are the rows' keys and, behind a tab, captions."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._folder, self._files = folder, files
        self._lines: dict[str, IO[str]] = {}
        self._rows: dict[str, IO[bytes]] = {}
        self._shape: dict[str, tuple[int, int]] = {}

    def write(self, part: Part) -> None:
        name = NAMES[part.kind]
        if name not in self._lines:
            lines = (self._folder / f"{name}.txt").open("w", encoding="utf-8", newline="\n")
            self._lines[name] = self._files.enter_context(lines)
            self._shape[name] = (0, part.features.shape[1])
        for cells in zip(part.keys, part.captions, strict=True):
            # White space within would make a line or a cell of its own.
            shown = (" ".join(cell.split()) for cell in cells if cell is not None)
            self._lines[name].write("\t".join(shown) + "\n")
        self._add(name, part.features)
        rows, width = self._shape[name]
        self._shape[name] = (rows + len(part.keys), width)

    def end(self) -> None:
        for name, file in self._rows.items():
            file.seek(0)
            self._head(name, file)

    def _add(self, name: str, features_ND: npt.NDArray[np.float16]) -> None:
        if name not in self._rows:
            self._rows[name] = self._files.enter_context((self._folder / f"{name}.npy").open("wb"))
            self._head(name, self._rows[name])
        self._rows[name].write(np.ascontiguousarray(features_ND).data)

    def _head(self, name: str, file: IO[bytes]) -> None:
        # NumPy leaves room in it for the number of rows to grow.
        told = {"descr": "<f2", "fortran_order": False, "shape": self._shape[name]}
        np.lib.format.write_array_header_1_0(file, told)


class _Indexes(_Arrays):
    """images.faiss and texts.faiss, IndexFlatIP, whose ids are the lines of the .txt from 0."""

    def __init__(self, folder: Path, files: ExitStack, faiss: Any) -> None:
        super().__init__(folder, files)
        self._faiss, self._indexes = faiss, dict[str, Any]()

    def _add(self, name: str, features_ND: npt.NDArray[np.float16]) -> None:
        if name not in self._indexes:
            self._indexes[name] = self._faiss.IndexFlatIP(features_ND.shape[1])
        self._indexes[name].add(features_ND.astype(np.float32))

    def end(self) -> None:
        for name, index in self._indexes.items():
            self._faiss.write_index(index, str(self._folder / f"{name}.faiss"))
