"""The one error a user's mistake ends in, and how the command line shows it: a message, no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

FULL = "free space and run the same command again; nothing half-written will be read"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: "give this user the right to it, or choose another path",
    errno.EPERM: "give this user the right to it, or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.EISDIR: "a file is wanted here, not a folder",
    errno.ENOTDIR: "part of this path is a file, where a folder is wanted",
}


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
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}: {remedy}", file=sys.stderr, flush=True)
        return 2
    return 0
