"""`deepspeed --module efficientclip.cross_fit CONFIG [key=value …]`: two fold towers and what they say about the pairs.

Exit codes are those of `train`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, NoReturn

from .training.entry import launched

if TYPE_CHECKING:
    from .config import Config


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the `deepspeed` launcher; ends the process."""
    launched(_cross_fit, "cross-fit", __doc__, arguments)


def _cross_fit(config: Config, _: Namespace) -> int:
    from .training.folds import cross_fit

    return cross_fit(config)


if __name__ == "__main__":
    main()
