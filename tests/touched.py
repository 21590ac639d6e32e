"""`make check`: the test files that touch what changed since main, by the imports, nearest first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePath

from tests.imports import PACKAGES, ROOT, graph, modules

# What no import tells.
READERS = {
    "*.md": ["tests/test_docs.py"],
    "Makefile": ["tests/test_docs.py"],
    "configs/*": ["tests/test_recipe_files.py", "tests/test_config.py", "tests/training/test_recipes.py"],
    "csrc/*": ["tests/csrc/test_loader.py", "tests/csrc/test_images.py", "tests/data/test_pairs.py"],
    "tests/csrc/*": ["tests/csrc/test_loader.py", "tests/csrc/test_images.py"],
}
DURATIONS = ROOT / ".pytest_cache" / "v" / "efficientclip" / "durations"
# Seconds, of a file that was never run.
UNKNOWN = 5.0
# An importer's importers: beyond them, everything imports everything.
STEPS = 2


def changed() -> list[str]:
    """Files that differ from where this branch left main; on a main that left no other, from the last commit."""
    for main in ("origin/main", "main"):
        base = subprocess.run(["git", "merge-base", "HEAD", main], cwd=ROOT, capture_output=True, text=True)
        if base.returncode == 0:
            break
    commands = (
        ["git", "diff", "--name-only", base.stdout.strip() or "HEAD"],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    told = (subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True) for command in commands)
    return sorted({line for output in told for line in output.stdout.splitlines()})


def touching(files: Iterable[str]) -> list[str]:
    """Paths of the test files that touch the changed `files`: those of the same name or that read them, those that
    import them, those that import one that does; a module that no such test touches stands for what imports it."""
    known = _modules()
    path_of = {name: file.relative_to(ROOT).as_posix() for name, file in known.items()}
    name_of = {path: name for name, path in path_of.items()}
    near: dict[str, int] = {}
    for file in files:
        readers = (path for pattern, paths in READERS.items() if fnmatch(file, pattern) for path in paths)
        near.update(dict.fromkeys(readers, 0))
        # A template belongs to the module of its name.
        module = name_of.get(PurePath(file).with_suffix(".py").as_posix())
        for steps, names in enumerate([] if module is None else _rings(module)):
            for name in names:
                near[path_of[name]] = min(steps, near.get(path_of[name], steps))
    return sorted(near, key=lambda path: (near[path], path))


def _rings(module: str) -> list[set[str]]:
    """Test modules by how many imports lie between them and the changed one."""
    importers = _importers()
    seen = ring = {module, _test_of(module)} & importers.keys()
    rings = [{*filter(_is_test, seen)}]
    while ring and (len(rings) <= STEPS or not any(rings)):
        ring = {name for one in ring for name in importers[one]} - seen
        seen = seen | ring
        rings.append({*filter(_is_test, ring)})
    return rings


@cache
def _modules() -> dict[str, Path]:
    return modules(*PACKAGES)


@cache
def _importers() -> dict[str, set[str]]:
    """Of each module those that import it, and the test of its name, which may do so by the command line."""
    known = _modules()
    importers: dict[str, set[str]] = {name: {_test_of(name)} & known.keys() for name in known}
    for name, others in graph(known).items():
        for other in others:
            importers[other].add(name)
    return importers


def _test_of(module: str) -> str:
    room, _, name = module.removeprefix("efficientclip.").rpartition(".")
    return ".".join(part for part in ("tests", room, f"test_{name}") if part)


def _is_test(name: str) -> bool:
    return name.startswith("tests.") and name.rpartition(".")[2].startswith("test_")


def fitting(files: Iterable[str], seconds: float) -> Iterator[str]:
    """The first of the test files, as long as what their tests took when they were last run is less than `seconds`."""
    took = Counter[str]()
    if DURATIONS.is_file():
        for test, duration in json.loads(DURATIONS.read_text(encoding="utf-8")).items():
            took[test.partition("::")[0]] += duration
    for file in files:
        if seconds > 0:
            yield file
        seconds -= took.get(file, UNKNOWN)


if __name__ == "__main__":
    found = touching(changed())
    chosen = list(fitting(found, float(sys.argv[1])))
    if left := len(found) - len(chosen):
        print(f"left to `make test`: {left} more files of tests that touch the change", file=sys.stderr)
    print(*chosen)
