"""A folder that is made aside and takes its place whole: what a killed call left goes, and one process makes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import stopping
from ..errors import writing
from .atomic import put_in_place
from .lock import NAME as LOCK
from .lock import held
from .ownership import Kind, claim, kind_of, mark


def clear_aside(out: Path, kind: Kind, doing: str) -> None:
    """Remove what a killed call left aside: it is ours by its mark, and that call may have died as it removed that."""
    aside = _aside(out)
    if kind_of(aside) == kind or (aside.is_dir() and {file.name for file in aside.iterdir()} <= {LOCK}):
        with held(aside, doing), stopping.scratch(aside):
            pass


@contextmanager
def made_aside(out: Path, kind: Kind, doing: str, claimed: Callable[[], object]) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and goes when it does not.

    `claimed` claims `out` once more before that, since others may have written there meanwhile. UserError names the
    process that makes the same one.
    """
    target, aside = Path(os.path.realpath(out)), _aside(out)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        mark(claim(aside, kind), kind)
        with held(aside, doing), stopping.scratch(aside):
            folder = aside / "made"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            mark(folder, kind)
            claimed()
            put_in_place(folder, target)


def _aside(out: Path) -> Path:
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.partial"
