"""Which file imports which, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"efficientclip": "engine", "efficientclip.kernels": "kernels", "tests": "tests", "benchmarks": "benchmarks"}


def modules(*packages: str) -> dict[str, Path]:
    """The files of the `packages` by the names that they are imported as, but efficientclip's face, which hands names
    on."""
    found = {}
    for package in packages:
        folder = ROOT / PACKAGES[package]
        for file in folder.rglob("*.py"):
            parts = (*package.split("."), *file.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = file
    found.pop("efficientclip", None)
    return found


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Those of the `known` modules that a file imports, lazily too; not those for types alone."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            paths = [f"{base}.{alias.name}" for alias in node.names]
        for path in paths:
            target = path if path in known else path.rpartition(".")[0]
            if target in known and target != name:
                yield target


def graph(known: dict[str, Path]) -> dict[str, set[str]]:
    return {name: {*imported(name, file, known)} for name, file in known.items()}
