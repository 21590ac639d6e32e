"""One process at a time in a folder: `flock`, which the system frees with its holder, however that one ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder`, made if it is absent, for this process. UserError names the process that holds it already.

    The lock file goes with the context. NFS keeps such locks across hosts; a mount that says otherwise is told.
    """
    file = folder / NAME
    handle = _acquire(file, doing)
    try:
        if (kept_here := local_locks(folder)) is not None:
            print(f"notice: {kept_here} locks on this host alone: start {folder} on one host at a time", flush=True)
        yield
    finally:
        # It may have been renamed with its folder, which is then whole and free.
        if _is(handle, file):
            file.unlink()
        os.close(handle)


@contextmanager
def in_turn(file: Path, doing: str) -> Iterator[None]:
    """Hold `file` itself for this process, which waits while another one does; that one may have replaced it."""
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise (_unlockable(file.parent, doing, error) if error.errno in UNSUPPORTED else error) from error
        yield
    finally:
        os.close(handle)


def _acquire(file: Path, doing: str) -> int:
    while True:
        # Its last holder may have renamed it, or removed it.
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 4096, 0).decode(errors="replace")
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"{doing} {file.parent}: {_named(holder)} is at it; wait for its end, or stop it"
                ) from None
            if error.errno in UNSUPPORTED:
                raise _unlockable(file.parent, doing, error) from error
            raise
        if _is(handle, file):
            break
        # Its last holder removed it between our opening and locking it.
        os.close(handle)
    described = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "doing": doing})
    # On a full disk the lock holds all the same.
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, described.encode(), 0)
    return handle


def _unlockable(folder: Path, doing: str, error: OSError) -> UserError:
    return UserError(
        f"{doing} {folder}: its file system cannot lock files ({os.strerror(error.errno or 0)}), so two processes could"
        " write there at once; mount it with locks (NFS: without nolock, lockd running), or choose a folder elsewhere"
    )


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _named(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f"process {found['pid']} on {found['host']} ({found['doing']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def local_locks(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The network mount under `folder` whose locks other hosts do not see, by its options; None: there is none."""
    if not mounts.is_file():
        return None
    inside, found = os.path.realpath(folder), ("", "", "")
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if os.path.commonpath([inside, place]) == place and len(place) >= len(found[0]):
            found = place, kind, options
    place, kind, options = found
    alone = {"nolock", "local_lock=all", "local_lock=flock", "localflock"} & set(options.split(","))
    return f"{place} ({kind}, {', '.join(sorted(alone))})" if alone else None
