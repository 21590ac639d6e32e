"""The kinds of faults: each takes a fresh case from its start to its verdict."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from tests.faults.case import END, LATE, LOST, Case
from tests.faults.cases import COMMANDS, Command, changed_config, differences, digests_of
from tests.faults.damage import DAMAGES, whole_files
from tests.faults.namespace import Namespace
from tests.faults.processes import PATIENCE, Ended, Tree, catches, send, send_group, until

Fault = Callable[[Case], None]
# Seconds between two signals that count as two.
APART = 0.8
MEBIBYTE = 1 << 20
# Inputs that the engine wrote, and whose damage it must notice.
WRITTEN = ("data/store", "data/texts", "judged", "stores/made", "runs/run")
STOPPED = re.compile(r"stopped by (SIG\w+)")
FINISHED = re.compile(r"pair visits on \d+ rank|are estimated to be wrong")


def by_signal(case: Case, signum: int, whom: str, twice: bool = False) -> None:
    """A signal at a random moment; then the same command."""
    command = case.command
    case.lay_out()
    program = command.launched or (command.ranks == 1 and case.random.random() < 0.08)
    if program and not command.launched:
        case.tell("with its own imports")
    tree = case.start(program=program)
    chosen = int(case.random.integers(2))
    if case.wait_for_moment(tree, program):
        case.outcome.hit = True
        _signalled(case, tree, signum, whom, chosen, twice)
    else:
        case.observe(tree.wait(), codes=(0,))
    case.finish()


def _signalled(case: Case, tree: Tree, signum: int, whom: str, chosen: int, twice: bool) -> None:
    if whom == "a rank" and case.command.launched:
        until(lambda: bool(tree.ranks()), tree)
    ranks = [process.pid for process in tree.ranks()] if case.command.launched else tree.pids()
    heard = bool(ranks) and all(catches(pid, signum) for pid in ranks)
    for pid, group in _targets(tree, ranks, whom, chosen):
        (send_group if group else send)(pid, signum)
    if twice:
        before = time.monotonic()
        until(lambda: time.monotonic() > before + APART, tree)
        for pid in tree.pids():
            send(pid, signum)
    ended = tree.wait(PATIENCE)
    case.observe(ended)
    if signum != signal.SIGKILL and not ended.survivors:
        _told_end(case, ended, signum, heard)
        if twice and ended.seconds > 2:
            case.problem(LATE, f"{ended.seconds:.1f} s after a second signal", ended.output)


def _targets(tree: Tree, ranks: list[int], whom: str, chosen: int) -> list[tuple[int, bool]]:
    """Pids, and whether the signal goes to the whole process group."""
    if whom == "a rank":
        return [(pid, False) for pid in ranks[chosen % max(1, len(ranks)) :][:1]]
    if whom == "all":
        return [(process.pid, False) for process in tree.members()]
    first = tree.roots[0].pid
    assert first is not None
    return [(first, whom == "the group")]


def _told_end(case: Case, ended: Ended, signum: int, heard: bool) -> None:
    """The exit codes and lines that a signal must lead to."""
    told, stopped = STOPPED.findall(ended.output), 128 + signum
    if case.command.launched:
        # The launcher's code is its own, and what it tells its ranks.
        if all(code == 0 for code in ended.codes) and told:
            case.problem(END, "the launcher ends with 0, though a rank was stopped", ended.output)
        wanted = {*told}
    else:
        # A launcher tells the other ranks by SIGTERM.
        codes = {0, stopped} | ({128 + signal.SIGTERM} if case.command.ranks > 1 else set())
        codes |= set() if heard else {-signum}
        wrong = [code for code in ended.codes if code not in codes]
        if wrong:
            case.problem(END, f"exit codes {ended.codes}, not {stopped}", ended.output)
        wanted = {signal.Signals(signum).name} | ({"SIGTERM"} if case.command.ranks > 1 else set())
    # The signal ends the launcher, also where its ranks had only their last lines to write.
    finished = case.command.launched and FINISHED.search(ended.output) is not None
    ends_well = finished or all(code == 0 for code in ended.codes)
    if heard and not ends_well and (len(told) != 1 or told[0] not in wanted):
        case.problem(END, f"{len(told)} lines tell by what it was stopped, codes {ended.codes}", ended.output)


def disk_full(case: Case) -> None:
    """No space at a random write; then there is, and the same command."""
    case.lay_out(on_small_disk=True)
    disk = case.disk
    assert disk is not None
    if case.random.random() < 0.3:
        case.interrupted()
    growth = case.reference.growth
    names = case.random.random() < 0.2
    if names:
        number = 1 + int(case.random.integers(max(2, len(case.reference.results))))
        disk.leave_names(number)
        case.tell(f"room for {number} more files")
    else:
        room = int(case.random.random() * (1.2 * growth if case.random.random() < 0.8 else 100_000))
        disk.leave_free(room)
        case.tell(f"{room} bytes are free, {growth} are written in all")
    ended = case.start().wait()
    case.outcome.hit = ended.codes != [0] * case.command.ranks
    _failed_write(case, ended, "No space left", "space")
    if names:
        disk.leave_names(0)
    disk.leave_free(256 * MEBIBYTE)
    case.finish()


def read_only(case: Case) -> None:
    """The file system turns read-only, from the start or as soon as no file is open for writing."""
    case.lay_out(on_small_disk=True)
    disk = case.disk
    assert disk is not None
    if case.random.random() < 0.3:
        case.interrupted()
    if case.random.random() < 0.4:
        case.tell("read-only from the start")
        case.outcome.hit = disk.read_only(True)
        tree = case.start()
    else:
        tree = case.start()
        if case.wait_for_moment(tree):
            case.outcome.hit = until(lambda: disk.read_only(True), tree)
    ended = tree.wait()
    if case.outcome.hit and any(ended.codes):
        _failed_write(case, ended, "Read-only file system", "read-only")
    else:
        case.observe(ended, codes=(0,))
    disk.read_only(False)
    case.finish()


def _failed_write(case: Case, ended: Ended, *named: str) -> None:
    """Every rank ends, one of them with a message."""
    case.observe(ended, codes=_failing(case.command), limit=ended.seconds)
    if 2 in ended.codes and not case.is_done(ended):
        case.outcome.refused = True
        case.refusal(ended, *named)


def _failing(command: Command) -> tuple[int, ...]:
    """Exit codes where a rank may have refused: the launcher tells the others."""
    return (0, 2) if command.ranks == 1 else (0, 2, 128 + signal.SIGTERM)


def at_rest(case: Case, kind: str) -> None:
    """A file is damaged between two calls: the second ends as if it were whole, or refuses it by name."""
    case.lay_out()
    before = case.random.random()
    if before < 0.75:
        case.interrupted()
    elif before < 0.9 and case.command.name != "export":
        case.completed()
    groups = [path for path in _groups(case.here, case.command) if whole_files(path)]
    if not groups:
        case.tell("nothing was written yet")
        return case.finish()
    group = groups[int(case.random.integers(len(groups)))]
    files = whole_files(group)
    file = files[int(case.random.integers(len(files)))]
    path = str(file.relative_to(case.here))
    whole, times = file.read_bytes(), os.stat(file)
    case.tell(f"{path}: {DAMAGES[kind](file, case.random)}")
    case.outcome.hit = True
    stood = _finished_files(case)
    ended = case.start().wait()
    case.observe(ended, codes=_failing(case.command), limit=ended.seconds)
    if case.is_done(ended):
        case.compare(except_for=path)
    elif 2 in ended.codes:
        case.outcome.refused = True
        case.refusal(ended, file.name, *_checkpoint(path))
        now = _finished_files(case)
        if gone := [name for name in stood if now.get(name) != stood[name]]:
            case.problem(LOST, f"the refusal changed {', '.join(gone)}", ended.output)
        case.tell("restored")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        case.finish()
    elif all(code == 0 for code in ended.codes):
        case.compare(except_for=path)


def _groups(folder: Path, command: Command) -> list[Path]:
    """What the engine wrote: results, half-made results, inputs."""
    found = [folder / name for name in dict.fromkeys((*WRITTEN, *command.made))]
    for made in command.made:
        above, name = (folder / made).parent, (folder / made).name
        found += [path for path in (above / f"{name}.partial", *above.glob(f".{name}?*")) if path.is_dir()]
    return [path for path in found if path.exists()]


def _checkpoint(path: str) -> list[str]:
    return re.findall(r"step-\d+", path)


def _finished_files(case: Case) -> dict[str, str]:
    """Results that a refused call has no reason to touch."""
    return {
        path: digest
        for path, digest in digests_of(case.here, ()).items()
        if any(path.startswith(f"{made}/") for made in case.command.made)
        and not re.search(
            r"partial|tensorboard|hardware\.json|metrics\.jsonl|run/digests\.json|fold-./digests\.json|\.lock|\.replaced",
            path,
        )
    }


def second_process(case: Case) -> None:
    """Two calls of one command at a time: one of them refuses, and names the other."""
    case.lay_out()
    first = case.start()
    if not case.wait_for_moment(first):
        case.observe(first.wait(), codes=(0,))
        case.finish()
        return
    case.outcome.hit = True
    # Stopped, it cannot end meanwhile: if it holds the folder, the second must be refused.
    halted = case.random.random() < 0.5
    pids = first.pids()
    if halted:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        case.tell("the first is halted")
    holder = _holder(case.here)
    second = case.start()
    ended = second.wait(relaunched=False) if halted and holder in pids else None
    # A second call may find that all is done already.
    stood = halted and not differences(case.reference, case.here, case.command, case.here)
    for pid in pids:
        send(pid, signal.SIGCONT)
    ended = ended or second.wait()
    others = first.wait()
    for one in (ended, others):
        case.observe(one, codes=(0, 2), limit=one.seconds)
    refused = [one for one in (ended, others) if 2 in one.codes and not case.is_done(one)]
    if len(refused) == 2:
        case.problem(END, "both calls refuse", ended.output + others.output)
    elif refused:
        case.outcome.refused = True
        theirs = pids if refused[0] is ended else [root.pid for root in second.roots if root.pid]
        case.refusal(refused[0], *(f"process {pid} on {socket.gethostname()}" for pid in theirs))
    elif halted and holder in pids and not stood:
        case.problem(END, f"process {holder} holds the folder, yet a second call ends with 0", ended.output)
    case.finish()


def _holder(folder: Path) -> int | None:
    """The process that says it is at work in the folder."""
    # Other than rglob, walk passes over folders that go meanwhile.
    for lock in sorted(Path(place, ".lock") for place, _, names in os.walk(folder) if ".lock" in names):
        try:
            return int(json.loads(lock.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def foreign_folder(case: Case) -> None:
    """A command pointed at what it did not make leaves it as it is."""
    case.lay_out()
    wrong = ["notes", "notes/chapter", "data", "thesis.txt", "thesis.txt/under"]
    wrong += [name for name in WRITTEN if (case.here / name).exists() and name not in case.command.made]
    target = wrong[int(case.random.integers(len(wrong)))]
    case.tell(f"pointed at {target}")
    case.outcome.hit = True
    before = digests_of(case.here, ())
    ended = case.start(arguments=case.command.pointed_at(target)).wait()
    case.observe(ended, codes=(2,), limit=ended.seconds)
    case.outcome.refused = True
    case.refusal(ended, target)
    now = digests_of(case.here, ())
    if changed := sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)):
        case.problem(LOST, f"changed, gone or added: {', '.join(changed[:10])}", ended.output)


def other_views(case: Case, view: str) -> None:
    """Rank 1 sees another store, no run folder, or another config: all ranks end, with one message."""
    case.lay_out()
    if case.random.random() < 0.4:
        case.interrupted()
    namespace = Namespace()
    case.namespaces.append(namespace)
    folder = case.here
    if view == "another store":
        mounted = namespace.mount("--bind", folder / "data" / "other", folder / "data" / "store")
        named = ["store"]
    elif view == "no run folder":
        above = (folder / case.command.made[0]).parent
        above.mkdir(exist_ok=True)
        hidden = above if above != folder else folder / case.command.made[0]
        hidden.mkdir(exist_ok=True)
        mounted = namespace.mount("-t", "tmpfs", "none", hidden)
        named = [case.command.made[0]]
    else:
        config = case.command.arguments[1]
        shutil.copy(folder / config, case.place / config)
        case.tell(changed_config(case.place / config, case.random))
        mounted = namespace.mount("--bind", case.place / config, folder / config)
        named = ["config", "differ"]
    if not mounted:
        raise RuntimeError(f"{view}: cannot be mounted")
    case.outcome.hit = True
    ended = case.start(namespaces=[None, namespace]).wait(relaunched=False)
    case.observe(ended, codes=(2,))
    case.outcome.refused = True
    case.refusal(ended, *named)
    if view == "no run folder" and hidden == folder / case.command.made[0]:
        # Made by us, as a mount point.
        shutil.rmtree(hidden) if not any(hidden.iterdir()) else None
    case.finish()


def launcher_killed(case: Case) -> None:
    """A launcher that dies without a word takes its ranks with it."""
    case.lay_out()
    tree = case.start(program=True)
    if case.wait_for_moment(tree, program=True):
        case.outcome.hit = True
        first = tree.roots[0].pid
        assert first is not None
        launchers = [first, *(process.pid for process in _launchers(tree) if process.pid != first)]
        chosen = launchers[int(case.random.integers(len(launchers)))]
        case.tell("the outer launcher" if chosen == first else "the launcher on the node")
        send(chosen, signal.SIGKILL)
        case.observe(tree.wait(PATIENCE))
    else:
        case.observe(tree.wait(), codes=(0,))
    case.finish()


def _launchers(tree: Tree) -> list[psutil.Process]:
    found = []
    for process in tree.members():
        try:
            if "deepspeed.launcher.launch" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _signals(whoms: tuple[str, ...], weight: float) -> dict[str, tuple[Fault, float]]:
    """Each of the three signals, to each of `whoms`."""
    return {
        f"{signum.name} to {whom}" if len(whoms) > 1 else signum.name: (
            partial(by_signal, signum=signum, whom=whom),
            weight,
        )
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for whom in whoms
    }


def _kill(whom: str) -> Fault:
    return partial(by_signal, signum=signal.SIGKILL, whom=whom)


RESTING: dict[str, tuple[Fault, float]] = {
    "flip": (partial(at_rest, kind="flip"), 4),
    "cut": (partial(at_rest, kind="cut"), 3),
    "removed": (partial(at_rest, kind="removed"), 2),
}
ONE: dict[str, tuple[Fault, float]] = {
    "killed": (_kill("all"), 4),
    **_signals(("all",), 2),
    "SIGINT twice": (partial(by_signal, signum=signal.SIGINT, whom="all", twice=True), 1),
    "disk full": (disk_full, 5),
    "read-only": (read_only, 1),
    **RESTING,
    "second process": (second_process, 2),
    "foreign folder": (foreign_folder, 1),
}
SEVERAL: dict[str, tuple[Fault, float]] = {
    "a rank killed": (_kill("a rank"), 2),
    "killed": (_kill("all"), 2),
    **_signals(("a rank", "all"), 1),
    "disk full": (disk_full, 3),
    **RESTING,
    **{view: (partial(other_views, view=view), 2) for view in ("another store", "no run folder", "another config")},
}
LAUNCHED: dict[str, tuple[Fault, float]] = {
    "a rank killed": (_kill("a rank"), 1),
    "killed": (_kill("all"), 1),
    "launcher killed": (launcher_killed, 3),
    **_signals(("the launcher", "the group", "a rank"), 1),
}
IN_NAMESPACES = ("disk full", "read-only", "another store", "no run folder", "another config")
# Commands and how often each is drawn: real launchers take twenty times as long as forked ranks.
SHARES = {
    "prepare": 4, "prepare-texts": 1, "train": 5, "train-snapshot": 1.5, "train-calibrated": 2, "cross-fit": 3,
    "export": 1, "train-2": 2, "cross-fit-2": 1, "train-launched": 0.8, "cross-fit-launched": 0.4,
}  # fmt: skip


def faults_of(command: Command) -> dict[str, tuple[Fault, float]]:
    """The kinds that strike a command, and their weights."""
    return LAUNCHED if command.launched else SEVERAL if command.ranks > 1 else ONE


def choices() -> list[tuple[Command, str, Fault, float]]:
    """Every command with every kind of fault, and how often it is drawn."""
    found = []
    for command in COMMANDS:
        kinds = faults_of(command)
        total = sum(weight for _, weight in kinds.values())
        found += [
            (command, name, fault, SHARES[command.name] * weight / total) for name, (fault, weight) in kinds.items()
        ]
    return found
