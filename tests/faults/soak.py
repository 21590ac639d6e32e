"""`python -m tests.faults.soak --minutes 60`: faults by seed, for long, and a table of what came of them."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from tests.faults.case import LAUNCHERS_OWN, PROBLEMS, Case, Outcome
from tests.faults.cases import Bench
from tests.faults.kinds import IN_NAMESPACES, choices
from tests.faults.namespace import permitted

WORKERS = 2
EVERY = 20.0
COLUMNS = ("tried", "missed", "bit-equal", "refused", *PROBLEMS, LAUNCHERS_OWN)


def run_case(bench: Bench, seed: int, number: int, only: str = "*", keep: bool = False) -> Outcome:
    """The case that seed and number stand for, among those that `only` (command/fault) allows."""
    drawn = np.random.default_rng([seed, number, 0])
    possible = [
        choice
        for choice in choices()
        if fnmatch(f"{choice[0].name}/{choice[1]}", only) and (permitted() or choice[1] not in IN_NAMESPACES)
    ]
    if not possible:
        raise SystemExit(f"--only {only}: no such command/fault")
    weights = np.array([choice[-1] for choice in possible])
    command, name, fault, _ = possible[int(drawn.choice(len(possible), p=weights / weights.sum()))]
    started = time.monotonic()
    with Case(bench, command, name, seed, number) as case:
        fault(case)
        case.outcome.seconds = time.monotonic() - started
        case.keep = keep and bool(case.outcome.problems)
        if case.keep:
            case.tell(f"kept in {case.place}")
        return case.outcome


class Soak:
    """Workers that go through the cases of a seed until the time is over."""

    def __init__(self, bench: Bench, seed: int, minutes: float, only: str, keep: bool) -> None:
        self.bench, self.seed, self.only, self.keep = bench, seed, only, keep
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes
        self.outcomes: list[Outcome] = []
        self.broken: list[str] = []
        self.next = 0
        self.lock = threading.Lock()

    def work(self) -> None:
        while time.monotonic() < self.deadline:
            with self.lock:
                number, self.next = self.next, self.next + 1
            try:
                outcome = run_case(self.bench, self.seed, number, self.only, self.keep)
            except Exception:
                # A defect of the harness: it must not pass for a fault survived.
                with self.lock:
                    self.broken.append(f"case {self.seed}:{number}")
                    print(f"case {self.seed}:{number}: the harness fails\n{traceback.format_exc()}", flush=True)
                continue
            with self.lock:
                self.outcomes.append(outcome)
                if outcome.problems:
                    print(story(outcome, self.only), flush=True)

    def run(self, workers: int) -> None:
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        shown = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                print(self.progress(), flush=True)

    def progress(self) -> str:
        spent = time.monotonic() - self.started
        wrong = sum(bool(outcome.problems) for outcome in self.outcomes)
        tried = sum(outcome.hit for outcome in self.outcomes)
        left = max(0.0, self.deadline - time.monotonic())
        return (
            f"{tried} faults, {60 * tried / spent:.1f} a minute, {wrong} cases with problems, {left / 60:.1f} min left"
        )


def story(outcome: Outcome, only: str = "*") -> str:
    """What happened in a case, and how to see it again."""
    chosen = "" if only == "*" else f" --only '{only}'"
    lines = [
        f"case {outcome.seed}:{outcome.number}, {outcome.command}, {outcome.fault}: {dict(outcome.problems) or 'well'}"
    ]
    lines += [f"    {line}" for line in outcome.story]
    return "\n".join([*lines, f"    python -m tests.faults.soak --replay {outcome.seed}:{outcome.number}{chosen}"])


def table(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """A row a command and fault, and one of sums."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for key in ((outcome.command, outcome.fault), ("all", "all")):
            row = rows[key]
            row["tried" if outcome.hit else "missed"] += 1
            row["bit-equal"] += outcome.equal and outcome.hit
            row["refused"] += outcome.refused
            row.update(outcome.problems)
            row[LAUNCHERS_OWN] += outcome.launchers_own
    ordered = sorted(rows, key=lambda key: (key[0] == "all", key))
    return [{"command": key[0], "fault": key[1], **{name: rows[key][name] for name in COLUMNS}} for key in ordered]


def shown(rows: Sequence[dict[str, object]]) -> str:
    """The table as text; a zero is a dot."""
    names = ["command", "fault", *COLUMNS]
    cells = [names, *([str(row[name] or "·") for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        padded[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def write_csv(file: Path, rows: Sequence[dict[str, object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["command", "fault", *COLUMNS])
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the faults (default: drawn, and printed)")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"cases at a time (default: {WORKERS})")
    parser.add_argument("--only", default="*", metavar="COMMAND/FAULT", help="a pattern, for instance 'train*/flip'")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="one case again, with its whole story")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases with problems")
    given = parser.parse_args()
    # Under nohup its children would ignore it, too; a handler is not inherited.
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(1))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    bench = Bench(root)
    try:
        if given.replay is not None:
            seed, number = map(int, given.replay.split(":"))
            outcome = run_case(bench, seed, number, given.only, given.keep)
            print(story(outcome, given.only))
            return int(bool(outcome.problems))
        return _soak(bench, given)
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)


def _soak(bench: Bench, given: argparse.Namespace) -> int:
    seed = int.from_bytes(os.urandom(3)) if given.seed is None else given.seed
    print(f"seed {seed}, {given.minutes:g} minutes, {given.workers} cases at a time", flush=True)
    if not permitted():
        print(f"SKIPPED: no mount namespaces for this user, so none of: {', '.join(IN_NAMESPACES)}", flush=True)
    before = set(os.listdir("/dev/shm"))
    soak = Soak(bench, seed, given.minutes, given.only, given.keep)
    try:
        soak.run(given.workers)
    except (KeyboardInterrupt, SystemExit):
        print("stopped early", flush=True)
    rows = table(soak.outcomes)
    print(shown(rows))
    print(soak.progress())
    if left := sorted(set(os.listdir("/dev/shm")) - before):
        print(f"left in /dev/shm: {', '.join(left[:5])} ({len(left)} in all)")
    if given.csv is not None:
        write_csv(given.csv, rows)
        print(given.csv)
    wrong = [outcome for outcome in soak.outcomes if outcome.problems]
    for outcome in wrong:
        print(f"case {outcome.seed}:{outcome.number}, {outcome.command}, {outcome.fault}: {dict(outcome.problems)}")
    return int(bool(wrong or soak.broken or not soak.outcomes))


if __name__ == "__main__":
    sys.exit(main())
