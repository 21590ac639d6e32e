"""How the launcher's ranks enter: signals first, then the command line, then what takes seconds to import."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .. import stopping
from ..config import Config, load_config


def launched(
    run: Callable[[Config], int], command: str, description: str | None, arguments: list[str] | None
) -> NoReturn:
    """`run` the config that the command line names, on one of the launcher's ranks; ends the process with its code."""
    stopping.watch(quiet=int(os.environ.get("RANK", 0)) > 0)
    parser = argparse.ArgumentParser(prog=f"efficientclip {command}", description=description)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    # Its warnings at connections that end with their ranks are stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from .distributed import end_process
    from .ranks import together

    end_process(together(lambda: run(load_config(given.config, given.overrides))))
