"""One process at a time in a folder, whatever becomes of that process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from efficientclip.errors import UserError
from efficientclip.files import lock

HOLDER = """
import sys, time
from pathlib import Path
from efficientclip.files.lock import held
with held(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_until_it_leaves(tmp_path: Path) -> None:
    named = f"process {os.getpid()} on {socket.gethostname()} .preparing. is at it"
    with lock.held(tmp_path / "new", "preparing"), pytest.raises(UserError, match=named):
        lock.held(tmp_path / "new", "preparing").__enter__()
    assert list((tmp_path / "new").iterdir()) == []
    with lock.held(tmp_path / "new", "preparing"):
        pass


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on .* .training. is at it"):
            lock.held(tmp_path, "preparing").__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / lock.NAME).exists()
    with lock.held(tmp_path, "preparing"):
        pass
    assert not (tmp_path / lock.NAME).exists()


def test_a_folder_may_be_renamed_while_it_is_held(tmp_path: Path) -> None:
    with lock.held(tmp_path / "made.partial", "preparing"):
        (tmp_path / "made.partial").rename(tmp_path / "made")
        # Whoever waited for the old place begins a new one.
        with lock.held(tmp_path / "made.partial", "preparing"):
            pass
    assert (tmp_path / "made" / lock.NAME).exists()


def test_a_lock_that_its_holder_removed_meanwhile_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        real(handle, how)
        if not taken:
            (tmp_path / lock.NAME).unlink()
        taken.append(handle)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path, "preparing"):
        assert len(taken) == 2
        with pytest.raises(UserError, match="is at it"):
            lock.held(tmp_path, "preparing").__enter__()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot lock files \(No locks available\).*mount it with locks"):
        lock.held(tmp_path, "preparing").__enter__()


@pytest.mark.parametrize(
    ("options", "told"), [("rw,nolock", "(nfs, nolock)"), ("rw,local_lock=all", "(nfs, local_lock=all)"), ("rw", "")]
)
def test_a_mount_whose_locks_other_hosts_do_not_see_is_told(tmp_path: Path, options: str, told: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs {options} 0 0\n")
    assert lock.local_locks(tmp_path / "run", mounts) == (f"{tmp_path} {told}" if told else None)
