"""Files and folders that appear whole or not at all: written aside, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import writing


def write_atomically(path: Path, content: bytes) -> None:
    """Write, fsync, rename: a reader sees the old file or the whole new one."""
    with written_aside(path) as aside:
        aside.write_bytes(content)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and is removed when it does not."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def as_umask(folder: Path) -> None:
    """Give the files in `folder` the modes that new files have: safetensors writes 0600 whatever the umask is."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(made: Path, target: Path) -> None:
    """Rename the finished folder `made` to `target`; an older one that stands there goes once the new one stands."""
    old = set_aside(target)
    with writing(target):
        if old.exists():
            # Left by a call that died here: `target` is whole, or `recover` had put the old one back.
            shutil.rmtree(old)
        for folder in (made, *(path for path in made.rglob("*") if path.is_dir())):
            sync(folder)
        if target.exists():
            os.replace(target, old)
        os.replace(made, target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Put back what a `put_in_place` that died half-way had set aside."""
    old = set_aside(target)
    if old.is_dir() and not target.exists():
        os.replace(old, target)


def set_aside(target: Path) -> Path:
    """Where the folder at `target` waits while its successor takes its place."""
    return target.with_name(f".{target.name}.replaced")
