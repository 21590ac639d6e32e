"""`efficientclip prepare`: pictures, parallel text or plain text become a store, once, resumably and atomically.

STORE.partial/identity.json          the mark by which the folder is ours, what is being made
             /part-OF-SHA.parquet    a finished part, by digests of what it was made of and of its content
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data import sources
from ..data.images import ImageBatch, ImageLoader
from ..data.shards import BadSample, Sample
from ..data.sources import CAPTION_COLUMNS, PICTURE_COLUMNS, is_parallel, is_tars, open_source
from ..data.store import (
    ANEW,
    PAIR_FILES,
    TEXT_FILES,
    files_of,
    finish,
    first_not_finite,
    read_manifest,
    settle,
    staging,
    token_dtype,
    write_tokens,
)
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import UserError, reading, writing
from ..files import lock
from ..files.atomic import write_atomically
from ..files.digests import check
from ..files.ownership import claim, kind_of
from ..model.frozen import FrozenImages, image_tower_name, teacher_name, tower_difference
from ..model.teacher import Teacher
from .parts import Item, Made, bad_of, batches, digest, kept_part, merge, write_part

PARALLEL_CHUNK = 8192
ENCODE_BATCH = 256
LISTED_BAD_SAMPLES = 1000


@dataclass(frozen=True)
class Part:
    """A piece of a source, and what its rows depend on: other pieces may change without it."""

    of: list[Any]
    make: Callable[[Any], Made]

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(self.of).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Recipe:
    """What a pair store is made of, in parts that an interrupted call keeps; `samples` is their number, if known.

    `outside`: pictures lie in files of their own, which may change, or come, while `files` stay.
    """

    files: Sequence[Path]
    tower: str
    parts: Sequence[Part]
    samples: int | None
    outside: bool


def prepare(
    source: Path, path: Path, config: Config, images: Path | None = None, *, replace: bool = False
) -> dict[str, Any]:
    """Make a store at `path`: of whatever `open_source` reads, a zh<TAB>en `.tsv` or a `.txt`.

    Pictures go through the image tower, the English side through the teacher, and a `.txt` needs no tower. `images` is
    where the picture paths in `source` start, as for `open_source`. A store of something else stays, unless `replace`.

    Finished parts of an interrupted call are kept; the store appears whole or not at all. Returns its manifest.
    """
    if not source.exists():
        raise UserError(f"source {source}: no such file or folder")
    target = claim(path, "store", sources=[source, *([] if images is None else [images])])
    tokenizer = load_tokenizer(config.data.tokenizer)
    of_texts = source.suffix == ".txt"
    identity: dict[str, Any] = {"kind": "texts" if of_texts else "pairs", "source": os.path.realpath(source)}
    build: Callable[[Path], dict[str, Any]]
    if of_texts:
        files: Sequence[Path] = [source]
        identity["max_text_tokens"] = config.data.max_text_tokens
        build = partial(_build_texts, source, target.name, config.data.max_text_tokens, tokenizer)
    else:
        recipe = _parallel_recipe(source, config) if is_parallel(source) else _picture_recipe(source, config, images)
        files = recipe.files
        claim(path, "store", sources=files)
        identity |= {"tower": recipe.tower, "images_folder": None if images is None else os.path.realpath(images)}
        build = partial(_build_pairs, recipe, source, target.name, config.data.max_bad_share, tokenizer)
    identity |= {"source_fingerprint": _fingerprint(files), "tokenizer": fingerprint(tokenizer)}
    if (made := _standing(target, identity, replace)) is not None:
        return made
    folder = staging(target)
    _require_ours(folder)
    with lock.held(folder, "preparing"):
        # Another process may have made it while this one read the source.
        if (made := _standing(target, identity, replace)) is not None:
            if os.listdir(folder) == [lock.NAME]:
                shutil.rmtree(folder)
            return made
        if (made := _whole(folder, identity)) is not None:
            settle(folder, target)
            return made
        _clear(folder)
        write_atomically(folder / "identity.json", json.dumps(identity, ensure_ascii=False).encode())
        manifest = {**identity, **build(folder)}
        finish(folder, target, manifest, TEXT_FILES if of_texts else PAIR_FILES)
    return manifest


def _standing(target: Path, identity: dict[str, Any], replace: bool) -> dict[str, Any] | None:
    """The manifest of the store at `target`, if it is whole and of that `identity`.

    None where a new one may take its place; UserError where none may.
    """
    if kind_of(target) != "store":
        claim(target, "store", existing="replace")
        return None
    try:
        manifest = read_manifest(target)
        check(target, manifest["files"], ANEW)
        differing = [key for key, value in identity.items() if not _is_same(key, manifest.get(key), value)]
        if not differing:
            # A call killed after the rename left it.
            with suppress(OSError):
                (target / lock.NAME).unlink(missing_ok=True)
            return manifest
        told = (f"{key} is {manifest.get(key)} there and {identity[key]} now" for key in differing)
        why = f"store {target}: made of something else ({', '.join(told)})"
    except UserError as error:
        why = str(error)
    if not replace:
        raise UserError(f"{why}; --replace puts the new one in its place, once that is whole")
    claim(target, "store", existing="replace", files=files_of(target))
    return None


def _is_same(key: str, there: Any, now: Any) -> bool:
    if key == "tower":
        return tower_difference(there, now) is None
    # Earlier versions kept the path as it was spelled.
    return there == now or (key == "source" and there is not None and os.path.realpath(there) == now)


def _require_ours(folder: Path) -> None:
    """UserError where the staging folder holds what no call of this command wrote."""
    ours = (folder / "identity.json").is_file() or kind_of(folder) == "store"
    inside = {*os.listdir(folder)} if folder.is_dir() and not folder.is_symlink() else {folder.name}
    if os.path.lexists(folder) and not ours and inside - {lock.NAME, ".identity.json.partial"}:
        raise UserError(
            f"{folder}: the store is built there, but it holds other things than efficientclip's (no identity.json),"
            " which stay as they are; move them away, or name another store"
        )


def _whole(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished store of that `identity`, which only was not renamed yet."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = read_manifest(folder)
        check(folder, manifest["files"], ANEW)
    except UserError:
        return None
    return manifest if all(manifest.get(key) == value for key, value in identity.items()) else None


def _clear(folder: Path) -> None:
    """Remove what an interrupted call left, but its finished parts."""
    for name in (*PAIR_FILES, "manifest.json"):
        (folder / name).unlink(missing_ok=True)
    for half in folder.glob(".*.partial"):
        half.unlink()
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)


def _build_pairs(
    recipe: Recipe, source: Path, name: str, max_bad_share: float, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """Write a pair store's files into `folder`; returns their part of the manifest."""
    files: list[Path] = []
    listed: list[dict[str, str]] = []
    causes, seen = Counter[str](), 0
    with tqdm(total=recipe.samples, unit="sample") as bar:
        for number, part in enumerate(recipe.parts):
            bar.set_description(f"{name}, part {number + 1} of {len(recipe.parts)}")
            before, kept = bar.n, kept_part(folder, part.name)
            file = kept or write_part(folder, part.name, *part.make(bar))
            bad = bad_of(file)
            causes.update(entry["cause"] for entry in bad)
            listed += bad[: LISTED_BAD_SAMPLES - len(listed)]
            found = pq.read_metadata(file).num_rows + len(bad)
            seen += found
            bar.update(found - (bar.n - before))
            if kept is not None:
                # The rate is that of the parts made now.
                bar.initial += found
            if recipe.samples is None:
                bar.total = seen * len(recipe.parts) // (number + 1)
            files.append(file)
    if seen == 0:
        raise UserError(f"source {source}: empty, no sample found")
    share = causes.total() / seen
    if share > max_bad_share or causes.total() == seen:
        if recipe.outside:
            # The pictures may be mended before the next call.
            for file in files:
                if bad_of(file):
                    file.unlink()
        counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
        raise UserError(
            f"source {source}: {share:.1%} of {seen} samples are bad ({counts}; first: {listed[0]['key']} in"
            f" {listed[0]['shard']}), data.max_bad_share is {max_bad_share:.1%}; mend the source or raise the limit"
        )
    with writing(folder):
        merged = merge(folder, files, tokenizer)
    return {**merged, "bad_counts": dict(causes), "bad_samples": listed}


def _picture_recipe(source: Path, config: Config, images: Path | None) -> Recipe:
    if config.model.image_tower is None:
        raise UserError("model.image_tower: not set; pictures cannot be encoded without it")
    name = image_tower_name(config.model.image_tower)
    # Loaded when the first part is to be made, if one is.
    encoder = cache(lambda: FrozenImages(config))
    opened = open_source(source, images)
    if is_tars(source):
        parts = [Part([name, _described(tar)], partial(_shard_part, encoder, tar)) for tar in opened.files]
    else:
        of = [name, *map(_described, opened.files), None if images is None else os.path.realpath(images)]
        parts = [
            Part([*of, sources.PART, number], partial(_source_part, encoder, part))
            for number, part in enumerate(opened.parts)
        ]
    return Recipe(opened.files, name, parts, opened.pictures, outside=not is_tars(source))


def _shard_part(load: Callable[[], FrozenImages], shard: Path, bar: Any) -> Made:
    items: list[Item] = []
    encoder = load()
    tower, started = encoder.tower, time.perf_counter()
    with ImageLoader(
        shard, batch_size=ENCODE_BATCH, size=tower.size, train=False, mean=tower.mean, std=tower.std, keep_encoded=True
    ) as loader:
        for batch in loader:
            rows = encoder.encode_pixels(batch.images)
            features = _fp16_rows(rows, [f"shard {shard}, sample {key}" for key in batch.keys])
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


def _source_part(load: Callable[[], FrozenImages], part: Callable[[], Iterator[Sample | BadSample]], bar: Any) -> Made:
    encoder = load()
    items: list[Item] = []
    bad: list[BadSample] = []
    started, waited = time.perf_counter(), encoder.waited_seconds
    for found in encoder.encode_samples(map(_captioned, part())):
        if isinstance(found, BadSample):
            bad.append(found)
        else:
            sample, feature_D = found
            items += [_item(sample, *_fp16_rows(feature_D[None], [f"picture {sample.key} of {sample.shard}"]))]
        bar.update()
        _show_wait(bar, encoder.waited_seconds - waited, started)
    return items, bad


def _captioned(sample: Sample | BadSample) -> Sample | BadSample:
    if isinstance(sample, Sample) and not sample.captions:
        return BadSample(sample.shard.name, sample.key, "image without caption")
    return sample


def _item(sample: Sample, feature: bytes) -> Item:
    return Item(
        hash=digest(sample.image),
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
    name = teacher_name(config.model.teacher)
    teacher = cache(partial(Teacher, config.model.teacher))
    lines = _read_lines(source)

    def make(start: int, bar: Any) -> Made:
        good: list[tuple[int, str, str]] = []
        bad: list[BadSample] = []
        for number, line in enumerate(lines[start : start + PARALLEL_CHUNK], start + 1):
            caption, _, english = (piece.strip() for piece in line.partition("\t"))
            if not caption or not english:
                bad.append(BadSample(source.name, f"line {number}", "not two texts around a tab"))
            else:
                good.append((number, caption, english))
        features: list[bytes] = []
        if good:
            rows = teacher().encode([english for *_, english in good], progress=source.name)
            places = [f"source {source}, line {number}" for number, *_ in good]
            features = _fp16_rows(rows, places, " and model.teacher")
        items = [
            Item(
                hash=digest(english.encode()),
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

    of = [name, _described(source), PARALLEL_CHUNK]
    parts = [Part([*of, start], partial(make, start)) for start in range(0, len(lines), PARALLEL_CHUNK)]
    return Recipe([source], name, parts, len(lines), outside=False)


def _build_texts(
    source: Path, name: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """Write a text store's files into `folder`; returns their part of the manifest."""
    lines = [line for line in _read_lines(source) if line.strip()]
    if not lines:
        raise UserError(f"source {source}: empty, no text found")
    inner = max_tokens - 2

    def pieces() -> Iterator[list[int]]:
        for batch in batches(tqdm(lines, desc=f"tokens of {name}", unit="text"), 1024):
            for tokens in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                for start in range(0, len(tokens), inner):
                    yield [tokenizer.cls_token_id, *tokens[start : start + inner], tokenizer.sep_token_id]

    dtype = token_dtype(len(tokenizer))
    with writing(folder):
        texts = write_tokens(folder, pieces(), dtype)
        tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "texts": texts,
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "special_tokens": sorted(tokenizer.all_special_ids),
        "mask_token": tokenizer.mask_token_id,
    }


def _read_lines(source: Path) -> list[str]:
    """Lines as editors and `wc` count them; Unicode's other separators are part of a text."""
    with reading("source", source, "copy it again"):
        content = source.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"source {source}: byte {error.start} is not UTF-8; convert it with iconv -t UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _fingerprint(files: Sequence[Path]) -> str:
    described = [(Path(place).name, size, changed) for place, size, changed in map(_described, files)]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _described(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return os.path.realpath(file), found.st_size, found.st_mtime_ns


def _fp16_rows(features_MD: np.ndarray[Any, Any], places: Sequence[str], more: str = "") -> list[bytes]:
    """UserError naming the first of `places` whose row is not finite; `more`: what else may be the cause."""
    if (row := first_not_finite(features_MD)) is not None:
        raise UserError(f"{places[row]}: the frozen tower gave NaN or infinity for it; check its weights{more}")
    return [row.tobytes() for row in features_MD.astype(np.float16)]
