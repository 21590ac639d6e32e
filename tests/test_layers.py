"""The way of the data is the way of the imports: none points up, and no two files import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import efficientclip
import efficientclip.kernels

LAYERS = (
    "kernels", "errors", "stopping", "files", "values", "config", "launchers", "hardware", "data", "model", "prepare",
    "objectives", "noise", "training", "evaluation", "planning", "demo", "export", "recipes", "verify", "train",
    "fit_head", "cross_fit", "profile", "cli",
)  # fmt: skip
ENGINE, KERNELS = (Path(package.__path__[0]) for package in (efficientclip, efficientclip.kernels))


def modules() -> dict[str, Path]:
    """Files by the name that they are imported as, without `efficientclip.`; the package's face hands names on."""
    found = {}
    for root, prefix in ((ENGINE, ()), (KERNELS, ("kernels",))):
        for file in root.rglob("*.py"):
            parts = (*prefix, *file.relative_to(root).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = file
    del found[""]
    return found


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, lazily too; not those for types alone."""
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
            paths = [alias.name.removeprefix("efficientclip.") for alias in node.names if "efficientclip" in alias.name]
        else:
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            elif not (node.module or "").startswith("efficientclip"):
                continue
            path = ".".join(base).removeprefix("efficientclip").removeprefix(".")
            paths = [f"{path}.{alias.name}".removeprefix(".") for alias in node.names]
        for path in paths:
            target = path if path in known else path.rpartition(".")[0]
            if target in known and target != name:
                yield target


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {*imported(name, file, known)} for name, file in known.items()}


def test_no_import_points_up(graph: dict[str, set[str]]) -> None:
    # Whoever starts a package by its name stands where its commands are.
    floor = {name: LAYERS.index("cli" if name.endswith("__main__") else name.split(".")[0]) for name in graph}
    up = [f"{name} imports {other}" for name, others in graph.items() for other in others if floor[other] > floor[name]]
    assert not up
    assert "training.trainer" in graph["training.runs"] and "kernels" in graph["objectives.losses"]


def test_no_two_files_import_each_other(graph: dict[str, set[str]]) -> None:
    circles = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if name in graph[other] and not (other.startswith(f"{name}.") or name.startswith(f"{other}."))
    ]
    assert not circles


def test_no_file_is_long() -> None:
    assert not [name for name, file in modules().items() if file.read_text(encoding="utf-8").count("\n") > 600]
