"""The one error a user's mistake ends in, and how the command line shows it: a message, no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, named by file and field, with its remedy."""


def reported(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code: 0, or 2 after printing a user's error."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: the disk is full, writing {error.filename or 'a file'}: free space and run the same command "
            "again; nothing half-written will be read",
            file=sys.stderr,
            flush=True,
        )
        return 2
    return 0
