"""A child that is forked from a test, and must end by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def exit_code_of_fork(child: Callable[[], int]) -> int:
    """Exit code of a forked process that runs `child`: what it returns, or 1 if it raises."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = child()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])
