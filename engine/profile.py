"""`deepspeed --module efficientclip.profile CONFIG [key=value …]`: where the time of a training step goes.

Exit codes are those of `train`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import stopping
from .errors import reported
from .launchers import adopt_rank


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes, here and as `efficientclip profile`."""
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--warm-up", type=int, default=10, metavar="N", help="steps before the measured (default: 10)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    parser.add_argument("--traced", type=int, default=3, metavar="N", help="steps in the trace (default: 3)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="figures; the trace lies beside it (default: RUN-profile.json)"
    )
    parser.add_argument("--replace", action="store_true", help="write over a file that another program made")
    # The `deepspeed` launcher sets it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> NoReturn:
    """Profile what the command line names; ends the process."""
    adopt_rank()
    # Of ranks, the first tells.
    stopping.watch()
    from .config import load_config

    config = load_config(given.config, given.overrides)
    from .planning.profile import profile
    from .training.distributed import end_process
    from .training.ranks import together

    def work() -> int:
        profile(
            config,
            given.config,
            given.overrides,
            output=given.output,
            replace=given.replace,
            warm_up=given.warm_up,
            measured=given.steps,
            traced=given.traced,
        )
        return 0

    end_process(together(work))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the `deepspeed` launcher; ends the process."""
    stopping.watch()
    parser = argparse.ArgumentParser(prog="efficientclip profile", description=__doc__)
    add_options(parser)
    given = parser.parse_intermixed_args(arguments)
    sys.exit(reported(lambda: run(given)))


if __name__ == "__main__":
    main()
