"""`efficientclip fit-head CONFIG [--images DIR] [key=value …]`: a head for a frozen image tower, on one device.

Exit codes are those of `train`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, NoReturn

from .columns import add_columns, columns_of
from .training.entry import launched

if TYPE_CHECKING:
    from .config import Config


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the command; ends the process."""
    launched(_fit_head, "fit-head", __doc__, arguments, lambda parser: add_columns(parser, "data.sources"))


def _fit_head(config: Config, given: Namespace) -> int:
    from .training.head import fit_head

    return fit_head(config, given.images, columns_of(given))


if __name__ == "__main__":
    main()
