"""How the launcher's ranks enter: who they are, then signals, the command line, and what takes seconds to import."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .. import stopping
from ..errors import UserError, reported
from ..launchers import adopt_rank

if TYPE_CHECKING:
    from ..config import Config


def launched(
    run: Callable[[Config, argparse.Namespace], int],
    command: str,
    description: str | None,
    arguments: list[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> NoReturn:
    """`run` the config that the command line names, given that, on one of the launcher's ranks; ends the process with
    its code. `add_options` adds what the command takes beside it."""
    code = reported(adopt_rank)
    if code:
        sys.exit(code)
    stopping.watch()
    parser = argparse.ArgumentParser(prog=f"efficientclip {command}", description=description)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_options(parser)
    given = parser.parse_intermixed_args(arguments)
    # Its warnings at connections that end with their ranks are stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..config import load_config
    from .distributed import end_process
    from .ranks import together

    def work() -> int:
        config = load_config(given.config, given.overrides)
        _require_own_folder(given.config, config)
        return run(config, given)

    end_process(together(work))


def _require_own_folder(file: Path, config: Config) -> None:
    """UserError where `file` is the config of a run that has moved since: it would begin anew at the old place."""
    from ..files.ownership import kind_of

    folder = Path(os.path.realpath(file)).parent
    if kind_of(folder) == "run" and folder != Path(os.path.realpath(config.run)):
        raise UserError(
            f"config {file}: is that of the run in {folder}, but names {config.run}; add run={folder} to go on with it,"
            " or run=… for a new one"
        )
