"""Whose a folder or file is: commands replace and remove only what bears this engine's own mark."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args

from .. import __version__
from ..errors import UserError
from .atomic import recover, set_aside, write_atomically

Kind = Literal["store", "run", "cross-fit", "demo data", "model", "kept pairs"]
MARK = ".efficientclip.json"
MADE_BY = "made by efficientclip"
# Profiles say by their format whose they are.
MARKS = (MADE_BY.encode(), b'"efficientclip-profile-')
# Earlier versions wrote these into runs without a mark.
RESULTS = ("report.html", "results.json", "search.png", "audit.html", "audit.parquet")
# What shells and schedulers put beside a run before it starts.
LOGS = ("*.log", "*.out", "*.err")


def mark(folder: Path, kind: Kind) -> None:
    """Make `folder` ours, as a `kind`; a mark that is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).is_file():
        content = {"kind": kind, "made_by": f"efficientclip {__version__}"}
        write_atomically(folder / MARK, json.dumps(content).encode())


def kind_of(folder: Path) -> str | None:
    """What the folder is of ours: by its mark, or by what folders of earlier versions hold; None: not ours."""
    if (marked := _json(folder / MARK).get("kind")) in get_args(Kind):
        return str(marked)
    manifest = _json(folder / "manifest.json")
    if manifest.keys() >= {"format", "kind", "files"}:
        return "store"
    if manifest.keys() >= {"pictures", "noise_share", "sha256"}:
        return "demo data"
    if _json(folder / "export.json").keys() >= {"identity", "shards", "next"}:
        return "kept pairs"
    if (folder / "cross_fit.parquet").is_file() or (folder / "fold-0" / "config.yaml").is_file():
        return "cross-fit"
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return "run"
    return None


def claim(
    folder: Path,
    kind: Kind,
    *,
    sources: Iterable[Path] = (),
    existing: Literal["go on", "refuse", "replace"] = "go on",
    files: Iterable[str] = (),
    beside: Sequence[str] = (),
) -> Path:
    """The folder that `folder` names, links followed, when a `kind` may be written there: absent, empty or ours.

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
    _require_folder_above(target, shown)
    old = set_aside(target)
    if os.path.lexists(old) and kind_of(old) != kind:
        raise UserError(f"{shown}: {old} stands where an older one waits while it is replaced; move it away")
    recover(target)
    if not target.exists():
        return target
    # A replacement was cut short over its last step.
    shutil.rmtree(old, ignore_errors=True)
    if not target.is_dir():
        raise UserError(f"{shown}: is a file; name a folder")
    found = kind_of(target)
    if found is None:
        # Killed over its mark, a command left half of it.
        known = (*beside, f".{MARK}.partial")
        foreign = sorted(name for name in os.listdir(target) if not any(fnmatch(name, one) for one in known))
        if foreign:
            raise UserError(
                f"{shown}: holds what efficientclip did not write ({_some(foreign)}) and stays as it is; name a folder"
                " that is empty or does not exist yet"
            )
    if existing != "go on" and target.is_mount():
        raise UserError(f"{shown}: is a mount point, which cannot be renamed; name a folder in it")
    if found is None:
        return target
    if found != kind:
        raise UserError(f"{shown}: is a {found}, and stays as it is; name another folder")
    if existing == "refuse":
        raise UserError(f"{shown}: there is one already; --replace puts the new one in its place")
    if existing == "replace" and (foreign := _beyond(target, {*files, MARK})):
        raise UserError(
            f"{shown}: holds files that are no part of it ({_some(foreign)}), which replacing it would remove; move"
            " them away"
        )
    return target


def claim_file(file: Path, *, replace: bool = False, instead: str = "name another file") -> Path:
    """The file that `file` names, links followed, when it may be written: absent, or made by us.

    Anything else needs `replace`, the user's --replace. `instead` is what to do where the folder cannot be written.
    """
    target = Path(os.path.realpath(file))
    _require_folder_above(target, str(file))
    if target.exists() and not target.is_file():
        raise UserError(f"{file}: is no file, but a {'folder' if target.is_dir() else 'device'}; name a file")
    above = next(parent for parent in target.parents if parent.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{file}: {above} cannot be written; {instead}")
    earlier = target.name in RESULTS and kind_of(target.parent) == "run"
    if target.exists() and not (replace or earlier or _bears_mark(target)):
        raise UserError(
            f"{file}: exists, and efficientclip did not write it; --replace overwrites it, or name another file"
        )
    return target


def _bears_mark(file: Path) -> bool:
    """Pages and pictures carry it in their head, Parquet files in their foot."""
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - (1 << 16)))
        foot = stream.read()
    return any(known in head or known in foot for known in MARKS)


def _require_folder_above(target: Path, shown: str) -> None:
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{shown}: {above} is a file, where a folder is wanted; name another path")


def _beyond(folder: Path, files: set[str]) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    inside = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in inside if name not in files)


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
