"""The score history of a run: one file an epoch, written at its end, so that no rank holds more than the current epoch.

history/epoch-00003.npy    [pairs] of (score float16, kept bool), by the store's pair row

`score` is the pair's mean z-score in that epoch alone, NaN where it was not seen or the epoch was warm-up; `kept` is
the verdict at the epoch's end. numpy alone opens and memory-maps a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError, reading
from ..files import digests
from ..files.atomic import written_aside

RESTORE = "restore it from a copy, or train the run anew"
RECORD = np.dtype([("score", np.float16), ("kept", np.bool_)])


def write_epoch(run: Path, epoch: int, score: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_]) -> Path:
    """Write `epoch`'s file whole or not at all, in the place of one that is there; returns it."""
    folder = run / "history"
    folder.mkdir(exist_ok=True)
    records = np.empty(len(kept), RECORD)
    records["score"], records["kept"] = score, kept
    file = folder / _name(epoch)
    with written_aside(file) as aside, aside.open("wb") as stream:
        np.save(stream, records)
    return file


def forget_from(run: Path, epoch: int) -> None:
    """Remove what a killed run wrote after its checkpoint: a resumed one goes through `epoch` again."""
    for file in (run / "history").glob("epoch-*"):
        if file.name >= _name(epoch):
            file.unlink()


def epoch_files(run: Path) -> list[Path]:
    """The files of epochs 0, 1, …; UserError when one is missing or not as it was written."""
    digests.check_written(run, "history/*.npy", remedy=RESTORE)
    files = sorted((run / "history").glob("epoch-*.npy"))
    for epoch, file in enumerate(files):
        if file.name != _name(epoch):
            raise UserError(f"run {run}: history/{_name(epoch)} is missing, later epochs are there; put it back")
    return files


def open_epoch(file: Path) -> npt.NDArray[Any]:
    """The records of one epoch, memory-mapped: RECORD [pairs]."""
    with reading("history", file, RESTORE):
        records: npt.NDArray[Any] = np.load(file, mmap_mode="r")
        if records.dtype != RECORD or records.ndim != 1:
            raise ValueError(f"{records.dtype} {list(records.shape)} instead of {RECORD} [pairs]")
    return records


def _name(epoch: int) -> str:
    return f"epoch-{epoch:05d}.npy"
