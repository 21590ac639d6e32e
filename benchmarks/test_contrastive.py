"""Contrastive loss, forward and backward, beside its peers in one run; see docs/performance.md.

    pytest benchmarks/test_contrastive.py --benchmark-only [--long] [--sizes 1024,65536] [--device cuda]

The loss's own tests run first, once (fixture `green`), and while they are red nothing is reported. Peers run
between the rounds of the loss. Nothing is recorded if other processes took the cores or the rounds disagree: then
threads wait for each other, and the figures say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contrastive import COLUMNS, KEY, Seen, draw, measure
from benchmarks.measuring import Row, record
from benchmarks.peers import Case

TESTS = ("tests/kernels/test_contrastive.py", "tests/kernels/test_triton_contrastive.py")
SHOWN = ("implementation", "pass", "seconds", "tflops", "share_of_mm", "extra_mib", "ratio", "error", "note")


def cases(device: str, sizes: list[int] | None) -> list[Any]:
    """Ordered by size, so that what a peer takes is known before its larger ones."""
    if sizes:
        return [Case(N, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32) for N in sizes]
    if device == "cpu":
        return [
            *(Case(N, frozen=frozen) for N in (1024, 4096) for frozen in (False, True)),
            *(Case(4096, D) for D in (256, 768, 1024)),
            Case(4096, sigmoid=True),
            *(Case(8192, frozen=True, frozen_dtype=dtype, one_way=True) for dtype in (None, torch.float16)),
            Case(8192),
            Case(16384),
            Case(256, bank=1_000_000, frozen=True, frozen_dtype=torch.float16),
            pytest.param(Case(256, bank=1_000_000, frozen=True), marks=pytest.mark.long),
            pytest.param(Case(65536), marks=pytest.mark.long),
        ]
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return [
        *(Case(N, frozen=frozen, **half) for N in (1024, 4096, 16384, 32768) for frozen in (False, True)),
        *(Case(32768, D, **half) for D in (256, 768, 1024)),
        *(Case(N, device=device) for N in (4096, 16384, 32768)),
        *(Case(N, frozen=True, frozen_dtype=torch.float16, one_way=True, device=device) for N in (4096, 16384, 32768)),
        *(Case(N, sigmoid=True, **half) for N in (4096, 16384, 32768, 65536)),
        Case(256, bank=1_000_000, frozen=True, **half),
        Case(256, bank=1_000_000, frozen=True, frozen_dtype=torch.float16, device=device),
        Case(65536, **half),
        *(pytest.param(Case(N, **half), marks=pytest.mark.long) for N in (262_144, 1_048_576)),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.getoption("--sizes")
    chosen = cases(metafunc.config.getoption("--device"), [int(N) for N in sizes.split(",")] if sizes else None)
    metafunc.parametrize("case", chosen, ids=str)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The CSV file, drawn at the end."""
    folder: Path = request.config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "contrastive.csv"
    yield file
    if file.exists():
        draw(file, file.with_suffix(".svg"))


@pytest.fixture(scope="module")
def seen() -> Seen:
    return {}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


def show(case: Case, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(*SHOWN, title=str(case))
    for row in rows:
        table.add_row(*(str(row.get(name) or "") for name in SHOWN))
    with capsys.disabled():
        Console(width=160).print("", table)


@pytest.mark.usefixtures("green", "threads")
def test_contrastive(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    results: Path,
    seen: Seen,
    case: Case,
) -> None:
    rows, busy = measure(case, seen, lambda ours, others, rounds: benchmark.pedantic(ours, setup=others, rounds=rounds))
    if benchmark.disabled:
        return
    show(case, rows, capsys)
    if busy:
        pytest.skip(f"{busy}; nothing recorded")
    record(rows, results, KEY, COLUMNS)
