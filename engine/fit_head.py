"""`efficientclip fit-head CONFIG [key=value …]`: a head for a frozen image tower, on one device.

Exit codes are those of `train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from .training.entry import launched

if TYPE_CHECKING:
    from .config import Config


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of the command; ends the process."""
    launched(_fit_head, "fit-head", __doc__, arguments)


def _fit_head(config: Config) -> int:
    from .training.head import fit_head

    return fit_head(config)


if __name__ == "__main__":
    main()
