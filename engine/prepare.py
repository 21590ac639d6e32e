"""`efficientclip prepare`: pictures, parallel text or plain text become a store, once, resumably and atomically."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .config import Config
from .data.images import ImageBatch, ImageLoader
from .data.shards import BadSample, Sample
from .data.sources import CAPTION_COLUMNS, PICTURE_COLUMNS, is_parallel, is_tars, open_source
from .data.store import (
    FORMAT,
    PAIR_FILES,
    TEXT_FILES,
    finish,
    read_manifest,
    staging,
    token_dtype,
    write_ids,
    write_tokens,
)
from .data.tokenizer import fingerprint, load_tokenizer
from .errors import UserError
from .files.atomic import write_atomically
from .model.frozen import FrozenImages, teacher_name
from .model.teacher import Teacher

PARALLEL_CHUNK = 8192
ENCODE_BATCH = 256
LISTED_BAD_SAMPLES = 1000
PAIR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("image_id", pa.int32()),
        ("caption_id", pa.int32()),
        ("noise", pa.bool_()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)


@dataclass
class Item:
    """One distinct frozen row of a part: its feature and the captions that stand on it."""

    hash: bytes
    feature: bytes
    key: str
    source: str
    shard: str
    offset: int
    length: int
    captions: list[str]
    noise: list[bool | None]


Part = tuple[list[Item], list[BadSample]]


@dataclass(frozen=True)
class Recipe:
    """What a pair store is made of, in parts that an interrupted call keeps; `samples` is their number, if known."""

    files: Sequence[Path]
    tower: str
    parts: Sequence[Callable[[Any], Part]]
    samples: int | None


def prepare(source: Path, path: Path, config: Config, images: Path | None = None) -> dict[str, Any]:
    """Make a store at `path`: of whatever `open_source` reads, a zh<TAB>en `.tsv` or a `.txt`.

    Pictures go through the image tower, the English side through the teacher, and a `.txt` needs no tower. `images` is
    where the picture paths in `source` start, as for `open_source`.

    Finished parts of an interrupted call are kept; the store appears whole or not at all. Returns its manifest.
    """
    if not source.exists():
        raise UserError(f"source {source}: no such file or folder")
    if source.suffix == ".txt":
        return _prepare_texts(source, path, config)
    return _prepare_pairs(source, path, config, images)


def _prepare_pairs(source: Path, path: Path, config: Config, images: Path | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    recipe = _parallel_recipe(source, config) if is_parallel(source) else _picture_recipe(source, config, images)
    identity = {
        "kind": "pairs",
        "source": str(source),
        "source_fingerprint": _fingerprint(recipe.files),
        "tower": recipe.tower,
        "tokenizer": fingerprint(tokenizer),
    }
    if images is not None:
        identity["images"] = str(images)
    if (made := _up_to_date(path, identity)) is not None:
        return made
    folder = _open_staging(path, identity)
    files: list[Path] = []
    listed: list[dict[str, str]] = []
    causes, seen = Counter[str](), 0
    with tqdm(total=recipe.samples, unit="sample") as bar:
        for number, make in enumerate(recipe.parts):
            bar.set_description(f"{path.name}, part {number + 1} of {len(recipe.parts)}")
            file = folder / f"part-{number:05d}.parquet"
            before, kept = bar.n, file.exists()
            if not kept:
                _write_part(file, *make(bar))
            bad = json.loads(pq.read_schema(file).metadata[b"bad"])
            causes.update(entry["cause"] for entry in bad)
            listed += bad[: LISTED_BAD_SAMPLES - len(listed)]
            found = pq.read_metadata(file).num_rows + len(bad)
            seen += found
            bar.update(found - (bar.n - before))
            if kept:
                # The rate is that of the parts made now.
                bar.initial += found
            if recipe.samples is None:
                bar.total = seen * len(recipe.parts) // (number + 1)
            files.append(file)
    if seen == 0:
        raise UserError(f"source {source}: empty, no sample found")
    share = causes.total() / seen
    if share > config.data.max_bad_share or causes.total() == seen:
        counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
        raise UserError(
            f"source {source}: {share:.1%} of {seen} samples are bad ({counts}; first: {listed[0]['key']} in"
            f" {listed[0]['shard']}), data.max_bad_share is {config.data.max_bad_share:.1%}; mend the source or"
            " raise the limit"
        )
    merged = _merge(folder, files, tokenizer)
    manifest = {**identity, **merged, "bad_counts": dict(causes), "bad_samples": listed}
    for file in files:
        file.unlink()
    finish(folder, path, manifest, PAIR_FILES)
    return manifest


def _picture_recipe(source: Path, config: Config, images: Path | None) -> Recipe:
    encoder = FrozenImages(config)
    opened = open_source(source, images)
    make = partial(_shard_part, encoder) if is_tars(source) else partial(_source_part, encoder)
    pieces: Sequence[Any] = opened.files if is_tars(source) else opened.parts
    return Recipe(opened.files, encoder.name, [partial(make, piece) for piece in pieces], opened.pictures)


def _shard_part(encoder: FrozenImages, shard: Path, bar: Any) -> Part:
    items: list[Item] = []
    tower, started = encoder.tower, time.perf_counter()
    with ImageLoader(
        shard, batch_size=ENCODE_BATCH, size=tower.size, train=False, mean=tower.mean, std=tower.std, keep_encoded=True
    ) as loader:
        for batch in loader:
            features = _fp16_rows(encoder.encode_pixels(batch.images))
            items += map(_item, _samples(shard, batch), features)
            bar.update(len(batch))
            _show_wait(bar, loader.waited_seconds, started)
        return items, loader.bad_samples


def _samples(shard: Path, batch: ImageBatch) -> Iterator[Sample]:
    for at, key in enumerate(batch.keys):
        yield Sample(
            key=key,
            image=batch.encoded[at] or b"",
            shard=shard,
            offset=batch.offsets[at],
            length=batch.lengths[at],
            captions=batch.captions[at],
            noise=[entry.get("noise") for entry in batch.entries[at]],
            source=str((batch.records[at] or {}).get("source", "")),
        )


def _source_part(encoder: FrozenImages, part: Callable[[], Iterator[Sample | BadSample]], bar: Any) -> Part:
    items: list[Item] = []
    bad: list[BadSample] = []
    started, waited = time.perf_counter(), encoder.waited_seconds
    for found in encoder.encode_samples(map(_captioned, part())):
        if isinstance(found, BadSample):
            bad.append(found)
        else:
            sample, feature_D = found
            items += [_item(sample, *_fp16_rows(feature_D[None]))]
        bar.update()
        _show_wait(bar, encoder.waited_seconds - waited, started)
    return items, bad


def _captioned(sample: Sample | BadSample) -> Sample | BadSample:
    if isinstance(sample, Sample) and not sample.captions:
        return BadSample(sample.shard.name, sample.key, "image without caption")
    return sample


def _item(sample: Sample, feature: bytes) -> Item:
    return Item(
        hash=_digest(sample.image),
        feature=feature,
        key=sample.key,
        source=sample.source,
        shard=str(sample.shard.resolve()),
        offset=sample.offset,
        length=sample.length,
        captions=sample.captions,
        noise=sample.noise,
    )


def _show_wait(bar: Any, waited_seconds: float, started: float) -> None:
    share = waited_seconds / max(time.perf_counter() - started, 1e-9)
    bar.set_postfix(waited_for_data=f"{share:.0%}", refresh=False)


def _parallel_recipe(source: Path, config: Config) -> Recipe:
    if config.model.teacher is None:
        raise UserError(
            f"model.teacher: not set; {source} is taken as parallel text, zh<TAB>en, which it encodes. A table of"
            f" pictures needs a first line with one of {', '.join(PICTURE_COLUMNS)} and one of"
            f" {', '.join(CAPTION_COLUMNS)}"
        )
    teacher = Teacher(config.model.teacher)
    lines = _read_lines(source)

    def part(start: int, bar: Any) -> Part:
        good: list[tuple[int, str, str]] = []
        bad: list[BadSample] = []
        for number, line in enumerate(lines[start : start + PARALLEL_CHUNK], start + 1):
            caption, _, english = (piece.strip() for piece in line.partition("\t"))
            if not caption or not english:
                bad.append(BadSample(source.name, f"line {number}", "not two texts around a tab"))
            else:
                good.append((number, caption, english))
        features = _fp16_rows(teacher.encode([english for *_, english in good], progress=source.name)) if good else []
        items = [
            Item(
                hash=_digest(english.encode()),
                feature=feature,
                key=f"line {number}",
                source="parallel",
                shard=str(source.resolve()),
                offset=0,
                length=0,
                captions=[caption],
                noise=[None],
            )
            for (number, caption, english), feature in zip(good, features, strict=True)
        ]
        return items, bad

    parts = [partial(part, start) for start in range(0, len(lines), PARALLEL_CHUNK)]
    return Recipe([source], teacher_name(config.model.teacher), parts, len(lines))


def _prepare_texts(source: Path, path: Path, config: Config) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    identity = {
        "kind": "texts",
        "source": str(source),
        "source_fingerprint": _fingerprint([source]),
        "tokenizer": fingerprint(tokenizer),
        "max_text_tokens": config.data.max_text_tokens,
    }
    if (made := _up_to_date(path, identity)) is not None:
        return made
    lines = [line for line in _read_lines(source) if line.strip()]
    if not lines:
        raise UserError(f"source {source}: empty, no text found")
    inner = config.data.max_text_tokens - 2

    def pieces() -> Iterator[list[int]]:
        for batch in _batches(tqdm(lines, desc=f"tokens of {path.name}", unit="text"), 1024):
            for tokens in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                for start in range(0, len(tokens), inner):
                    yield [tokenizer.cls_token_id, *tokens[start : start + inner], tokenizer.sep_token_id]

    folder = _open_staging(path, identity)
    dtype = token_dtype(len(tokenizer))
    texts = write_tokens(folder, pieces(), dtype)
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = {
        **identity,
        "texts": texts,
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "special_tokens": sorted(tokenizer.all_special_ids),
        "mask_token": tokenizer.mask_token_id,
    }
    finish(folder, path, manifest, TEXT_FILES)
    return manifest


def _read_lines(source: Path) -> list[str]:
    try:
        return source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"source {source}: byte {error.start} is not UTF-8; convert it with iconv -t UTF-8") from error


def _up_to_date(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the store at `path`, if it was made of the same source by the same tower and tokenizer."""
    file = path / "manifest.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("format") != FORMAT:
        return None
    manifest = read_manifest(path)
    return manifest if all(manifest.get(key) == value for key, value in identity.items()) else None


def _open_staging(path: Path, identity: dict[str, Any]) -> Path:
    folder = staging(path)
    mark = folder / "identity.json"
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(mark, json.dumps(identity, ensure_ascii=False).encode())
    return folder


def _fingerprint(files: Sequence[Path]) -> str:
    described = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _fp16_rows(features_MD: np.ndarray[Any, Any]) -> list[bytes]:
    if not np.isfinite(features_MD).all():
        raise UserError("features: the frozen tower gave NaN or infinity; check its weights and model.teacher.mean")
    return [row.tobytes() for row in features_MD.astype(np.float16)]


def _write_part(file: Path, items: list[Item], bad: list[BadSample]) -> None:
    schema = pa.schema(
        [
            ("hash", pa.binary()),
            ("feature", pa.binary()),
            ("key", pa.string()),
            ("source", pa.string()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("captions", pa.list_(pa.string())),
            ("noise", pa.list_(pa.bool_())),
        ],
        metadata={"bad": json.dumps([asdict(entry) for entry in bad], ensure_ascii=False)},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([vars(item) for item in items], schema=schema), sink)
    write_atomically(file, sink.getvalue().to_pybytes())


def _merge(folder: Path, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Give ids to distinct frozen rows and captions, drop repeated pairs, and write the store's files.

    Ids count in the order of first occurrence. Of all parts together only digests and ids are held, never texts.
    """
    row_digests, caption_digests = bytearray(), bytearray()
    counts = []
    for file in files:
        table = pq.read_table(file, columns=["hash", "captions"])
        row_digests += b"".join(table["hash"].to_pylist())
        counts.append(pc.list_value_length(table["captions"]).to_numpy())
        caption_digests += b"".join(_digest(caption.encode()) for caption in _flat(table, "captions").to_pylist())
    image_of_row, rows = _ids(row_digests)
    image_ids = np.repeat(image_of_row, np.concatenate(counts))
    caption_ids, captions = _ids(caption_digests)
    del row_digests, caption_digests, counts, image_of_row
    pairs = np.unique(image_ids.astype(np.int64) << 32 | caption_ids, return_index=True)[1]
    pairs.sort()
    image_ids, caption_ids = image_ids[pairs], caption_ids[pairs]
    width = _write_rows(folder, files, rows)
    _write_pairs(folder, files, pairs, image_ids, caption_ids)
    dtype = token_dtype(len(tokenizer))
    texts = tqdm(_texts(files, captions), desc="captions", unit="text", total=len(captions))
    batches = (tokenizer(batch)["input_ids"] for batch in _batches(texts, 4096))
    write_tokens(folder, chain.from_iterable(batches), dtype)
    write_ids(folder, image_ids, caption_ids, len(captions))
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "width": width,
        "pairs": len(pairs),
        "images": len(rows),
        "captions": len(captions),
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
    }


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _ids(digests: bytearray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """An id for each digest of 16 bytes, counted in the order of first occurrence, and where each id occurs first."""
    high, low = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    # Stable: of equal digests the first stands first.
    order = np.lexsort((low, high))
    new = np.ones(len(order), bool)
    new[1:] = _changes(high[order])
    new[1:] |= _changes(low[order])
    firsts = order[new]
    by_occurrence = np.argsort(firsts)
    rank = np.empty(len(firsts), np.int32)
    rank[by_occurrence] = np.arange(len(firsts), dtype=np.int32)
    ids = np.empty(len(order), np.int32)
    ids[order] = rank[np.cumsum(new, dtype=np.int32) - 1]
    return ids, firsts[by_occurrence]


def _changes(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    changed: npt.NDArray[np.bool_] = values[1:] != values[:-1]
    return changed


def _flat(table: pa.Table, column: str) -> pa.Array:
    flat: pa.Array = pc.list_flatten(table[column]).combine_chunks()
    return flat


def _chosen(chosen: npt.NDArray[np.int64], start: int, count: int) -> npt.NDArray[np.int64]:
    """Those of the ascending `chosen` that lie in the next `count` from `start`, counted from there."""
    first, last = np.searchsorted(chosen, (start, start + count))
    return chosen[first:last] - start


def _write_rows(folder: Path, files: list[Path], rows: npt.NDArray[np.int64]) -> int:
    """features.bin of the parts' `rows`, ascending; returns their width."""
    start = width = 0
    with (folder / "features.bin").open("wb") as stream:
        for file in files:
            features = pq.read_table(file, columns=["feature"])["feature"]
            for feature in features.take(_chosen(rows, start, len(features))).to_pylist():
                stream.write(feature)
                width = len(feature) // 2
            start += len(features)
    return width


def _write_pairs(
    folder: Path,
    files: list[Path],
    pairs: npt.NDArray[np.int64],
    image_ids: npt.NDArray[np.int32],
    caption_ids: npt.NDArray[np.int32],
) -> None:
    """pairs.parquet of the parts' `pairs`, ascending, with the ids of each."""
    start = done = 0
    with pq.ParquetWriter(folder / "pairs.parquet", PAIR_SCHEMA) as writer:
        for file in files:
            table = pq.read_table(file).drop_columns(["hash", "feature"]).combine_chunks()
            captions, noise = _flat(table, "captions"), _flat(table, "noise")
            chosen = _chosen(pairs, start, len(captions))
            rows = table.take(pc.list_parent_indices(table["captions"]).combine_chunks().take(chosen)).combine_chunks()
            here = slice(done, done + len(chosen))
            columns = {
                "caption": captions.take(chosen),
                "image_id": image_ids[here],
                "caption_id": caption_ids[here],
                "noise": noise.take(chosen),
            }
            arrays = [columns[name] if name in columns else rows[name] for name in PAIR_SCHEMA.names]
            writer.write_table(pa.table(arrays, names=PAIR_SCHEMA.names).cast(PAIR_SCHEMA))
            start, done = start + len(captions), here.stop


def _texts(files: list[Path], captions: npt.NDArray[np.int64]) -> Iterator[str]:
    """The parts' `captions`, ascending."""
    start = 0
    for file in files:
        texts = _flat(pq.read_table(file, columns=["captions"]), "captions")
        yield from texts.take(_chosen(captions, start, len(texts))).to_pylist()
        start += len(texts)
