"""One case: a command, a fault at a moment drawn by seed, the same command again, and what came of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from efficientclip.prepare.writer import ORIGIN
from tests.faults.cases import (
    Bench,
    Command,
    differences,
    digests_of,
    half_written,
)
from tests.faults.namespace import Namespace, SmallDisk
from tests.faults.processes import ENDLESS, PATIENCE, Ended, Tree, errors, send, tracebacks, until

LOST, SILENT, SURVIVORS, TRACEBACK, LATE, END = (
    "lost or mixed files",
    "silent differences",
    "survivors",
    "tracebacks",
    "over time",
    "unexpected ends",
)
PROBLEMS = (LOST, SILENT, SURVIVORS, TRACEBACK, LATE, END)
LAUNCHERS_OWN = "launcher's own"


@dataclass
class Outcome:
    """What came of one case."""

    seed: int
    number: int
    command: str
    fault: str
    # Whether the fault came before the command had ended.
    hit: bool = False
    equal: bool = False
    refused: bool = False
    problems: Counter[str] = field(default_factory=Counter)
    launchers_own: int = 0
    story: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Case:
    """The folder of one case, and what may be done in it. A context: nothing of it outlives it."""

    def __init__(self, bench: Bench, command: Command, fault: str, seed: int, number: int) -> None:
        self.bench, self.command = bench, command
        self.reference = bench.reference(command)
        # Beside the choice of command and fault, which is drawn by the same seed.
        self.random = np.random.default_rng([seed, number, 1])
        self.outcome = Outcome(seed, number, command.name, fault)
        self.place = bench.place()
        self.here = self.place / "here"
        self.here.mkdir()
        self.disk: SmallDisk | None = None
        self.trees: list[Tree] = []
        self.namespaces: list[Namespace] = []
        self.keep = False
        self.inputs: dict[str, str] = {}

    def __enter__(self) -> Case:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tree in self.trees:
            tree.kill()
        for namespace in self.namespaces:
            namespace.close()
        if not self.keep:
            shutil.rmtree(self.place, ignore_errors=True)

    @property
    def seen(self) -> Path:
        """The folder of the command, from where this process stands."""
        return self.disk.seen if self.disk else self.here

    def lay_out(self, *, on_small_disk: bool = False) -> None:
        if on_small_disk:
            self.disk = SmallDisk(self.here)
            self.namespaces.append(self.disk.namespace)
        self.bench.lay_out(self.command, self.seen)
        self.inputs = digests_of(self.seen, self.command.made)

    def tell(self, line: str) -> None:
        self.outcome.story.append(line)

    def problem(self, kind: str, what: str, output: str = "") -> None:
        self.outcome.problems[kind] += 1
        tail = "".join(f"\n      | {line}" for line in output.replace("\r", "\n").splitlines()[-40:] if line.strip())
        self.tell(f"{kind.upper()}: {what}{tail}")

    def start(
        self,
        *,
        program: bool = False,
        arguments: tuple[str, ...] | None = None,
        namespaces: Sequence[Namespace | None] | None = None,
    ) -> Tree:
        tree = Tree(self.here, self.place)
        self.trees.append(tree)
        namespace = self.disk.namespace if self.disk else None
        where = {"namespaces": namespaces} if namespaces else {"namespace": namespace}
        self.command.run(tree, self.bench.arguments(self.command, arguments), program=program, **where)
        return tree

    def wait_for_moment(self, tree: Tree, program: bool = False) -> bool:
        """Until a moment drawn over the undisturbed run, by time or by what the run writes; False: it ended before."""
        if not self.reference.seen or self.random.random() < 0.5:
            startup = self.bench.startup_seconds() * (1.7 if self.command.launched else 1) if program else 0.0
            seconds = self.random.random() * (startup + 1.2 * self.reference.seconds)
            self.tell(f"after {seconds:.3f} s")
            deadline = time.monotonic() + seconds
            return until(lambda: time.monotonic() >= deadline, tree)
        path = self.reference.seen[int(self.random.integers(len(self.reference.seen)))]
        delay = 0.0 if self.random.random() < 0.5 else self.random.random() * 0.02
        self.tell(f"{delay * 1000:.1f} ms after {path} is there")
        there = str(self.seen / path)
        # A path that comes and goes in less than our poll is met in another case.
        if not until(lambda: os.path.lexists(there), tree):
            return False
        time.sleep(delay)
        return tree.lives()

    def interrupted(self) -> None:
        """Run the command until a SIGKILL at a random moment."""
        tree = self.start()
        self.tell("first killed")
        self.wait_for_moment(tree)
        for pid in tree.pids():
            send(pid, signal.SIGKILL)
        self.observe(tree.wait(PATIENCE))

    def completed(self) -> None:
        """Run the command to its end."""
        self.tell("first completed")
        self.observe(self.start().wait(), codes=(0,))

    def observe(self, ended: Ended, codes: Sequence[int] | None = None, *, limit: float | None = None) -> None:
        """What no end may show: survivors, tracebacks, other exit codes than `codes`, more than `limit` seconds; a
        command that nothing disturbs may take its time."""
        limit = limit or (ENDLESS if codes == (0,) else PATIENCE)
        engine, launcher = tracebacks(ended.output)
        self.outcome.launchers_own += launcher
        if engine:
            self.problem(TRACEBACK, f"{engine} in the output", ended.output)
        if ended.survivors:
            self.problem(SURVIVORS, f"{ended.survivors} processes after {ended.seconds:.1f} s", ended.output)
        elif ended.seconds > limit:
            self.problem(LATE, f"{ended.seconds:.1f} s", ended.output)
        if codes is not None and not ended.survivors and any(code not in codes for code in ended.codes):
            self.problem(END, f"exit codes {ended.codes}, not {' or '.join(map(str, codes))}", ended.output)

    def refusal(self, ended: Ended, *named: str) -> None:
        """An exit code of 2 comes with one message, which holds one of `named`."""
        found = errors(ended.output)
        if len(found) != 1:
            self.problem(END, f"{len(found)} lines begin with `error: `", ended.output)
        elif named and not any(name in found[0] for name in named):
            self.problem(END, f"the message does not name {' or '.join(named)}: {found[0]}")
        if found:
            self.tell(" ".join(found[0].split()))

    def finish(self) -> None:
        """The same command again, undisturbed: it must end as if nothing had been."""
        ended = self.start().wait()
        done = self.is_done(ended)
        self.observe(ended, codes=(2,) if done else (0,), limit=ended.seconds)
        if done or all(code == 0 for code in ended.codes):
            self.compare()

    def is_done(self, ended: Ended) -> bool:
        """Whether the command refused since its results are there already."""
        once = self.command.made_once
        return once is not None and 2 in ended.codes and once in ended.output

    def compare(self, except_for: str | None = None) -> None:
        """Results beside the reference's, inputs beside themselves (but `except_for`, which was damaged)."""
        found = differences(self.reference, self.seen, self.command, self.here)
        proved_later = except_for is not None and Path(except_for).name.startswith(f"{ORIGIN}-")
        if self.command.made_once is not None or proved_later:
            # It looks no further than that there is one; what a store was made of, where more is to be made.
            found = [line for line in found if except_for is None or not line.startswith(f"{except_for} ")]
        amount = [line for line in found if line.endswith(("missing", "too many"))]
        half = half_written(self.seen, self.command)
        if amount or half:
            self.problem(LOST, ", ".join(amount + [f"{path} is left" for path in half][:10]))
        if len(found) > len(amount):
            self.problem(SILENT, ", ".join(line for line in found if line not in amount))
        self.outcome.equal = not found and not half
        self.compare_inputs(except_for)

    def compare_inputs(self, except_for: str | None = None) -> None:
        """Nothing beside the results has changed, neither inputs nor a user's own files."""
        now = digests_of(self.seen, self.command.made)
        changed = [path for path in self.inputs if path != except_for and now.get(path) != self.inputs[path]]
        if changed:
            self.problem(LOST, f"changed or gone: {', '.join(changed[:10])}")
        if added := sorted(set(now) - set(self.inputs)):
            self.problem(LOST, f"left beside the results: {', '.join(added[:10])}")
