"""A git server on loopback: git's own http-backend behind a small HTTP server, or a hostile one."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

Answer = Callable[[BaseHTTPRequestHandler], bool]


class GitServer:
    """Serves the repositories below `root`; a context manager.

    Attributes:
        exact: Whether a commit that no branch points at may be asked for (as GitHub allows).
        filters: Whether a client may ask for less than everything (as GitHub allows).
        password: What Basic authentication must bring, or None.
        instead: Answers a request itself and returns True: how a hostile server is made.
        asked: Paths, in order.
    """

    def __init__(self, root: Path, *, exact: bool = True) -> None:
        self.root = root
        self.exact = exact
        self.filters = True
        self.password: str | None = None
        self.instead: Answer = lambda _: False
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            do_POST = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    def url_of(self, repository: str) -> str:
        """The URL of a repository below the root."""
        return f"http://127.0.0.1:{self._http.server_port}/{repository}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request."""
        self.asked.append(request.path)
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length) if length else _chunks(request)
        if self.instead(request):
            return
        given = request.headers.get("Authorization", "")
        if (
            self.password is not None
            and given != f"Basic {base64.b64encode(self.password.encode()).decode()}"
        ):
            request.send_response(401)
            request.send_header("WWW-Authenticate", 'Basic realm="git"')
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        parts = urlsplit(request.path)
        exact = "true" if self.exact else "false"
        env = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.command,
            "PATH_INFO": parts.path,
            "QUERY_STRING": parts.query,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            # Version 2 of the protocol serves every object that is asked for.
            "GIT_PROTOCOL": request.headers.get("Git-Protocol", "") if self.exact else "",
            "GIT_CONFIG_COUNT": "3",
            "GIT_CONFIG_KEY_0": "uploadpack.allowAnySHA1InWant",
            "GIT_CONFIG_VALUE_0": exact,
            "GIT_CONFIG_KEY_1": "safe.directory",
            "GIT_CONFIG_VALUE_1": "*",
            "GIT_CONFIG_KEY_2": "uploadpack.allowFilter",
            "GIT_CONFIG_VALUE_2": "true" if self.filters else "false",
        }
        done = subprocess.run(["git", "http-backend"], env=env, input=body, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = [line.split(": ", 1) for line in head.decode().split("\r\n") if line]
        status = next((int(value.split()[0]) for name, value in headers if name == "Status"), 200)
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the client may have had enough
            request.end_headers()
            request.wfile.write(content)


def _chunks(request: BaseHTTPRequestHandler) -> bytes:
    """A body in chunks (RFC 9112 7.1)."""
    body = b""
    if request.headers.get("Transfer-Encoding") == "chunked":
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
    return body
