"""Whose a folder or file is: commands replace and remove only what bears this engine's own mark."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from .. import __version__
from ..errors import UserError
from .atomic import recover, set_aside, write_atomically
from .lock import NAME as LOCK

Kind = Literal["store", "run", "cross-fit", "demo data", "model", "kept pairs", "features", "fit"]
Made = Literal["page", "picture", "table", "suspects", "result", "profile", "trace"]
MARK = ".efficientclip.json"
MADE_BY = "made by efficientclip"
BY = MADE_BY.encode()
# The columns of a list of suspects, which no other program writes together.
SUSPECTS = ("row", "key", "caption", "source", "wrong_probability", "evidence", "verdict", "reason")
# Where each file but pictures and tables says, at its beginning, whose it is.
CARRIERS = {
    "page": re.compile(rb'<!doctype html>(?:(?!<title|<style).)*<meta name="generator" content="%b ' % BY, re.DOTALL),
    "result": re.compile(rb'\s*\{\s*"made_by":\s*"%b ' % BY),
    "suspects": re.compile(b"\xef\xbb\xbf%b\n" % ",".join(SUSPECTS).encode()),
    "profile": re.compile(rb'\s*\{\s*"format":\s*"efficientclip-profile-'),
    # The name in the header of a gzip file.
    "trace": re.compile(rb"\x1f\x8b\x08\x08.{6}%b " % BY, re.DOTALL),
}
PNG = b"\x89PNG\r\n\x1a\n"
# These are built elsewhere, and renamed to where they belong.
RENAMED = ("store", "model", "features")
# Earlier versions wrote these into runs without a mark.
RESULTS = ("report.html", "results.json", "search.png", "audit.html", "audit.parquet")
# What shells and schedulers put beside a run before it starts.
LOGS = ("*.log", "*.out", "*.err")


def mark(folder: Path, kind: Kind, **told: str) -> None:
    """Make `folder` ours, as a `kind`; a mark that is there stays. `told` is kept in it, for `marked`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).is_file():
        content = {"kind": kind, "made_by": f"efficientclip {__version__}", **told}
        write_atomically(folder / MARK, json.dumps(content).encode())


def marked(folder: Path) -> dict[str, object]:
    """What the mark of `folder` tells; nothing where there is none."""
    return _json(folder / MARK)


def kind_of(folder: Path) -> str | None:
    """What the folder is of ours: by its mark, or by what folders of earlier versions hold; None: not ours."""
    if (kind := marked(folder).get("kind")) in get_args(Kind):
        return str(kind)
    # Other programs have a manifest.json, a config.yaml beside checkpoints/ or a fold-0/, too.
    manifest = _json(folder / "manifest.json")
    if manifest.keys() >= {"format", "kind", "files"} and _keys(manifest["files"]) >= {"tokens.bin", "offsets.bin"}:
        return "store"
    if manifest.keys() >= {"pictures", "noise_share", "noise_seed"} and "train" in _keys(manifest["pictures"]):
        return "demo data"
    export = _json(folder / "export.json")
    if export.keys() >= {"identity", "shards", "next"} and _keys(export["identity"]) >= {"pairs", "kept", "samples"}:
        return "kept pairs"
    if _is_run(folder / "fold-0") or _table_tells(folder / "cross_fit.parquet", b"rate", b"visits", b"pairs"):
        return "cross-fit"
    return "run" if _is_run(folder) else None


def _is_run(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-????????/state.npz"))


def claim(
    folder: Path,
    kind: Kind,
    *,
    sources: Iterable[Path] = (),
    existing: Literal["go on", "refuse", "replace"] = "go on",
    files: Iterable[str] = (),
    beside: Sequence[str] = (),
) -> Path:
    """The folder that `folder` names, links followed, when a `kind` can be written there: absent, empty or ours.

    `sources` are never written over. `existing` says what becomes of one of that kind that is there; `files` are
    what it consists of, by relative path: before it is replaced, anything else in it is an error. `beside`: patterns of
    files that may lie there already. UserError, before anything is changed, says what to do.
    """
    target = Path(os.path.realpath(folder))
    shown = f"{kind} {folder}"
    for source in sources:
        inside = Path(os.path.realpath(source))
        if target == inside or target in inside.parents:
            raise UserError(f"{shown}: is or holds the source {source}, which stays as it is; name another folder")
    above = _folder_above(folder, target, shown)
    if not target.name:
        raise UserError(f"{shown}: is the root of all folders; name a folder in it")
    old = set_aside(target)
    if os.path.lexists(old) and kind_of(old) != kind:
        raise UserError(f"{shown}: {old} stands where an older one waits while it is replaced; move it away")
    recover(target)
    another = "give this user the right to write there, or name another folder"
    if not target.exists():
        require_writable(above, shown, another)
        return target
    # A replacement was cut short over its last step.
    shutil.rmtree(old, ignore_errors=True)
    if not target.is_dir():
        raise UserError(f"{shown}: is a file; name a folder")
    found = kind_of(target)
    if found is None:
        # Killed over its mark, a command left half of it, or its lock alone.
        known = (*beside, f".{MARK}.partial", LOCK)
        foreign = sorted(name for name in os.listdir(target) if not any(fnmatch(name, one) for one in known))
        if foreign:
            raise UserError(
                f"{shown}: holds files without efficientclip's mark ({_some(foreign)}) and stays as it is; name a"
                " folder that is empty or does not exist yet"
            )
    if existing != "go on" and target.is_mount():
        raise UserError(f"{shown}: is a mount point, which cannot be renamed; name a folder in it")
    if found not in (None, kind):
        raise UserError(f"{shown}: is a {found}, and stays as it is; name another folder")
    if found is not None and existing == "refuse":
        raise UserError(f"{shown}: there is one already; --replace puts the new one in its place")
    if found is not None and existing == "replace":
        require_known(target, {*files, MARK}, shown)
    if existing != "go on":
        require_writable(above, shown, another)
    elif found is None or kind != "store":
        # One that stands may turn out to be the wanted one.
        require_writable(above if kind in RENAMED else target, shown, another)
    return target


def require_known(folder: Path, known: set[str], shown: str) -> None:
    """UserError where `folder`, about to be replaced, holds files beyond the `known`, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    inside = (path.relative_to(folder).as_posix() for path in found)
    if foreign := sorted(name for name in inside if name not in known):
        raise UserError(
            f"{shown}: holds files that are no part of it ({_some(foreign)}), which replacing it would remove; move"
            " them away"
        )


def claim_file(file: Path, made: Made, *, replace: bool = False, instead: str = "name another file") -> Path:
    """The file that `file` names, links followed, when what is `made` may be written there: absent, or one of ours.

    Anything else needs `replace`, the user's --replace. `instead` is what to do where the folder cannot be written.
    """
    target = Path(os.path.realpath(file))
    above = _folder_above(file, target, str(file))
    if target.exists() and not target.is_file():
        raise UserError(f"{file}: is no file, but a {'folder' if target.is_dir() else 'device'}; name a file")
    require_writable(above, str(file), instead)
    earlier = target.name in RESULTS and not (target.parent / MARK).is_file() and kind_of(target.parent) == "run"
    if target.exists() and not (replace or earlier or _is_ours(target, made)):
        raise UserError(
            f"{file}: exists, and efficientclip did not write it as a {made}; --replace overwrites it, or name another"
            " file"
        )
    return target


def _is_ours(file: Path, made: Made) -> bool:
    if made == "table":
        return _table_tells(file, b"made_by")
    with file.open("rb") as stream:
        if made == "picture":
            return _software(stream).startswith(BY)
        return CARRIERS[made].match(stream.read(1 << 12)) is not None


def _table_tells(file: Path, *keys: bytes) -> bool:
    """Whether `file` is a Parquet table whose metadata has `keys`, which no other program writes together."""
    if not file.is_file():
        return False
    # Few commands need it, and it is slow to load.
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(OSError, pa.ArrowException):
        told = pq.read_schema(file).metadata or {}
        return all(key in told for key in keys) and told.get(b"made_by", BY).startswith(BY)
    return False


def _software(picture: BinaryIO) -> bytes:
    """The program that a PNG names before its pixels."""
    if picture.read(len(PNG)) == PNG:
        while len(head := picture.read(8)) == 8 and head[4:] != b"IDAT":
            key, _, value = picture.read(int.from_bytes(head[:4])).partition(b"\0")
            picture.read(4)
            if head[4:] == b"tEXt" and key == b"Software":
                return value
    return b""


def _folder_above(given: Path, target: Path, shown: str) -> Path:
    """The nearest folder above `target`, which `given` names, that exists; UserError where none can be made in it."""
    named = Path(os.path.abspath(given))
    for path in (named, *named.parents):
        # Something new may be written where a link itself points to, in a folder that exists.
        usable = path == named and target.parent.is_dir() and not target.is_symlink()
        if path.is_symlink() and not path.exists() and not usable:
            raise UserError(f"{shown}: the link {path} leads nowhere; mend or remove it, or name another path")
    above = next((parent for parent in target.parents if parent.exists()), target)
    if not above.is_dir():
        raise UserError(f"{shown}: {above} is a file, where a folder is wanted; name another path")
    return above


def require_writable(folder: Path, shown: str, instead: str) -> None:
    """UserError on a read-only mount, too."""
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        why = os.strerror(errno.EROFS if read_only else errno.EACCES)
        raise UserError(f"{shown}: {folder} cannot be written ({why}); {instead}")


def _keys(value: object) -> Set[str]:
    return value.keys() if isinstance(value, dict) else set()


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
