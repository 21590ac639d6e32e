"""`efficientclip prepare`: pictures, parallel text or plain text become a store, once, resumably and atomically.

STORE.partial/identity.json          the mark by which the folder is ours, what is being made
             /part-OF-SHA.parquet    a finished part, by digests of what it was made of and of its content
             /features-OF-SHA.bin    its features, alike
             /tokens-OF-BY-SHA.parquet    those of a part's captions, by digests of the part, the tokenizer and these
             /merging-OF/*           files of the store, of these parts, until all of them are whole
STORE/origin-OF-SHA.parquet          what a part gave to the finished store, as a part is known
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import Config
from ..data.remote import Described, described
from ..data.sources import is_parallel, require_few
from ..data.store import ANEW, PAIR_FILES, TEXT_FILES, Store, read_manifest, staging
from ..data.tables import USUAL, Columns
from ..data.tokenizer import fingerprint, load_tokenizer
from ..errors import ShardError, UserError, tell, writing
from ..files import lock
from ..files.atomic import write_atomically
from ..files.digests import check
from ..files.ownership import claim, kind_of
from ..files.places import Location, is_pattern, location, resolved
from ..model.frozen import tower_difference
from .deal import Ranks, dealt
from .finished import Finished
from .merge import merge
from .parallel import parallel_recipe
from .parts import Making, bad_of, has_features, held_in, is_sound, samples_of, slow_of, write_part
from .pictures import picture_recipe
from .recipe import Part, Recipe
from .texts import build_texts
from .tokens import Tokens
from .writer import ORIGIN, files_of, finish, settle

LISTED_BAD_SAMPLES = 1000


def prepare(
    source: Location | Mapping[str, Location],
    path: Path,
    config: Config,
    images: Location | None = None,
    columns: Columns = USUAL,
    *,
    replace: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Make a store at `path`: of whatever `open_source` reads, a zh<TAB>en `.tsv` or a `.txt`.

    Pictures go through the image tower, the English side through the teacher, and a `.txt` needs no tower. `images` is
    where the picture paths in `source` start, and `columns` names those of a table, as for `open_source`. Of several
    sources, all of them pictures or all parallel text, each pair is of the one in which it stands first, by its name,
    whatever that one tells of sources. A store of something else stays, unless `replace`.

    Finished parts of an interrupted call are kept; the store appears whole or not at all. Returns its manifest. Up to
    data.max_bad_shards tars that cannot be had or are not whole are left out, named there, and tried again by the next
    call.

    `ranks`: each makes its share of the parts; rank 0 puts them together, the others return {} once theirs stand.
    """
    ranks = ranks or Ranks()
    given = source if isinstance(source, Mapping) else {"": source}
    for one in given.values():
        if isinstance(one, Path) and not one.exists() and not is_pattern(one):
            raise UserError(f"source {one}: no such file or folder")
    target = claim(path, "store", sources=_local([*given.values(), images]))
    tokenizer = load_tokenizer(config.data.tokenizer)
    text = None if isinstance(source, Mapping) or source.suffix != ".txt" else source
    by = fingerprint(tokenizer)
    identity: dict[str, Any] = {"kind": "pairs" if text is None else "texts"}
    if isinstance(source, Mapping):
        identity["sources"] = {name: resolved(one) for name, one in source.items()}
        if images is not None or columns.given:
            option = "--images" if images is not None else columns.given[0]
            raise UserError(f"{option}: tells of one SOURCE; prepare those of data.sources without it")
    else:
        identity["source"] = resolved(source)
    build: Callable[[Path], dict[str, Any]]
    if columns.given and text is not None:
        raise UserError(f"{columns.given[0]}: {text} is no table; leave it out")
    if text is not None:
        known: Sequence[Described | None] = [described(text)]
        identity["max_text_tokens"] = config.data.max_text_tokens
        build = partial(build_texts, text, target.name, config.data.max_text_tokens, tokenizer)
    else:
        parallel = [not columns.given and is_parallel(one) for one in given.values()]
        if len({*parallel}) > 1:
            raise UserError("data.sources: some are parallel text, some pictures; prepare a store of each kind")
        recipe = parallel_recipe(given, config) if parallel[0] else picture_recipe(given, config, images, columns)
        known = recipe.known
        claim(path, "store", sources=_local(recipe.files))
        identity |= {"tower": recipe.tower, "images_folder": None if images is None else resolved(images)}
        identity |= {"columns": columns.given} if columns.given else {}
        source_names = ", ".join(map(str, given.values()))
        tokens = Tokens(staging(target), tokenizer, by)
        build = partial(_build_pairs, recipe, source_names, target, config, tokens, ranks)
    identity |= {"source_fingerprint": _fingerprint(known), "tokenizer": by}
    if ranks.rank > 0:
        told = ranks.hear("shares")
        share = _no_parts() if told is None else _make_share(recipe, told, target, config, tokens, ranks)
        ranks.tell(f"made by {ranks.rank}", share)
        return {}
    made = _standing(target, identity, known, replace)
    if made is None or made.get("bad_shards"):
        made = _built(target, identity, known, build, replace)
    # Where nothing was to be made, the others wait still; all have heard so before this rank, which tells, may end.
    ranks.tell("shares", None)
    for rank in range(1, ranks.world):
        ranks.hear(f"made by {rank}", rank)
    return made


def _built(
    target: Path,
    identity: dict[str, Any],
    known: Sequence[Described | None],
    build: Callable[[Path], dict[str, Any]],
    replace: bool,
) -> dict[str, Any]:
    """The manifest of the store that `build` makes at `target`, or that another process made meanwhile."""
    folder = staging(target)
    _require_ours(folder)
    with lock.held(folder, "preparing"):
        # Another process may have made it while this one read the source.
        made = _standing(target, identity, known, replace)
        if made is not None and not made.get("bad_shards"):
            if os.listdir(folder) == [lock.NAME]:
                shutil.rmtree(folder)
            return made
        if (whole := _whole(folder, identity, known)) is not None:
            settle(folder, target)
            return whole
        _clear(folder)
        write_atomically(folder / "identity.json", json.dumps(identity, ensure_ascii=False).encode())
        manifest = {**identity, **build(folder)}
        bad = {entry["shard"] for entry in manifest.get("bad_shards", ())}
        manifest["source_fingerprint"] = _fingerprint(known, bad)
        digests = manifest.pop("digests", {})
        finish(folder, target, manifest, PAIR_FILES if manifest["kind"] == "pairs" else TEXT_FILES, digests)
    return manifest


def _local(places: Sequence[Location | None]) -> list[Path]:
    return [place for place in places if isinstance(place, Path)]


def _standing(
    target: Path, identity: dict[str, Any], known: Sequence[Described | None], replace: bool
) -> dict[str, Any] | None:
    """The manifest of the store at `target`, if it is whole and of that `identity`.

    None where a new one may take its place; UserError where none may.
    """
    if kind_of(target) != "store":
        claim(target, "store", existing="replace")
        return None
    try:
        manifest = read_manifest(target)
        check(target, manifest["files"], ANEW)
        identity = identity | _held(manifest, known)
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


def _whole(folder: Path, identity: dict[str, Any], known: Sequence[Described | None]) -> dict[str, Any] | None:
    """The manifest of a finished store of that `identity`, which only was not renamed yet."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = read_manifest(folder)
        check(folder, manifest["files"], ANEW)
    except UserError:
        return None
    wanted = identity | _held(manifest, known)
    return manifest if all(manifest.get(key) == value for key, value in wanted.items()) else None


def _held(manifest: dict[str, Any], known: Sequence[Described | None]) -> dict[str, Any]:
    """The fingerprint that the store has, if what it is made of has not changed: its bad shards are no part of it."""
    bad = {entry["shard"] for entry in manifest.get("bad_shards", ())}
    return {"source_fingerprint": _fingerprint(known, bad)}


def _clear(folder: Path) -> None:
    """Remove what an interrupted call left, but its finished parts."""
    for name in (*PAIR_FILES, "manifest.json"):
        (folder / name).unlink(missing_ok=True)
    for origin in folder.glob(f"{ORIGIN}-*.parquet"):
        origin.unlink()
    for half in folder.glob(".*.partial"):
        half.unlink()
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)


def _build_pairs(
    recipe: Recipe,
    source: str,
    target: Path,
    config: Config,
    tokens: Tokens,
    ranks: Ranks,
    folder: Path,
) -> dict[str, Any]:
    """Write a pair store's files into `folder`, when all ranks have made their parts; returns their part of the
    manifest.

    What a store at `target` was made of, and is still wanted, is taken from there.
    """
    sizes = [part.size for part in recipe.parts]
    held = held_in(folder).keys() | held_in(target, ORIGIN).keys()
    there = [part.name in held for part in recipe.parts]
    # Those to be made are dealt out by themselves: to prove the others takes no time beside.
    shares = [
        sorted(made + kept)
        for made, kept in zip(
            *(dealt([at for at, has in enumerate(there) if has == kept], sizes, ranks.world) for kept in (False, True)),
            strict=True,
        )
    ]
    ranks.tell("shares", {"of": _names(recipe), "shares": shares})
    ranks.tell("made by 0", _make_parts(recipe, shares[0], target, folder, config, tokens, ranks))
    made: dict[int, str] = {}
    tokens_of: dict[int, str] = {}
    causes_of: dict[int, str] = {}
    for rank in range(ranks.world):
        told = ranks.hear(f"made by {rank}", rank)
        made |= {int(part): file for part, file in told["files"].items()}
        tokens_of |= {int(part): file for part, file in told["tokens"].items()}
        causes_of |= {int(part): cause for part, cause in told["bad_shards"].items()}
    files = [(target if made[at].startswith(ORIGIN) else folder) / made[at] for at in sorted(made)]
    bad_shards = [
        {"shard": resolved(shard), "cause": causes_of[at]}
        for at in sorted(causes_of)
        if (shard := recipe.parts[at].shard) is not None
    ]
    listed: list[dict[str, str]] = []
    causes, seen, slow = Counter[str](), 0, 0
    for file in files:
        bad = bad_of(file)
        causes.update(entry["cause"] for entry in bad)
        slow += slow_of(file)
        listed += bad[: LISTED_BAD_SAMPLES - len(listed)]
        seen += samples_of(file)
    if seen == 0 and bad_shards:
        raise ShardError(bad_shards[0]["cause"])
    if seen == 0:
        raise UserError(f"source {source}: empty, no sample found")
    first = f"{listed[0]['key']} in {listed[0]['shard']}" if listed else ""
    try:
        require_few(source, causes, first, seen, config.data.max_bad_share, "mend the source or raise the limit")
    except UserError:
        if recipe.outside:
            # The pictures may be mended before the next call.
            for file in files:
                if file.parent == folder and bad_of(file):
                    file.unlink()
        raise
    with writing(folder):
        standing = Store(target) if any(file.parent == target for file in files) else None
        parts = [
            Finished(
                file, folder / tokens_of[at] if at in tokens_of else None, standing if file.parent == target else None
            )
            for at, file in zip(sorted(made), files, strict=True)
        ]
        merged = merge(folder, parts, tokens.tokenizer, config.training.max_caption_tokens)
    left_out = {"bad_counts": dict(causes), "bad_samples": listed, "bad_shards": bad_shards}
    return {**merged, "slow_pictures": slow, **left_out}


def _names(recipe: Recipe) -> str:
    return hashlib.sha256("".join(part.name for part in recipe.parts).encode()).hexdigest()


def _make_share(
    recipe: Recipe, told: dict[str, Any], target: Path, config: Config, tokens: Tokens, ranks: Ranks
) -> dict[str, Any]:
    """What a rank beside rank 0 makes of what that one told."""
    if told["of"] != _names(recipe):
        raise UserError(
            f"rank {ranks.rank}: found another source or tower than rank 0; let nothing change while ranks start, give"
            " all the same command, and run it again"
        )
    return _make_parts(recipe, told["shares"][ranks.rank], target, staging(target), config, tokens, ranks)


def _no_parts() -> dict[str, Any]:
    return {"files": {}, "tokens": {}, "bad_shards": {}}


def _make_parts(
    recipe: Recipe, mine: Sequence[int], target: Path, folder: Path, config: Config, tokens: Tokens, ranks: Ranks
) -> dict[str, Any]:
    """The parts of these numbers: names of their files and of those of their tokens, and what is wrong with those that
    could not be made."""
    bad_shards: dict[int, str] = {}
    with tokens:
        kept = _kept(recipe, mine, target, folder, tokens, quiet=ranks.rank > 0)
        files = {at: file.name for at, file in kept.items()}
        missing = [at for at in mine if at not in files]
        found = sum(samples_of(file) for file in kept.values())
        total = None if recipe.samples is None else sum(recipe.parts[at].size for at in mine)
        # The rate is that of the parts made now.
        with tqdm(total=total, initial=found, unit="sample", desc=target.name, disable=ranks.rank > 0) as bar:
            following = None
            try:
                for at, after in zip_longest(missing, missing[1:]):
                    making = following or _begun(recipe.parts[at])
                    # Its first pictures are read while the last ones of this part are encoded.
                    following = None if after is None else _begun(recipe.parts[after])
                    bar.set_description(f"{target.name}, part {len(files) + len(bad_shards) + 1} of {len(mine)}")
                    before = bar.n
                    try:
                        file = _made(making, folder, recipe.parts[at].name, bar)
                    except ShardError as error:
                        if recipe.parts[at].shard is None or ranks.count_bad_shard() > config.data.max_bad_shards:
                            raise
                        bad_shards[at] = str(error)
                        tell(f"notice: left out: {error}")
                        bar.n = before
                        continue
                    files[at] = file.name
                    tokens.begin(at, file)
                    bar.update(samples_of(file) - (bar.n - before))
                    if recipe.samples is None:
                        bar.total = bar.n * len(mine) // (len(files) + len(bad_shards))
            finally:
                if following is not None and not isinstance(following, ShardError):
                    following.close()
        return {"files": files, "tokens": tokens.files(), "bad_shards": bad_shards}


def _kept(
    recipe: Recipe, mine: Sequence[int], target: Path, folder: Path, tokens: Tokens, *, quiet: bool
) -> dict[int, Path]:
    """The parts of these numbers that stand, or else their origins in the store at `target`."""
    files: dict[int, Path] = {}
    parts, origins = held_in(folder), held_in(target, ORIGIN)
    # Read, and proved, where one is wanted.
    standing, texts = cache(partial(_proved, target, "features.bin")), cache(partial(_proved, target, *TEXT_FILES))
    for at in tqdm(mine, f"{target.name}, parts that stand", unit="part", disable=quiet or not (parts or origins)):
        name = recipe.parts[at].name
        part, origin = parts.get(name), origins.get(name)
        if is_sound(part) and has_features(part):
            files[at] = part
            tokens.begin(at, part)
        elif is_sound(origin) and (store := standing()) is not None:
            files[at] = origin
            if not tokens.are_in(origin, store) or texts() is None:
                tokens.begin(at, origin)
    return files


def _proved(target: Path, *files: str) -> Store | None:
    """The store there, if these of its files are as they were written."""
    try:
        manifest = read_manifest(target)
        if manifest["kind"] != "pairs":
            return None
        check(target, {name: manifest["files"][name] for name in files}, ANEW)
        return Store(target)
    except UserError:
        return None


def _begun(part: Part) -> Making | ShardError:
    try:
        making = part.make()
        making.start()
    except ShardError as error:
        return error
    return making


def _made(making: Making | ShardError, folder: Path, name: str, bar: Any) -> Path:
    if isinstance(making, ShardError):
        raise making
    try:
        return write_part(folder, name, making, bar)
    finally:
        making.close()


def _fingerprint(known: Sequence[Described | None], without: Container[str] = ()) -> str:
    """Of the files, but for those that cannot be had and those `without`, by place."""
    held = [file for file in known if file is not None and file.place not in without]
    found = [(location(file.place).name, file.size, file.changed) for file in held]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
