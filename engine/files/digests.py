"""Digests of files: written beside them, and read again before they are believed.

digests.json    {relative path: {bytes, xxh3}} of the folder it lies in, for checkpoints, models and runs

XXH3 of 128 bits finds what disks, networks and cut calls do to a file, at the speed of reading it; it is no proof
against someone who means harm.

A file whose digest was computed and that has not been touched since (device, inode, size, times) is not read again:
the user's cache folder remembers. `efficientclip verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from tqdm import tqdm
from xxhash import xxh3_128

from ..errors import UserError, reading
from .atomic import sync, write_atomically
from .ownership import MARK, kind_of

NAME = "digests.json"
# It stays in a core's cache between reading and hashing.
CHUNK = 1 << 20
# Below it a bar would only flicker.
LONG = 1 << 30
Signature = tuple[int, int, int, int, int]
Described = dict[str, dict[str, Any]]
Known = dict[Signature, str]
T = TypeVar("T")


def digest_of(file: Path, progress: Callable[[int], Any] = lambda read: None) -> str:
    """Of the whole file, in hex; `progress` is told the bytes read."""
    return _digests_of(file, progress, xxh3_128())[0]


def _digests_of(file: Path, progress: Callable[[int], Any], *states: Any) -> list[str]:
    chunk = bytearray(CHUNK)
    view = memoryview(chunk)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(chunk):
            for state in states:
                state.update(view[:count])
            progress(count)
    return [state.hexdigest() for state in states]


def is_named_by(file: Path) -> bool:
    """Whether the name of `file` ends with the digest of what it holds."""
    return file.stem.endswith(digest_of(file))


def described(folder: Path, files: Iterable[str], known: Mapping[str, str] = MappingProxyType({})) -> Described:
    """Size and digest of `files` in `folder`, each fsynced while others are hashed, but for the `known` digests."""
    names = sorted(files)
    unread = [name for name in names if name not in known]
    total = sum((folder / name).stat().st_size for name in unread)
    with (
        tqdm(total=total, desc=f"digests of {folder.name}", unit="B", unit_scale=True, disable=total < LONG) as bar,
        ThreadPoolExecutor(4) as syncing,
        ThreadPoolExecutor(4) as hashing,
    ):
        synced = syncing.map(lambda name: sync(folder / name), names)
        read = hashing.map(lambda name: digest_of(folder / name, bar.update), unread)
        found = {**known, **dict(zip(unread, read, strict=True))}
        list(synced)
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3": found[name]} for name in names}


def files_in(folder: Path) -> list[str]:
    """Relative paths of the files under `folder`, but digests.json and hidden ones."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in inside if path.name != NAME and not path.name.startswith("."))


def write_digests(folder: Path, files: Described | None = None) -> None:
    """Write digests.json, of `files` or else of everything in `folder`."""
    found = described(folder, files_in(folder)) if files is None else files
    write_atomically(folder / NAME, json.dumps(found, indent=1).encode())


def read_digests(folder: Path) -> Described:
    """UserError where there are none, or they are broken."""
    file = folder / NAME
    if not file.is_file():
        raise UserError(f"{folder}: no {NAME}, so it was cut short, or an earlier version wrote it")
    with reading("digests", file, "restore the folder from a copy"):
        found: Described = json.loads(file.read_text(encoding="utf-8"))
        for name, entry in found.items():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["xxh3"], str) or ".." in Path(name).parts:
                raise ValueError(f"{name} is not described by bytes and xxh3")
    return found


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """UserError naming the first of `files` in `folder` that is missing or not as long as described."""
    for name, entry in files.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != entry["bytes"]:
            found = (
                "is missing" if actual is None else f"has {actual} bytes, not the {entry['bytes']} it was written with"
            )
            raise UserError(f"{file}: {found}; {remedy}")


def check(
    folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str, *, known: Known | None = None, anew: bool = False
) -> Known:
    """UserError naming the first of `files` in `folder` whose size or digest is not the described one.

    `known` digests are not computed again, nor those of the user's cache; `anew` reads all files. Returns those of
    `files` by signature.
    """
    check_sizes(folder, files, remedy)
    signatures = {name: signature(folder / name) for name in files}
    before = _cached(folder)
    found: Known = {} if anew else {**before, **(known or {})}
    unread = [name for name in files if signatures[name] not in found]
    for name, digest in zip(unread, _read(folder, unread, digest_of), strict=True):
        found[signatures[name]] = digest
    for name, entry in files.items():
        if found[signatures[name]] != entry["xxh3"]:
            forget(folder)
            raise _differs(folder / name, remedy)
    sound = {signatures[name]: found[signatures[name]] for name in files}
    if unread:
        remember(folder, before | sound)
    return sound


def described_anew(folder: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> Described:
    """Size and digest of `files` in `folder`, of which an earlier version told size and SHA-256; each is read once.

    UserError naming the first of another size or content.
    """
    check_sizes(folder, files, remedy)
    signatures = {name: signature(folder / name) for name in files}
    read = _read(folder, files, lambda file, progress: _digests_of(file, progress, xxh3_128(), hashlib.sha256()))
    found = dict(zip(files, read, strict=True))
    for name, (_, sha256) in found.items():
        if sha256 != files[name].get("sha256"):
            raise _differs(folder / name, remedy)
    remember(folder, {signatures[name]: digest for name, (digest, _) in found.items()})
    return {name: {"bytes": files[name]["bytes"], "xxh3": digest} for name, (digest, _) in found.items()}


def _read(folder: Path, names: Iterable[str], digest: Callable[[Path, Callable[[int], Any]], T]) -> list[T]:
    """The digest of each of these files, under a bar where that takes long."""
    files = [folder / name for name in names]
    total = sum(file.stat().st_size for file in files)
    with (
        tqdm(total=total, desc=f"checking {folder.name}", unit="B", unit_scale=True, disable=total < LONG) as bar,
        ThreadPoolExecutor(4) as pool,
    ):
        return list(pool.map(lambda file: digest(file, bar.update), files))


def _differs(file: Path, remedy: str) -> UserError:
    return UserError(f"{file}: is not what was written (its digest differs); {remedy}")


def check_written(folder: Path, *patterns: str, remedy: str) -> None:
    """`check` of those files whose names fit `patterns`, and that `covering` tells of."""
    entries = covering(folder, remedy) or {}
    covered = {name: entry for name, entry in entries.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    check(folder, covered, remedy)


def covering(folder: Path, remedy: str) -> Described | None:
    """What digests.json tells of the files in `folder`: its own, or, of a checkpoint's model, the checkpoint's.

    None where an earlier version wrote the folder; UserError where this one did, and digests.json is gone.
    """
    if (folder / NAME).is_file():
        return read_digests(folder)
    path = Path(os.path.abspath(folder))
    if path.name == "model" and (path.parent / NAME).is_file():
        entries = read_digests(path.parent).items()
        if inside := {name.removeprefix("model/"): entry for name, entry in entries if name.startswith("model/")}:
            return inside
    if folder.is_dir() and owed(folder):
        raise UserError(f"{folder / NAME}: is missing, so that nothing proves what lies beside it; {remedy}")
    return None


def owed(folder: Path) -> bool:
    """Whether digests are to be there: this version wrote `folder`, or the run or cross-fit that it is part of.

    Earlier ones left neither a mark nor identity.json.
    """
    places = (Path(os.path.abspath(folder)), Path(os.path.realpath(folder)))
    return any(
        (owner / "identity.json").is_file()
        or ((owner / MARK).is_file() and kind_of(owner) in ("run", "model", "cross-fit"))
        for place in places
        for owner in _owners(place)
    )


def _owners(path: Path) -> Iterator[Path]:
    """The folder itself, and those that it may be part of."""
    yield path
    if path.name == "model":
        path = path.parent
        yield path
    if path.parent.name == "checkpoints":
        yield path.parents[1]


def seen(found: Known, rules: str) -> bool:
    """Whether files of these digests passed `rules` before, in this process or by the user's cache."""
    return _seen_file(found, rules).is_file()


def note_seen(found: Known, rules: str) -> None:
    file = _seen_file(found, rules)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def forget(folder: Path) -> None:
    """Whatever the user's cache knows of `folder` is computed anew: a disk may change a file without a trace."""
    with suppress(OSError):
        _cache_file(folder).unlink(missing_ok=True)


def signature(file: Path) -> Signature:
    """What changes when a file is written or replaced."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _cache(name: str) -> Path:
    # Users without a home have the system's folder for what may go.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(home if os.path.isabs(home) else Path(tempfile.gettempdir()) / f"cache-{os.getuid()}")
    return root / "efficientclip" / "digests" / hashlib.sha256(name.encode()).hexdigest()[:32]


def _cache_file(folder: Path) -> Path:
    return _cache(f"folder {os.path.realpath(folder)}")


def _seen_file(found: Known, rules: str) -> Path:
    return _cache(f"{rules} {sorted(found.values())}")


def _cached(folder: Path) -> Known:
    try:
        entries = json.loads(_cache_file(folder).read_text(encoding="utf-8"))
        return {tuple(entry[:-1]): entry[-1] for entry in entries}
    except (OSError, ValueError, TypeError):
        return {}


def remember(folder: Path, found: Known) -> None:
    """Believe the digests `found` of the files in `folder` until these are touched.

    A cache that cannot be written costs a second reading, no more.
    """
    file = _cache_file(folder)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(json.dumps([[*key, digest] for key, digest in found.items()]), encoding="utf-8")
        os.replace(aside, file)
