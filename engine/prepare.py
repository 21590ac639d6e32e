"""`efficientclip prepare`: shards, parallel text or plain text become a store, once, resumably and atomically."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .config import Config
from .data.images import ImageBatch, ImageLoader
from .data.shards import BadSample, list_shards
from .data.store import (
    FORMAT,
    PAIR_FILES,
    TEXT_FILES,
    finish,
    read_manifest,
    staging,
    token_dtype,
    write_atomically,
    write_ids,
    write_tokens,
)
from .data.tokenizer import fingerprint, load_tokenizer
from .errors import UserError
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


def prepare(source: Path, path: Path, config: Config) -> dict[str, Any]:
    """Make a store at `path` from tars (through the image tower), a zh<TAB>en `.tsv` (teacher) or a `.txt` (no tower).

    Finished parts of an interrupted call are kept; the store appears whole or not at all. Returns its manifest.
    """
    if not source.exists():
        raise UserError(f"source {source}: no such file or folder")
    if source.suffix == ".txt":
        return _prepare_texts(source, path, config)
    return _prepare_pairs(source, path, config)


def _prepare_pairs(source: Path, path: Path, config: Config) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    parts, tower = _parallel_parts(source, config) if source.suffix == ".tsv" else _image_parts(source, config)
    identity = {
        "kind": "pairs",
        "source": str(source),
        "source_fingerprint": _source_fingerprint(source),
        "tower": tower,
        "tokenizer": fingerprint(tokenizer),
    }
    if (made := _up_to_date(path, identity)) is not None:
        return made
    folder = _open_staging(path, identity)
    files, bad_total, seen_total = [], Counter[str](), 0
    for number, make in enumerate(tqdm(parts, desc=f"parts of {path.name}", unit="part")):
        file = folder / f"part-{number:05d}.parquet"
        if not file.exists():
            items, bad = make()
            _write_part(file, items, bad)
        metadata = pq.read_schema(file).metadata
        causes = Counter(entry["cause"] for entry in json.loads(metadata[b"bad"]))
        bad_total += causes
        seen_total += pq.read_metadata(file).num_rows + sum(causes.values())
        files.append(file)
    if seen_total == 0:
        raise UserError(f"source {source}: empty, no sample found")
    share = sum(bad_total.values()) / seen_total
    if share > config.data.max_bad_share or sum(bad_total.values()) == seen_total:
        listed = ", ".join(f"{count} × {cause}" for cause, count in bad_total.most_common())
        first = next(entry for file in files for entry in json.loads(pq.read_schema(file).metadata[b"bad"]))
        raise UserError(
            f"source {source}: {share:.1%} of {seen_total} samples are bad ({listed}; first: {first['key']} in"
            f" {first['shard']}), data.max_bad_share is {config.data.max_bad_share:.1%}; mend the source or"
            " raise the limit"
        )
    manifest = _merge(folder, files, tokenizer, identity)
    for file in files:
        file.unlink()
    finish(folder, path, manifest, PAIR_FILES)
    return manifest


def _image_parts(source: Path, config: Config) -> tuple[list[Callable[[], Part]], str]:
    encoder = FrozenImages(config)
    tower = encoder.tower

    def part(shard: Path) -> Part:
        items: list[Item] = []
        with (
            ImageLoader(
                shard, batch_size=ENCODE_BATCH, size=tower.size, train=False, mean=tower.mean, std=tower.std,
                keep_encoded=True,
            ) as loader,
            tqdm(desc=shard.name, unit="picture", leave=False) as bar,
        ):  # fmt: skip
            for batch in loader:
                items += _items(shard, batch, _fp16_rows(encoder.encode_pixels(batch.images)))
                bar.update(len(batch))
                waited = loader.waited_seconds / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix(waited_for_data=f"{waited:.0%}", refresh=False)
            return items, loader.bad_samples

    return [partial(part, shard) for shard in list_shards(source)], encoder.name


def _items(shard: Path, batch: ImageBatch, features: list[bytes]) -> list[Item]:
    items = []
    for at, feature in enumerate(features):
        items.append(
            Item(
                hash=hashlib.blake2b(batch.encoded[at] or b"", digest_size=16).digest(),
                feature=feature,
                key=batch.keys[at],
                source=str((batch.records[at] or {}).get("source", "")),
                shard=str(shard.resolve()),
                offset=batch.offsets[at],
                length=batch.lengths[at],
                captions=batch.captions[at],
                noise=[entry.get("noise") for entry in batch.entries[at]],
            )
        )
    return items


def _parallel_parts(source: Path, config: Config) -> tuple[list[Callable[[], Part]], str]:
    if config.model.teacher is None:
        raise UserError("model.teacher: not set; parallel text is encoded by it")
    teacher = Teacher(config.model.teacher)
    lines = _read_lines(source)

    def part(start: int) -> Part:
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
                hash=hashlib.blake2b(english.encode(), digest_size=16).digest(),
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

    makers: list[Callable[[], Part]] = [partial(part, start) for start in range(0, len(lines), PARALLEL_CHUNK)]
    return makers, teacher_name(config.model.teacher)


def _prepare_texts(source: Path, path: Path, config: Config) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    identity = {
        "kind": "texts",
        "source": str(source),
        "source_fingerprint": _source_fingerprint(source),
        "tokenizer": fingerprint(tokenizer),
        "max_text_tokens": config.data.max_text_tokens,
    }
    if (made := _up_to_date(path, identity)) is not None:
        return made
    lines = [line for line in _read_lines(source) if line.strip()]
    if not lines:
        raise UserError(f"source {source}: empty, no text found")
    inner = config.data.max_text_tokens - 2
    pieces: list[list[int]] = []
    for batch in tqdm(list(_batches(lines, 1024)), desc=f"tokens of {path.name}", unit="batch"):
        for tokens in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            for start in range(0, len(tokens), inner):
                pieces.append([tokenizer.cls_token_id, *tokens[start : start + inner], tokenizer.sep_token_id])
    folder = _open_staging(path, identity)
    dtype = token_dtype(len(tokenizer))
    write_tokens(folder, pieces, dtype)
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = {
        **identity,
        "texts": len(pieces),
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


def _source_fingerprint(source: Path) -> str:
    files = [source] if source.is_file() else sorted(source.glob("*.tar"))
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


def _merge(folder: Path, files: list[Path], tokenizer: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """Give ids to distinct frozen rows and captions, drop repeated pairs, and write the store's files."""
    image_of: dict[bytes, int] = {}
    caption_of: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    bad: list[dict[str, str]] = []
    width = 0
    pair_file = folder / "pairs.parquet"
    with (folder / "features.bin").open("wb") as features, pq.ParquetWriter(pair_file, PAIR_SCHEMA) as pairs:
        for file in files:
            bad += json.loads(pq.read_schema(file).metadata[b"bad"])
            rows: list[dict[str, Any]] = []
            for record in pq.read_table(file).to_pylist():
                if record["hash"] not in image_of:
                    image_of[record["hash"]] = len(image_of)
                    features.write(record["feature"])
                    width = len(record["feature"]) // 2
                image_id = image_of[record["hash"]]
                for caption, noise in zip(record["captions"], record["noise"], strict=True):
                    caption_id = caption_of.setdefault(caption, len(caption_of))
                    if (image_id, caption_id) not in seen:
                        seen.add((image_id, caption_id))
                        rows.append(
                            {name: record[name] for name in ("key", "source", "shard", "offset", "length")}
                            | {"caption": caption, "image_id": image_id, "caption_id": caption_id, "noise": noise}
                        )
            pairs.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA))
    token_lists: list[list[int]] = []
    for batch in tqdm(list(_batches(caption_of, 4096)), desc="captions", unit="batch"):
        token_lists += tokenizer(batch)["input_ids"]
    dtype = token_dtype(len(tokenizer))
    write_tokens(folder, token_lists, dtype)
    ids = pq.read_table(pair_file, columns=["image_id", "caption_id"], memory_map=True)
    write_ids(folder, ids["image_id"].to_numpy(), ids["caption_id"].to_numpy(), len(caption_of))
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        **identity,
        "width": width,
        "pairs": len(seen),
        "images": len(image_of),
        "captions": len(caption_of),
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "bad_counts": dict(Counter(entry["cause"] for entry in bad)),
        "bad_samples": bad[:LISTED_BAD_SAMPLES],
    }
