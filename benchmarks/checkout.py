"""`efficientclip` from this checkout, where it is not installed: the kernels, and what of the engine needs no C++.

Also a plugin: `python -m pytest -p benchmarks.checkout tests/kernels/test_compile.py`.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[1]


def register() -> None:
    """Makes `import efficientclip` mean this checkout; nothing if it is imported already."""
    if "efficientclip" in sys.modules:
        return
    # `efficientclip.kernels` is found in the second folder.
    folders = [str(ROOT / "engine"), str(ROOT)]
    spec = spec_from_file_location("efficientclip", ROOT / "engine" / "__init__.py", submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    sys.modules["efficientclip"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["efficientclip"])


def pytest_configure() -> None:
    register()
