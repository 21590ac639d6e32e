"""pipe:COMMAND: a shell command whose output is a shard, as webdataset writes it."""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

import psutil

from ..errors import ShardError
from ..files.places import URL

CHUNK = 1 << 20
POLL_SECONDS = 0.1
TOLD = 2000


def run_piped(url: URL, file: IO[bytes], silence: float, stop: threading.Event | None) -> None:
    """Run the command and write its output to `file`.

    ShardError where it fails, with what it said last, where it is silent for `silence` seconds, or once `stop` is set:
    it is killed then, with the processes that it started.
    """
    shell = shutil.which("bash")
    # Else only the last command of a pipeline could fail.
    words = ["sh", "-c"] if shell is None else [shell, "-o", "pipefail", "-c"]
    with TemporaryFile() as said, selectors.DefaultSelector() as selector:
        process = subprocess.Popen(
            [*words, url.removeprefix("pipe:")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            selector.register(process.stdout, selectors.EVENT_READ)
            heard = time.monotonic()
            while True:
                if stop is not None and stop.is_set():
                    raise ShardError(f"shard {url}: the reading was stopped")
                if selector.select(POLL_SECONDS):
                    content = os.read(process.stdout.fileno(), CHUNK)
                    heard = time.monotonic()
                    if not content:
                        break
                    file.write(content)
                elif time.monotonic() - heard > silence:
                    raise ShardError(f"shard {url}: the command wrote nothing for {silence:g} s; let it end by itself")
            code = _ended(process, silence)
            if code != 0:
                said.seek(max(0, said.seek(0, os.SEEK_END) - TOLD))
                last = " | ".join(said.read().decode(errors="replace").strip().splitlines()[-3:])
                raise ShardError(f"shard {url}: the command ended with {code} ({last or 'it said nothing'}); mend it")
        finally:
            _kill(process)
            process.stdout.close()


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | str:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "no end after its output"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.Error):
        found = psutil.Process(process.pid)
        for one in (*found.children(recursive=True), found):
            with suppress(psutil.Error):
                one.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()
