"""Tries again what may pass: drops, time-outs, and the HTTP statuses 408, 425, 429, 500, 502, 503 and 504."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ShardError, UserError, short
from ..files.places import URL

T = TypeVar("T")
Stop = threading.Event | None
# Their errors are those of connections.
CLIENTS = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "httpcore", "httpx", "requests", "urllib3")
CREDENTIALS = (
    "check the credentials, which fsspec takes from the environment or ~/.config/fsspec, and their right to read it"
)
LATER = "the server or the way to it fails; run the same command again when they work"


@dataclass(frozen=True)
class Patience:
    """Limits: seconds to connect, between two reads, of a command without a word, and that a server may ask to wait;
    the slowest rate, bytes a second; how often to try before anything new came; the first wait and the longest."""

    connect: float = 10
    read: float = 30
    command: float = 600
    asked: float = 300
    slowest: float = 32 << 10
    tries: int = 7
    wait: float = 0.5
    longest: float = 30


patience = Patience()


class Unfit(Exception):
    """An answer that is not what was asked for, though none of its bytes was lost on the way."""


class NoRanges(Exception):
    """The server sends all, whatever is asked for."""


class Missing(ShardError):
    """The server answers that it is not there."""


class Attempts:
    """Tries again what may pass. UserErrors, and `NoRanges` where no file is being filled, go through."""

    def __init__(self, url: URL, stop: Stop) -> None:
        self.url, self.stop = url, stop
        self.failures = self.furthest = 0

    def reached(self, position: int) -> None:
        """Something new came, enough of it that as many failures as before may follow."""
        if position >= self.furthest + (1 << 20):
            self.furthest, self.failures = position, 0

    def run(self, do: Callable[[], T]) -> T:
        while True:
            if self.stop is not None and self.stop.is_set():
                raise ShardError(f"shard {self.url}: the reading was stopped")
            try:
                return do()
            except (UserError, MemoryError, NoRanges):
                raise
            except Exception as error:
                self._wait(error)

    def _wait(self, error: Exception) -> None:
        status, asked = _answer(error)
        if status is None and not _is_known(error):
            raise error
        why = f"the server answers {status}" if status else _innermost(error)
        if not _may_pass(error, status):
            kind = Missing if status in (404, 410) else ShardError
            raise kind(f"shard {self.url}: {_refusal(error, status, why)}") from error
        self.failures += 1
        if asked is not None and asked > patience.asked:
            raise ShardError(f"shard {self.url}: {why} and asks to wait {asked:.0f} s; {LATER}") from error
        if self.failures >= patience.tries:
            raise ShardError(
                f"shard {self.url}: {self.failures} attempts failed, the last one: {why}; {LATER}"
            ) from error
        wait = min(patience.wait * 2 ** (self.failures - 1), patience.longest) * random.uniform(0.5, 1.5)
        seconds = max(asked or 0, wait)
        if self.stop is None:
            time.sleep(seconds)
        else:
            self.stop.wait(seconds)


def _refusal(error: Exception, status: int | None, why: str) -> str:
    if status in (401, 403):
        return f"access denied ({status}); {CREDENTIALS}"
    if status in (404, 410):
        return f"not there ({status}); check its name, or take it out of the list"
    return f"{why}; check the URL" if status or _names(error, "InvalidURL", "InvalidUrl") else f"{why}; {CREDENTIALS}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _innermost(error: Exception) -> str:
    last = [one for one in _chain(error) if isinstance(one, Exception)][-1]
    # As aiohttp's parser tells it.
    told = short(last).removeprefix("400, message: ")
    return f"timed out ({told})" if isinstance(last, TimeoutError) else told


def _answer(error: Exception) -> tuple[int | None, float | None]:
    """The HTTP status under a client's error, and the seconds that the server asks to wait."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            told = response.get("ResponseMetadata", {})
            status, headers = told.get("HTTPStatusCode"), told.get("HTTPHeaders")
        elif response is not None:
            status, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
        else:
            # aiohttp's parser gives codes to broken answers.
            status = getattr(one, "code" if type(one).__module__.startswith("gcsfs") else "status", None)
            headers = getattr(one, "headers", None)
        if str(status).isdecimal() and 300 <= int(str(status)) < 600:
            lowered = {str(name).lower(): str(value) for name, value in (headers or {}).items()}
            return int(str(status)), _seconds(lowered.get("retry-after"))
    if isinstance(error, PermissionError):
        return 403, None
    if all(isinstance(one, FileNotFoundError) for one in _chain(error)):
        return 404, None
    return None, None


def _seconds(told: str | None) -> float | None:
    if told is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(told))
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return None


def _is_known(error: Exception) -> bool:
    """Whether it is a client's, the system's, or of what it was given; anything else is a defect."""
    return any(isinstance(one, OSError | ValueError | Unfit) or _is_client(one) for one in _chain(error))


def _is_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENTS


def _names(error: Exception, *words: str) -> bool:
    return any(word in type(one).__name__ for one in _chain(error) for word in words)


def _may_pass(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status in (408, 425, 429, 500, 502, 503, 504)
    if _names(error, "Credentials", "InvalidURL", "InvalidUrl"):
        return False
    found = [one for one in _chain(error) if not isinstance(one, FileNotFoundError)]
    return any(isinstance(one, OSError | Unfit) or _is_client(one) for one in found)
