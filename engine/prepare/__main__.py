"""`deepspeed --module efficientclip.prepare [SOURCE] STORE --config C`: one rank of `efficientclip prepare`.

Exit codes are those of `train`.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from .. import cli, stopping


def main() -> NoReturn:
    """Entry of the launchers; ends the process."""
    stopping.watch()
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
