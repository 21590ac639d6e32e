"""What a run writes as it goes, metrics.jsonl and history/, and the proof that a resumed run finds it as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, reading, writing
from ..files import digests
from ..files.atomic import sync, write_atomically
from .trackers import Board

RESTORE = "restore it from a copy, or choose another run folder to begin anew"


class Written:
    """Digests of the finished files in history/ and of metrics.jsonl so far; each checkpoint tells them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.history: digests.Described = {}

    def add(self, file: Path) -> None:
        """`file` of history/ is written; one of that name before it is forgotten."""
        self.history[file.name] = digests.described(file.parent, [file.name])[file.name]

    def state(self) -> str:
        """As JSON, with the length and digest of metrics.jsonl, to which later steps are added."""
        file = self.run / "metrics.jsonl"
        if file.is_file():
            # After a power cut the checkpoint must not know more of it than the disk does.
            sync(file)
        content = file.read_bytes() if file.is_file() else b""
        metrics = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return json.dumps({"history": self.history, "metrics": metrics})

    def restore(self, state: str) -> None:
        """UserError naming the file that is not what it was when `state` was taken."""
        told = json.loads(state)
        self.history, metrics = told["history"], told["metrics"]
        digests.check(self.run / "history", self.history, RESTORE)
        file = self.run / "metrics.jsonl"
        with reading("metrics", file, RESTORE):
            content = file.read_bytes()[: metrics["bytes"]] if metrics["bytes"] else b""
        if hashlib.sha256(content).hexdigest() != metrics["sha256"]:
            raise UserError(f"{file}: is not what was written (its digest differs); {RESTORE}")


class Metrics:
    """metrics.jsonl of one run, and what shows it; lines after a resumed step are cut off first."""

    def __init__(self, run: Path, step: int, boards: Sequence[Board]) -> None:
        self.file = run / "metrics.jsonl"
        if self.file.is_file():
            lines = [line for line in self.file.read_text(errors="replace").split("\n") if _step_of(line) <= step]
            write_atomically(self.file, "".join(line + "\n" for line in lines).encode())
        self.boards = boards
        self.pending: list[dict[str, float]] = []

    def add(self, values: dict[str, float]) -> None:
        self.pending.append(values)

    def write(
        self, step: int, visits: int, epoch: int, batch_size: int, kept: float, kept_by_source: Mapping[str, float]
    ) -> None:
        """One line for the steps since the last: means, and rates over their time."""
        n = len(self.pending)
        total = {name: sum(values[name] for values in self.pending) for name in self.pending[0]}
        line = {name: value / n for name, value in total.items() if name not in ("tokens", "data_wait_seconds")}
        line |= {
            "lr": self.pending[-1]["lr"],
            "kept_share": kept,
            "pairs_per_s": n * batch_size / total["step_seconds"],
            "tokens_per_s": total["tokens"] / total["step_seconds"],
            "data_wait_share": total["data_wait_seconds"] / total["step_seconds"],
        }
        by_source = {"kept_share_by_source": kept_by_source} if kept_by_source else {}
        self._write(step, {"visits": visits, "epoch": epoch, **line, **by_source})
        self.pending = []

    def validation(self, step: int, visits: int, epoch: int, reports: dict[str, dict[str, Any]]) -> None:
        self._write(step, {"visits": visits, "epoch": epoch, "validation": reports})

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        scalars = {f"train/{name}": value for name, value in values.items() if isinstance(value, float)}
        for name, report in values.get("validation", {}).items():
            scalars |= {f"{name}/{direction} R@10": report[direction]["R@10"] for direction in ("t2i", "i2t")}
        for board in self.boards:
            board.add(scalars, step)

    def close(self, finished: bool) -> None:
        for board in self.boards:
            board.close(finished)


def _step_of(line: str) -> int:
    """A line cut short by a crash belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
