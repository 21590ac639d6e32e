"""Private mount namespaces: small file systems and other views, which vanish with the process that holds them."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000


class Namespace:
    """A mount namespace of its own; what is mounted in it, nobody else sees."""

    def __init__(self) -> None:
        # It waits for the end of its input, which comes with our own end at the latest.
        command = ["unshare", "--mount", "--propagation", "private", "cat"]
        self.holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        ours, deadline = os.readlink("/proc/self/ns/mnt"), time.monotonic() + 10
        while self._identity() in (None, ours):
            if self.holder.poll() is not None or time.monotonic() > deadline:
                raise PermissionError("no mount namespace can be made here")
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self.holder.pid

    def _identity(self) -> str | None:
        try:
            return os.readlink(f"/proc/{self.holder.pid}/ns/mnt")
        except OSError:
            return None

    def mount(self, *arguments: str | Path) -> bool:
        """mount(8) inside; False: refused."""
        command = ["nsenter", "--mount", "--target", str(self.holder.pid), "mount", *map(str, arguments)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def seen(self, path: Path) -> Path:
        """The path at which this process finds what is `path` inside."""
        return Path(f"/proc/{self.holder.pid}/root") / path.relative_to("/")

    def command(self, folder: Path, command: list[str]) -> list[str]:
        """`command`, to be run inside in `folder`."""
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", f"--wdns={folder}", *command]

    def close(self) -> None:
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.kill()
        self.holder.wait()


def enter(pid: int) -> None:
    """Move this process, which must have one thread, into the mount namespace of another."""
    handle = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    if LIBC.setns(handle, CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(handle)


@functools.cache
def permitted() -> bool:
    """Whether this user may make mount namespaces and mount in them."""
    try:
        namespace = Namespace()
    except (OSError, FileNotFoundError):
        return False
    try:
        return namespace.mount("-t", "tmpfs", "none", "/mnt")
    finally:
        namespace.close()


class SmallDisk:
    """A tmpfs at `folder`, which exists, inside `namespace`; its size changes while it is in use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.namespace = folder, Namespace()
        if not self.namespace.mount("-t", "tmpfs", "-o", "size=1g", "none", folder):
            self.namespace.close()
            raise PermissionError(f"no tmpfs can be mounted at {folder}")

    @property
    def seen(self) -> Path:
        return self.namespace.seen(self.folder)

    def used(self) -> int:
        found = os.statvfs(self.seen)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def leave_free(self, size: int) -> None:
        assert self.namespace.mount("-o", f"remount,size={self.used() + size}", self.folder)

    def leave_names(self, number: int) -> None:
        """Room for so many more files; 0: no limit."""
        found = os.statvfs(self.seen)
        limit = found.f_files - found.f_ffree + number if number else 0
        assert self.namespace.mount("-o", f"remount,nr_inodes={limit}", self.folder)

    def read_only(self, yes: bool) -> bool:
        """False while files are open for writing."""
        return self.namespace.mount("-o", f"remount,{'ro' if yes else 'rw'}", self.folder)
