"""The one error a user's mistake ends in, what other libraries' errors become, and how the command line shows them."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = "free space and run the same command again; nothing half-written will be read"
DENIED = "give this user the right to it, or choose another path"
BROKEN = "the disk or the connection to it fails; put the file on another one"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "this file system or limit allows no file of that size; choose another path",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: "choose a path that can be written",
    errno.EISDIR: "a file is wanted here, not a folder",
    errno.ENOTDIR: "part of this path is a file, where a folder is wanted",
    errno.ENOENT: "it is not there, or was removed meanwhile; put it back",
    errno.EIO: BROKEN,
    errno.ESTALE: BROKEN,
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "its symbolic links go round in a circle; name the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory",
}
# Rust's and C++'s libraries put the system's error into a text.
OS_ERROR = re.compile(r"\(os error (\d+)\)|\[?errno:? ?(\d+)\]?", re.IGNORECASE)
TEXTS = {os.strerror(code).lower(): code for code in REMEDIES}
# PyTorch's file writer and NumPy's `tofile` tell no cause.
UNTOLD = re.compile(
    r"PytorchStreamWriter|unexpected pos|inline_container|iostream error|Parent directory .* does not exist"
    r"|\d+ requested and \d+ written",
    re.IGNORECASE,
)


class UserError(Exception):
    """Bad input, named by file and field, with its remedy."""


class ShardError(UserError):
    """A shard that cannot be had, or is not whole; a run may go on without it (data.max_bad_shards)."""


@contextmanager
def reading(what: str, path: Path | str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong while the block reads `path` becomes a UserError: which file, what is wrong, what to do."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        code = os_error(error)
        if code is not None:
            raise UserError(f"{what} {path}: {os.strerror(code)}: {REMEDIES[code]}") from error
        raise UserError(f"{what} {path}: broken ({short(error)}); {remedy}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or read-only disk, or a missing right, under any library's exception becomes an error naming `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code, untold = os_error(error), UNTOLD.search(str(error)) is not None
        if code is None and untold:
            code = _probed(path)
        if code is not None:
            raise UserError(f"{path}: {os.strerror(code)}: {REMEDIES[code]}") from error
        if untold:
            raise UserError(
                f"{path}: could not be written whole ({short(error)}); check free space, quota and `ulimit -f`, and run"
                " the same command again"
            ) from error
        raise


def os_error(error: BaseException | None) -> int | None:
    """The system's error that caused `error`, of those that have a remedy; None: it was something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            return error.errno
        text = str(error)
        for found in OS_ERROR.findall(text):
            code = int(found[0] or found[1])
            if code in REMEDIES:
                return code
        for told, code in TEXTS.items():
            if told in text.lower():
                return code
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _probed(path: Path) -> int | None:
    """What stops a mebibyte from being written beside `path` now."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in REMEDIES else None
    finally:
        probe.unlink(missing_ok=True)
    return None


def short(error: Exception) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"


def message_of(error: Exception) -> str | None:
    """What a user is told of `error`; None: it is a defect, whose traceback is worth more."""
    if isinstance(error, UserError):
        return str(error)
    code = os_error(error)
    if code is None or not isinstance(error, OSError):
        return None
    return f"{error.filename or 'a file'}: {os.strerror(code)}: {REMEDIES[code]}"


def reported(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code: 0, or 2 after printing a user's error."""
    try:
        command()
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        tell(f"error: {message}")
        return 2
    return 0


def tell(message: str) -> None:
    """Print to stderr, on a line of its own below any progress bar."""
    close_bars()
    print(message, file=sys.stderr, flush=True)


def close_bars() -> None:
    """Leave the progress bars as they are; what is printed next begins a line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
