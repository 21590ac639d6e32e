"""The way of the data is the way of the imports: none points up, and no two files import each other."""

from __future__ import annotations

import pytest

from tests.imports import graph, modules

LAYERS = (
    "kernels", "errors", "stopping", "files", "values", "config", "launchers", "hardware", "data", "columns", "model",
    "prepare", "objectives", "noise", "training", "evaluation", "planning", "demo", "export", "recipes", "verify",
    "fitting", "train", "fit_head", "cross_fit", "profile", "fit", "cli",
)  # fmt: skip


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return graph(modules("efficientclip", "efficientclip.kernels"))


def test_no_import_points_up(imports: dict[str, set[str]]) -> None:
    # Whoever starts a package by its name stands where its commands are.
    floor = {name: LAYERS.index("cli" if name.endswith("__main__") else name.split(".")[1]) for name in imports}
    edges = [(name, other) for name, others in imports.items() for other in others]
    assert not [f"{name} imports {other}" for name, other in edges if floor[other] > floor[name]]
    assert ("efficientclip.training.runs", "efficientclip.training.trainer") in edges
    assert ("efficientclip.objectives.losses", "efficientclip.kernels") in edges


def test_no_two_files_import_each_other(imports: dict[str, set[str]]) -> None:
    circles = [
        (name, other)
        for name, others in imports.items()
        for other in others
        if name in imports[other] and not (other.startswith(f"{name}.") or name.startswith(f"{other}."))
    ]
    assert not circles


def test_no_file_is_long() -> None:
    found = modules("efficientclip", "efficientclip.kernels")
    assert not [name for name, file in found.items() if file.read_text(encoding="utf-8").count("\n") > 600]
