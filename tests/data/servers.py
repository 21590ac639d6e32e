"""Servers that remote data is read from: HTTP that fails on request, and moto's S3, both in this process."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from efficientclip.data import remote

# Each answers one request: it fails, or tells another thing.
FAULTS = (
    "drop", "stall", "silence", "half", "unsized half", "trickle", "no ranges", "unsized", "changed",
    "403", "404", "429", "500", "503",
)  # fmt: skip


class Faulty(ThreadingHTTPServer):
    """Serves `files` by path. `faults`, (method, fault) each, are met by the next requests of that method."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: deque[tuple[str, str]] = deque()
        self.always: dict[str, str] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.sized = self.ranged = self.tagged = True
        self.retry_after = "0.05"
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, path: str) -> str | None:
        with self._lock:
            if self.faults and self.faults[0][0] == method:
                return self.faults.popleft()[1]
        fault = self.always.get(path)
        # A length that HEAD tells, too, is the length.
        return fault if method == "GET" or (fault or "").isdecimal() else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away, as they should."""


class _Handler(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Tests print what they need."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.command, path, self.headers["Range"]))
        fault = server.fault(self.command, path)
        if fault == "changed":
            content = server.files[path]
            server.files[path] = bytes(reversed(content[:-1024])) + content[-1024:]
        content = server.files.get(path)
        if path.endswith("/"):
            names = [name.removeprefix(path) for name in server.files if name.startswith(path)]
            content = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
        if content is None or (fault or "").isdecimal():
            self._refuse(fault or "404")
            return
        if fault == "silence":
            server.closing.wait(20)
            self.close_connection = True
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, tag)
        status, first = 200, 0
        whole = len(content)
        if asked and server.ranged and same and fault != "no ranges":
            first, last = int(asked[1]), min(int(asked[2] or whole), whole - 1)
            if first > last:
                self._refuse("416")
                return
            status, content = 206, content[first : last + 1]
        sent = content[: len(content) // 2] if fault in ("drop", "stall", "half", "unsized half") else content
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{whole}")
        if server.tagged:
            self.send_header("ETag", tag)
        if path.endswith("/"):
            self.send_header("Content-Type", "text/html")
        if server.sized and fault not in ("unsized", "unsized half"):
            self.send_header("Content-Length", str(len(sent if fault == "half" else content)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if not body:
            return
        if fault == "trickle":
            for at in range(0, len(sent)):
                self.wfile.write(sent[at : at + 1])
                if server.closing.wait(0.05):
                    break
            return
        self.wfile.write(sent)
        if fault == "stall":
            server.closing.wait(20)
        if fault in ("drop", "stall"):
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _refuse(self, status: str) -> None:
        self.send_response(int(status))
        if status == "429":
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def http() -> Iterator[Faulty]:
    server = Faulty()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


class S3:
    """moto's S3 as a WSGI application; `faults`, (method, fault) each, are met by the next requests of that method."""

    bucket = "s3://shards"

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.faults: deque[tuple[str, str]] = deque()
        self.asked: list[tuple[str, str]] = []
        self.closing = threading.Event()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.asked.append((method, environ["PATH_INFO"]))
        fault = self.faults.popleft()[1] if self.faults and self.faults[0][0] == method else None
        if fault in ("403", "500", "503"):
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault]
            start(f"{fault} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode() * (method != "HEAD")]
        answer = list(self.moto(environ, start))
        return self._cut(b"".join(answer), fault) if fault in ("drop", "stall") else answer

    def _cut(self, content: bytes, fault: str) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        if fault == "stall":
            self.closing.wait(20)
        # The server ends the connection then.
        raise ConnectionError


@contextmanager
def s3() -> Iterator[S3]:
    """With an empty bucket; endpoint and credentials are those of the environment."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    # It reaches an earlier server.
    remote._made.cache_clear()
    served = S3()
    server = make_server("127.0.0.1", 0, served, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
    told |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        # Servers of one process share what they hold.
        urlopen(Request(f"{told['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
        put(f"{served.bucket}/", None)
        try:
            yield served
        finally:
            served.closing.set()
            server.shutdown()
            server.server_close()


def put(url: str, content: bytes | None) -> None:
    """Write an object of the S3 that the environment names; None: make its bucket."""
    filesystem = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    if content is None:
        filesystem.mkdir(url.rstrip("/"))
    else:
        filesystem.pipe_file(url, content)
