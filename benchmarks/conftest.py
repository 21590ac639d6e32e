"""Options of the benchmarks, and the rule that what is red has no speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels/test_contrastive.py", "tests/kernels/test_fused.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contrastive loss")
    group.addoption("--long", action="store_true", help="also cases that take minutes or several GB")
    group.addoption("--sizes", help="pairs N instead of the default ones: 1024,65536")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch, on CPUs")
    group.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of CSV and picture")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes or several GB, needs --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes or several GB: pass --long"))


def refuse_while_red(*tests: str) -> None:
    """Runs `tests`; while they are red, nothing is reported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    # Tests ask for deterministic algorithms, which cuBLAS refuses without a fixed workspace.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the tests are red, and what is wrong has no speed:\n{done.stdout[-4000:]}", pytrace=False)


@pytest.fixture(scope="session")
def green() -> None:
    """Runs the loss's tests once a session."""
    refuse_while_red(*TESTS)
