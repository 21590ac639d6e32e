"""`deepspeed --module efficientclip.train CONFIG [key=value …]`: one run, from its config to its model folder.

Exit code: 0 when the run is finished, 2 after a message that says what to do, 128 + the signal's number (143 for
SIGTERM, 130 for Ctrl-C, 129 for SIGHUP) when a signal ended it after a checkpoint; the same command then goes on.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, NoReturn

from .training.entry import launched

if TYPE_CHECKING:
    from .config import Config


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the `deepspeed` launcher; ends the process."""
    launched(_train, "train", __doc__, arguments)


def _train(config: Config, _: Namespace) -> int:
    from .training.runs import train

    return train(config)


if __name__ == "__main__":
    main()
