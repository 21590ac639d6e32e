"""Remote data: what fsspec reaches by a URL, and what a `pipe:` command writes, listed and read into local files.

Every request has limits in time. What may pass (drops, time-outs, 408, 425, 429, 500 to 504) is tried again after
growing waits, from the byte where it stopped where the server gives ranges; all else ends at once. What was read has
the size that the server told, and is of one object: it is asked again at the end whether that has changed.

Credentials and endpoints are fsspec's own: each service's environment, and ~/.config/fsspec.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import glob
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from ..errors import REMEDIES, ShardError, UserError, short, writing
from ..files.places import URL, Location, braced, is_glob, written
from . import attempts
from .attempts import Attempts, Missing, NoRanges, Patience, Stop, Unfit
from .piped import run_piped

S = TypeVar("S")
T = TypeVar("T")
BLOCK = 8 << 20
AT_ONCE = 16
# So many pictures in a row that a server does not give are a server that fails.
FAILING = 32
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}
# What tells one content of an object from another, the surest first.
TAGS = ("ETag", "etag", "md5Hash", "xet_hash", "blob_id", "Last-Modified", "LastModified", "mtime", "updated")


class Described(NamedTuple):
    """Where a file lies, its size in bytes (-1: not told), and what changes when it is written anew."""

    place: str
    size: int
    changed: str | int


def described(place: Location, stop: Stop = None) -> Described:
    """ShardError where it is not there, or cannot be asked for; a command is not run for it."""
    if not isinstance(place, URL):
        try:
            found = place.stat()
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "put it back, or take it out of the list")
            raise ShardError(f"shard {place}: {error.strerror or error}: {remedy}") from error
        return Described(os.path.realpath(place), found.st_size, found.st_mtime_ns)
    if place.piped:
        return Described(place, -1, "")
    return Attempts(place, stop).run(lambda: _told(place, stop)[0])


def expanded(place: Location) -> list[Location]:
    """The files that braces and globs stand for, in order. UserError where a glob matches none."""
    folder, names = written(place) if isinstance(place, Path) else (Path(), place)
    found: list[Location] = []
    for one in braced(str(names)):
        whole = URL(one) if isinstance(place, URL) else folder / one
        matches: Sequence[Location] = [whole]
        if isinstance(whole, URL):
            matches = _matching(whole) if is_glob(whole) else matches
        elif is_glob(one) and not os.path.exists(whole):
            matches = [folder / match for match in sorted(glob.glob(one, root_dir=folder, recursive=True))]
        if not matches:
            raise UserError(f"source {whole}: nothing has a name like that; check the folder and the pattern")
        found += matches
    return found


def inside(folder: URL) -> list[URL]:
    """The files in a remote folder, by name. ShardError where it cannot be listed."""
    return [place for place, is_folder in _entries(folder) if not is_folder]


def copied(url: URL, stop: Stop = None) -> IO[bytes]:
    """All of it in a file without a name, read from its beginning.

    ShardError with URL, cause and remedy when it cannot be had, within the limits of `patience`, or once `stop` is set.
    """
    with writing(Path(gettempdir())):
        file = TemporaryFile()  # noqa: SIM115
    try:
        download(url, file, stop)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def download(url: URL, file: IO[bytes], stop: Stop = None) -> Described:
    """Write all of it to the empty `file`; returns what it is."""
    if url.piped:
        with _writing(file):
            run_piped(url, file, attempts.patience.command, stop)
            file.flush()
        return described(url)
    tries = Attempts(url, stop)
    known: Described | None = None
    ranged = True

    def attempt() -> Described:
        nonlocal known, ranged
        now, gives = _told(url, stop)
        # Without a tag, what comes may be of another object than what is there.
        ranged = ranged and gives and now.size >= 0 and now.changed != ""
        if now != known or not ranged or file.tell() > now.size:
            known = now
            file.seek(0)
            file.truncate()
        try:
            if file.tell() < now.size or now.size < 0:
                _request(url, file.tell(), now.size, file, stop, rest=True, tag=str(now.changed))
            with _writing(file):
                file.flush()
        except NoRanges as error:
            ranged = False
            raise Unfit("the server gives no ranges") from error
        finally:
            tries.reached(file.tell())
        _check_whole(url, file, now)
        if _told(url, stop)[0] != now:
            raise Unfit("it changed while it was read")
        return now

    return tries.run(attempt)


def read_range(url: URL, start: int, length: int, stop: Stop = None) -> bytes:
    """`length` bytes from `start` on; ShardError where there are fewer."""
    if length == 0:
        return b""
    if url.piped:
        with copied(url, stop) as file:
            file.seek(start)
            return file.read(length)

    def attempt() -> bytes:
        memory = io.BytesIO()
        _request(url, start, start + length, memory, stop)
        if memory.tell() != length:
            raise Unfit(f"{memory.tell()} bytes came, of the {length} from byte {start} on")
        return memory.getvalue()

    try:
        return Attempts(url, stop).run(attempt)
    except NoRanges:
        with copied(url, stop) as file:
            file.seek(start)
            return file.read(length)


@contextmanager
def opened(place: Location) -> Iterator[IO[bytes]]:
    """A file to be read through; of a remote one a copy."""
    with copied(place) if isinstance(place, URL) else place.open("rb") as file:
        yield file


@contextmanager
def ranges(place: Location) -> Iterator[Any]:
    """What pyarrow reads a .parquet from: of a remote one no more than the parts that are asked for."""
    if not isinstance(place, URL):
        yield place
        return
    known = described(place)
    if known.size < 0 or (place.protocol in ("http", "https") and _lacks_ranges(place)):
        with copied(place) as file:
            yield file
        return
    yield io.BufferedReader(_Ranges(place, known.size), BLOCK >> 3)
    if described(place) != known:
        raise ShardError(f"shard {place}: it changed while it was read; run the same command again")


def each(urls: Iterable[URL], stop: threading.Event) -> Iterator[bytes | None]:
    """The bytes of small files, in order, many asked for at a time; None for one that cannot be had.

    ShardError where it is the server that fails: none can be had, or many in a row, but for those that are not there.
    ShardError soon after `stop` is set, too.
    """
    failed: ShardError | None = None
    row, got = 0, False
    for content in at_once(partial(_small, stop=stop), urls):
        if isinstance(content, bytes):
            got, row = True, 0
        elif not isinstance(content, Missing):
            failed, row = content, row + 1
            if row >= FAILING or stop.is_set():
                raise content
        yield content if isinstance(content, bytes) else None
    if failed is not None and not got:
        raise failed


def _small(url: URL, stop: threading.Event) -> bytes | ShardError:
    def attempt() -> bytes:
        memory = io.BytesIO()
        _request(url, 0, -1, memory, stop, rest=True)
        return memory.getvalue()

    try:
        return Attempts(url, stop).run(attempt)
    except ShardError as error:
        return error


def at_once(do: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`do` of each item, in order, by AT_ONCE threads, a few items ahead. A process that ends waits for none."""
    jobs: SimpleQueue[tuple[S, concurrent.futures.Future[T]] | None] = SimpleQueue()
    waiting: deque[concurrent.futures.Future[T]] = deque()
    threads = 0
    try:
        for item in items:
            waiting.append(concurrent.futures.Future())
            jobs.put((item, waiting[-1]))
            if threads < AT_ONCE:
                threading.Thread(target=_work, args=(do, jobs), daemon=True).start()
                threads += 1
            if len(waiting) >= 4 * AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(threads):
            jobs.put(None)


def _work(do: Callable[[S], T], jobs: SimpleQueue[tuple[S, concurrent.futures.Future[T]] | None]) -> None:
    while (job := jobs.get()) is not None:
        item, future = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(do(item))
            except BaseException as error:
                future.set_exception(error)


def _filesystem(url: URL) -> Any:
    return _made(url.protocol, os.getpid(), attempts.patience)


@cache
def _made(protocol: str, _process: int, limits: Patience) -> Any:
    """Of fsspec, with limits in time, without retries and memory of its own; a fork needs another one."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        told = fsspec.config.conf.get(protocol, {})
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect, sock_read=limits.read)
            ours = {"timeout": timeout, "raise_for_status": _check_range}
            options["client_kwargs"] = {**told.get("client_kwargs", {}), **ours}
        elif protocol in ("s3", "s3a"):
            times = {"connect_timeout": limits.connect, "read_timeout": limits.read}
            once = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 4 * AT_ONCE}
            options["config_kwargs"] = times | once | told.get("config_kwargs", {})
        made = kind(**options)
    except ImportError as error:
        package = PACKAGES.get(protocol, "aiohttp")
        raise UserError(
            f"{protocol}://: needs the package {package} ({short(error)}); pip install {package}, or"
            " 'efficientclip[remote]' for all"
        ) from error
    except ValueError as error:
        raise UserError(f"{protocol}://: {short(error)}; give s3://, gs://, hf://, https:// or pipe:COMMAND") from error
    if protocol in ("s3", "s3a"):
        made.retries = 1
    return made


def _asked(
    url: URL, method: str, *arguments: Any, stop: Stop, got: Callable[[], int] = lambda: 0, **options: Any
) -> Any:
    """What the file system's `method` returns; `got` is how many bytes it has read, or is to read."""
    filesystem = _filesystem(url)
    if not (isinstance(filesystem, AsyncFileSystem) and filesystem.async_impl):
        return getattr(filesystem, method)(*arguments, **options)
    call = getattr(filesystem, f"_{method}")(*arguments, **options)
    future = asyncio.run_coroutine_threadsafe(call, filesystem.loop)
    started, limits = time.monotonic(), attempts.patience
    while not concurrent.futures.wait([future], timeout=0.1).done:
        late = time.monotonic() - started > limits.connect + limits.read + got() / limits.slowest
        if late or (stop is not None and stop.is_set()):
            future.cancel()
            raise TimeoutError("the server stalls")
    return future.result()


def _told(url: URL, stop: Stop) -> tuple[Described, bool]:
    """What the server tells of the file, and whether it may give ranges of it."""
    info = _asked(url, "info", url, stop=stop)
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{url} is a folder")
    size = info.get("size")
    tag = next((str(info[name]) for name in TAGS if info.get(name)), "")
    return Described(url, -1 if size is None else int(size), tag), info.get("partial", True)


def _entries(folder: str) -> list[tuple[URL, bool]]:
    """What a remote folder holds, by name, and whether that is a folder."""
    # `ls` tells of a listing that fails, which fsspec's `find` and `glob` take for an empty one.
    url = URL(folder.rstrip("/") + "/")
    filesystem = _filesystem(url)
    found = Attempts(url, None).run(lambda: _asked(url, "ls", url, stop=None, got=lambda: 1 << 23, detail=True))
    kinds = {one["name"].rstrip("/"): one["type"] == "directory" for one in found}
    # S3 has objects that stand for their folder.
    kinds.pop(filesystem._strip_protocol(url).rstrip("/"), None)
    return [(URL(filesystem.unstrip_protocol(name)), kinds[name]) for name in sorted(kinds)]


def _matching(pattern: URL) -> list[URL]:
    """By name; `**` stands for any folders."""
    levels = pattern.split("/")
    first = next(at for at, level in enumerate(levels) if is_glob(URL(level)))
    found = [URL("/".join(levels[:first]))]
    for at, level in enumerate(levels[first:], first + 1):
        last = at == len(levels)
        if level == "**":
            for folder in found:
                found += [place for place, is_folder in _entries(folder) if is_folder]
        if level != "**" or last:
            held = [place for folder in found for place, is_folder in _entries(folder) if last or is_folder]
            found = [place for place in held if fnmatchcase(place.rpartition("/")[2], level)]
    return sorted(found)


def _request(url: URL, start: int, end: int, file: IO[bytes], stop: Stop, *, rest: bool = False, tag: str = "") -> None:
    """Append the bytes from `start` to `end`, which is not told where it is -1, to `file`; NoRanges where others come.

    `rest`: these are all that follow. `tag`: they are wanted of that object alone.
    """
    if url.protocol in ("http", "https"):
        headers = {"Accept-Encoding": "identity"}
        if start or not rest:
            headers["Range"] = f"bytes={start}-" + ("" if rest else str(end - 1))
            headers |= {"If-Range": tag} if tag else {}
        sink = _Sink(file)
        try:
            _asked(url, "get_file", url, sink, headers=headers, stop=stop, got=lambda: sink.written)
        finally:
            sink.cut()
    elif end < 0:
        file.write(_asked(url, "cat_file", url, stop=stop, got=lambda: BLOCK))
    else:
        for first in range(start, end, BLOCK):
            wanted = min(BLOCK, end - first)
            block = _asked(url, "cat_file", url, start=first, end=first + wanted, stop=stop, got=lambda: BLOCK)
            if len(block) != wanted:
                raise Unfit(f"{len(block):,} of {wanted:,} bytes from byte {first:,} on came")
            with _writing(file):
                file.write(block)


async def _check_range(response: Any) -> None:
    """Whether it begins where it was asked to: a server without ranges, or with another object, sends all of it."""
    asked = response.request_info.headers.get("Range")
    if asked is not None and response.status < 400:
        first = asked.removeprefix("bytes=").partition("-")[0]
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise NoRanges


class _Sink:
    """A file to which fsspec's thread appends an answer, until `cut`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.written = file, 0
        self._lock, self._cut = threading.Lock(), False

    def write(self, content: bytes) -> int:
        with self._lock, _writing(self.file):
            if self._cut:
                raise TimeoutError
            self.written += len(content)
            return self.file.write(content)

    def cut(self) -> None:
        with self._lock:
            self._cut = True

    def read(self, count: int = -1) -> bytes:
        return self.file.read(count)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        """It is the caller's to close."""


def _writing(file: IO[bytes]) -> AbstractContextManager[None]:
    name = getattr(file, "name", None)
    return writing(Path(name if isinstance(name, str) else gettempdir()))


def _check_whole(url: URL, file: IO[bytes], known: Described) -> None:
    """`file` is at its end."""
    length = file.tell()
    if known.size >= 0:
        if length != known.size:
            raise Unfit(f"{length:,} of {known.size:,} bytes came")
        return
    file.seek(max(0, length - 1024))
    ending = file.read()
    if not (ending == bytes(1024) if url.suffix == ".tar" else url.suffix == ".parquet" and ending[-4:] == b"PAR1"):
        raise Unfit("its end did not come, and the server tells no Content-Length")


def _lacks_ranges(url: URL) -> bool:
    try:
        Attempts(url, None).run(lambda: _request(url, 1, 2, io.BytesIO(), None))
    except NoRanges:
        return True
    return False


class _Ranges(io.RawIOBase):
    """A remote file, read where it is asked for."""

    def __init__(self, url: URL, size: int) -> None:
        super().__init__()
        self.url, self.size, self.at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        content = read_range(self.url, self.at, max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)
