"""What all tests share: a cache folder of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache" / "tests"


def pytest_configure(config: pytest.Config) -> None:
    # Digests of stores that tests make would pile up in the user's own.
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(CACHE / "efficientclip", ignore_errors=True)
