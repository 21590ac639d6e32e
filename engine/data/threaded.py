"""What the loaders are beside their batches: iterators whose C++ threads end with them."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self


class ThreadedLoader:
    """A loader whose C++ object, `_threads`, makes batches ahead; there is none before the first batch is asked for."""

    def __init__(self) -> None:
        self.waited_seconds = 0.0
        self._threads: Any = None
        self._closed = False

    def close(self) -> None:
        """End the threads; batches that were handed out stay valid."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")

    def _stop(self) -> None:
        if self._threads is not None:
            self._threads.close()
            self._threads = None
