"""Git servers that were made to do harm: each is given up with a stable word and a clear message."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from author import packed_header
from trap import MIB, Trap, packet, traps


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    with traps(tmp_path) as made:
        yield made


async def test_a_file_over_the_limit_from_a_server_that_sends_everything(trap: Trap) -> None:
    """It is refused by its size before it is read."""
    trap.server.filters = False
    author = trap.author()
    (author.folder / "large").write_bytes(bytes(8 * MIB))
    at = author.commit()
    word, message = await trap.springs(trap.url_of(author), at, trap.source_of(max_bytes=4 * MIB))
    assert word == "tree_refused"
    assert "'large' has 8388608" in message


async def test_terminal_escapes_of_a_server(trap: Trap) -> None:
    """What a server says is shown on one line, without anything that a terminal obeys."""

    def lie(request: BaseHTTPRequestHandler) -> bool:
        body = packet(b"ERR \x1b[2J\x1b]0;owned\x07\r\n2026 [info] all is well\n")
        request.send_response(200)
        request.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
        request.end_headers()
        request.wfile.write(packet(b"# service=git-upload-pack\n") + b"0000" + body)
        return True

    author = trap.author()
    trap.server.instead = lambda request: "hostile" in request.path and lie(request)
    word, message = await trap.springs(trap.url_of(author), "1" * 40)
    assert word == "git_failed"
    assert "\x1b" not in message
    assert "\n" not in message


async def test_a_server_that_sends_on_and_on(trap: Trap) -> None:
    """A pack without end is ended at the limit."""

    def endless(request: BaseHTTPRequestHandler) -> bool:
        if request.command != "POST":
            return False
        request.send_response(200)
        request.send_header("Content-Type", "application/x-git-upload-pack-result")
        request.end_headers()
        deflate = zlib.compressobj(0)
        pack = b"PACK" + struct.pack(">II", 2, 1) + packed_header(3, 1 << 40)
        send = packet(b"packfile\n") + packet(b"\x01" + pack)
        try:
            while True:
                request.wfile.write(send)
                send = packet(b"\x01" + deflate.compress(os.urandom(32_000)))
        except OSError:
            return True

    author = trap.author()
    at = author.commit()
    trap.server.instead = lambda request: "hostile" in request.path and endless(request)
    word, message = await trap.springs(trap.url_of(author), at, trap.source_of(max_bytes=4 * MIB))
    assert word == "repository_too_large"
    assert "expected at most" in message or "over" in message


async def test_a_server_that_never_answers(trap: Trap) -> None:
    """It is given up at the time limit."""
    over = threading.Event()

    def silent(request: BaseHTTPRequestHandler) -> bool:
        return "hostile" in request.path and over.wait(50)

    author = trap.author()
    at = author.commit()
    trap.server.instead = silent
    word, message = await trap.springs(trap.url_of(author), at, trap.source_of(timeout=1))
    over.set()
    assert word == "git_timed_out"
    assert "within 1 s" in message


@pytest.mark.parametrize("to", ["file:///etc", "ext::sh -c true", "{good}"])
async def test_a_server_that_redirects(trap: Trap, to: str) -> None:
    """No redirect is followed: not to another scheme, and not to another repository."""

    def away(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(302)
        request.send_header("Location", to.format(good=trap.url_of(trap.good)) + "/info/refs")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return True

    author = trap.author()
    trap.server.instead = lambda request: "hostile" in request.path and away(request)
    word, message = await trap.springs(trap.url_of(author), trap.good_commit)
    assert word == "repository_moved"
    assert "302" in message
