"""Remote shards as local files: each fetched anew, or kept in a folder of a given size.

CACHE/IDENTITY-DIGEST.shard    whole, by what the server tells of it and by the digest of its content
     /.IDENTITY.partial        under way, or left by a process that died; locked by the one that writes it

Processes share the folder: one of them fetches a shard, the others wait for it. A file is believed once its digest has
been computed in this process. What is read may be removed: whoever has it open reads on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..config import Data
from ..errors import ShardError, UserError, writing
from ..files.digests import digest_of, is_named_by
from ..files.places import URL
from .attempts import Stop
from .remote import Described, copied, described, download

SHARD = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.shard")
PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")
POLL_SECONDS = 0.1


def fetch(url: URL, cache: Cache | None = None, stop: Stop = None) -> IO[bytes]:
    """All of a remote shard in a local file, read from its beginning: in `cache`, or without a name.

    ShardError with URL, cause and remedy when it cannot be had within the limits of `attempts.patience`, or once `stop`
    is set.
    """
    # What a command will write is not known before.
    return copied(url, stop) if cache is None or url.piped else cache.kept(url, stop)


@dataclass(frozen=True)
class Cache:
    """A folder of shards, of `size` bytes at most beside those under way: the least recently used ones go."""

    folder: Path
    size: int

    @classmethod
    def of(cls, data: Data) -> Cache | None:
        return None if data.cache is None else cls(data.cache, int(data.cache_gib * (1 << 30)))

    def kept(self, url: URL, stop: Stop = None) -> IO[bytes]:
        """As `fetch`; a shard that is larger than the cache goes without a name."""
        known = described(url, stop)
        if known.size > self.size:
            return copied(url, stop)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._found(known)
            while found is None:
                aside = self.folder / f".{_identity(known)}.partial"
                with open(aside, "r+b", opener=_made) as partial:
                    if not _locked(partial, url, stop):
                        continue
                    found = self._found(known)
                    if found is not None:
                        aside.unlink(missing_ok=True)
                    else:
                        found = self._fetched(url, partial, known, stop)
        return found

    def _found(self, known: Described) -> IO[bytes] | None:
        """The whole shard, if it is there; a damaged one goes."""
        for file in self.folder.glob(f"{_identity(known)}-*.shard"):
            with suppress(FileNotFoundError):
                with ExitStack() as closing:
                    stream = closing.enter_context(file.open("rb"))
                    if _is_sound(file):
                        # Another user's file keeps its times.
                        with suppress(OSError):
                            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
                        closing.pop_all()
                        return stream
                file.unlink()
        return None

    def _fetched(self, url: URL, partial: IO[bytes], known: Described, stop: Stop) -> IO[bytes]:
        aside = Path(partial.name)
        try:
            self._make_room(max(known.size, 0))
            partial.seek(0)
            partial.truncate()
            came = download(url, partial, stop)
            file = self.folder / f"{_identity(came)}-{digest_of(aside)}.shard"
            stream = aside.open("rb")
            os.replace(aside, file)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):
            _sound.add(_touch_of(file))
        self._make_room(0, file)
        return stream

    def _make_room(self, wanted: int, but: Path | None = None) -> None:
        """Remove what was used least recently until `wanted` bytes more would fit; `but` stays."""
        held: list[tuple[int, int, Path]] = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if SHARD.fullmatch(file.name) or (PARTIAL.fullmatch(file.name) and _is_left(file)):
                    found = file.stat()
                    held.append((found.st_atime_ns, found.st_size, file))
        total = sum(size for _, size, _ in held) + wanted
        for _, size, file in sorted(held):
            if total > self.size and file != but:
                file.unlink(missing_ok=True)
                total -= size


Touch = tuple[int, int, int, int]
_sound: set[Touch] = set()


def _identity(known: Described) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _touch_of(file: Path) -> Touch:
    """What changes when a file is written, and not when it is read."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_sound(file: Path) -> bool:
    touch = _touch_of(file)
    if touch not in _sound and is_named_by(file):
        _sound.add(touch)
    return touch in _sound


def _locked(partial: IO[bytes], url: URL, stop: Stop) -> bool:
    """Whether this process may write there now; else it waits a little, or its place was taken by another file."""
    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if (stop or threading.Event()).wait(POLL_SECONDS):
            raise ShardError(f"shard {url}: the reading was stopped") from None
        return False
    except OSError as error:
        raise UserError(
            f"data.cache: {Path(partial.name).parent} cannot lock files ({error.strerror}); name one on a local disk"
        ) from error
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(partial.fileno()), os.stat(partial.name))
    return False


def _made(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_CREAT, 0o666)


def _is_left(partial: Path) -> bool:
    """Whether no process writes there: it died."""
    with partial.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
