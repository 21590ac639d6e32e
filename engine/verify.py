"""`efficientclip verify PATH`: whether what this engine wrote there is whole; every byte is read anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import get_args

import torch
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from tqdm import tqdm

from .config import Tracker
from .data.store import Store, TextStore, read_manifest
from .errors import UserError, message_of, reading, tell
from .evaluation.run import pointed, read_metrics
from .files import digests
from .files.lock import NAME as LOCK
from .files.ownership import MARK, RESULTS, kind_of
from .hardware import read_hardware
from .noise.cross_fit import FILE as CROSS_FIT
from .noise.cross_fit import read_cross_fit
from .prepare.parts import held_in
from .prepare.writer import ORIGIN
from .training.run_folder import run_config, run_identity

WHOLE, NOT_COVERED = "whole", "not covered"
RESTORE = "restore it from a copy, or make it anew"
WEIGHTS = "*.safetensors"
ANEW_LATER = "remove it: the store is whole without it, and the next `prepare` that adds to it encodes that part again"
GIVE = "give a store, a run, a model folder or a cross-fit folder, or one of exported pairs"


@dataclass(frozen=True)
class Part:
    """Files that share a verdict; `error` tells what is broken."""

    name: str
    files: int
    bytes: int
    verdict: str
    error: str | None = None


def verify(path: Path) -> list[Part]:
    """The parts of what lies at `path`; UserError when that is nothing of this engine's."""
    if not path.is_dir():
        raise UserError(f"verify {path}: {'is a file' if path.exists() else 'no such folder'}; {GIVE}")
    kind = kind_of(path)
    if kind is None and (path / "config.yaml").is_file() and (path / "identity.json").is_file():
        kind = "run"
    if kind is None and ((path / digests.NAME).is_file() or digests.owed(path)):
        kind = "model"
    parts: dict[str, Callable[[Path, Path], Iterator[Part]]]
    parts = {"store": _store, "run": _run, "model": _model, "cross-fit": _cross_fit, "kept pairs": _kept_pairs}
    if kind not in parts:
        found = "nothing that efficientclip wrote with digests" if kind is None else f"a folder of {kind}"
        raise UserError(f"verify {path}: is {found}; {GIVE}")
    return list(parts[kind](path, path))


def broken(parts: list[Part]) -> UserError | None:
    """The one message about all that is broken."""
    wrong = [part for part in parts if part.error is not None]
    if not wrong:
        return None
    more = f"; also broken: {', '.join(part.name for part in wrong[1:])}" if wrong[1:] else ""
    return UserError(f"{wrong[0].error}{more}")


def part_table(parts: list[Part], title: str) -> Table:
    table = Table(title=Text(title))
    table.add_column("part", overflow="fold")
    table.add_column("files", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("verdict", overflow="fold")
    for part in parts:
        style = "red" if part.error is not None else "yellow" if part.verdict == NOT_COVERED else ""
        table.add_row(Text(part.name), f"{part.files:,}", f"{part.bytes:,}", Text(part.verdict, style=style))
    return table


def _store(store: Path, root: Path) -> Iterator[Part]:
    file = store / "manifest.json"
    try:
        manifest = read_manifest(store)
    except UserError as error:
        yield _part(file, root, str(error))
        return
    found = list(_read(store, manifest["files"], root))
    yield from found
    if any(part.error for part in found):
        yield _part(file, root, None)
    else:
        kind = Store if manifest["kind"] == Store.kind else TextStore
        yield _checked(file, root, lambda: kind(store).check_contents(), suffix=" and what the files hold")
    origins = {origin.name: origin for origin in held_in(store, ORIGIN).values()}
    for origin in origins.values():
        yield _part(
            origin,
            root,
            None if digests.is_named_by(origin) else f"store {origin}: is not what was written; {ANEW_LATER}",
        )
    yield from _uncovered(store, {*manifest["files"], file.name, *origins}, root)


def _run(run: Path, root: Path) -> Iterator[Part]:
    covered: set[str] = set()
    if (run / digests.NAME).is_file() or digests.owed(run):
        yield from _covered(run, covered, root)
    else:
        yield _checked(run / "config.yaml", root, lambda: run_config(run))
        for name, read in (
            ("identity.json", lambda: run_identity(run)),
            ("hardware.json", lambda: read_hardware(run / "hardware.json")),
            ("metrics.jsonl", lambda: read_metrics(run / "metrics.jsonl")),
        ):
            if (run / name).is_file():
                yield _checked(run / name, root, read, sound=NOT_COVERED)
        covered.update({"config.yaml", "identity.json", "hardware.json", "metrics.jsonl"})
    for folder in (run / "model", *sorted((run / "checkpoints").glob("step-*"))):
        if folder.is_dir() and folder.suffix != ".partial":
            yield from _model(folder, root)
            covered |= {path.relative_to(run).as_posix() for path in folder.rglob("*")}
    for name in ("latest", "best"):
        pointer = run / "checkpoints" / name
        covered.add(f"checkpoints/{name}")
        if (pointer.is_symlink() or pointer.exists()) and pointed(pointer) is None:
            tell(f"notice: {pointer}: names no checkpoint that is there; the newest whole one is used")
    yield from _uncovered(run, covered, root)


def _model(folder: Path, root: Path) -> Iterator[Part]:
    """A model's folder, or a checkpoint's."""
    covered: set[str] = set()
    yield from _covered(folder, covered, root)
    yield from _uncovered(folder, covered, root)
    for file in sorted(folder.rglob(WEIGHTS)):
        yield _checked(file, root, partial(_require_finite, file), suffix=", its weights")


def _cross_fit(folder: Path, root: Path) -> Iterator[Part]:
    covered = {CROSS_FIT}
    if (folder / CROSS_FIT).is_file():
        yield _checked(folder / CROSS_FIT, root, lambda: read_cross_fit(folder))
    for inside in (folder / "model", folder / "fold-0", folder / "fold-1"):
        if inside.is_dir():
            yield from (_model if inside.name == "model" else _run)(inside, root)
            covered |= {path.relative_to(folder).as_posix() for path in inside.rglob("*")}
    yield from _uncovered(folder, covered, root)


def _kept_pairs(folder: Path, root: Path) -> Iterator[Part]:
    """Shards that `audit --export` wrote; earlier versions noted their sizes alone."""
    file = folder / "export.json"
    try:
        with reading("export", file, RESTORE):
            record = json.loads(file.read_text(encoding="utf-8"))
            shards = {str(shard["name"]): {"bytes": int(shard["bytes"]), **shard} for shard in record["shards"]}
            if wrong := [name for name in shards if Path(name).name != name]:
                raise ValueError(f"{wrong[0]} is no file beside it")
            if not record["finished"]:
                tell(f"notice: {folder}: unfinished; the same `efficientclip audit --export` goes on with it")
    except UserError as error:
        yield _part(file, root, str(error))
        return
    yield from _read(folder, {name: shard for name, shard in shards.items() if "xxh3" in shard}, root)
    for name in (name for name, shard in shards.items() if "xxh3" not in shard):
        yield _checked(
            folder / name, root, partial(digests.check_sizes, folder, {name: shards[name]}, RESTORE), sound=NOT_COVERED
        )
    yield from _uncovered(folder, {*shards}, root)


def _covered(folder: Path, covered: set[str], root: Path) -> Iterator[Part]:
    """Verdicts on the files that digests tell of, which are added to `covered`."""
    try:
        told = digests.covering(folder, RESTORE) or {}
    except UserError as error:
        yield _part(folder / digests.NAME, root, str(error))
        return
    # Reports are written into a finished run again and again.
    files = {name: entry for name, entry in told.items() if name not in RESULTS}
    covered.update(files)
    yield from _read(folder, files, root)


def _read(folder: Path, files: digests.Described, root: Path) -> Iterator[Part]:
    """Each broken one of `files`, and all others together."""
    present = {name: entry for name, entry in files.items() if (folder / name).is_file()}
    total = sum((folder / name).stat().st_size for name in present)
    shown = _shown(folder, root)
    with (
        tqdm(total=total, desc=f"reading {shown}", unit="B", unit_scale=True, disable=total < digests.LONG) as bar,
        ThreadPoolExecutor(4) as pool,
    ):

        def verdict(name: str) -> str | None:
            try:
                digests.check_sizes(folder, {name: files[name]}, RESTORE)
                with reading("file", folder / name, RESTORE):
                    if digests.digest_of(folder / name, bar.update) != files[name]["xxh3"]:
                        raise UserError(f"{folder / name}: is not what was written (its digest differs); {RESTORE}")
            except UserError as error:
                return str(error)
            return None

        errors = dict(zip(files, pool.map(verdict, files), strict=True))
    wrong = {name: error for name, error in errors.items() if error is not None}
    if wrong:
        digests.forget(folder)
    for name, error in wrong.items():
        yield _part(folder / name, root, error)
    if sound := files.keys() - wrong.keys():
        yield Part(shown, len(sound), sum(files[name]["bytes"] for name in sound), WHOLE)


def _checked(file: Path, root: Path, check: Callable[[], object], *, sound: str = WHOLE, suffix: str = "") -> Part:
    try:
        check()
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        return _part(file, root, message, suffix)
    return _part(file, root, None, suffix, sound)


def _part(file: Path, root: Path, error: str | None, suffix: str = "", sound: str = WHOLE) -> Part:
    size = file.stat().st_size if file.is_file() else 0
    verdict = sound if error is None else f"broken: {error.partition(': ')[2].rpartition('; ')[0] or error}"
    return Part(_shown(file, root) + suffix, int(file.is_file()), size, verdict, error)


def _uncovered(folder: Path, covered: set[str], root: Path) -> Iterator[Part]:
    """Files without digests: those of a tracker, of which there may be hundreds, together."""
    names = [name for name in digests.files_in(folder) if name not in covered and Path(name).name not in (MARK, LOCK)]
    for first, group in groupby(names, lambda name: name.partition("/")[0]):
        files = [folder / name for name in group]
        if first in get_args(Tracker):
            size = sum(file.stat().st_size for file in files)
            yield Part(_shown(folder / first, root), len(files), size, NOT_COVERED)
        else:
            yield from (_part(file, root, None, sound=NOT_COVERED) for file in files)


def _require_finite(file: Path) -> None:
    with reading("weights", file, RESTORE), safe_open(file, framework="pt") as weights:
        for name in list(weights.keys()):
            value = weights.get_tensor(name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"the weight {name} is not finite")


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path != root else str(root)
