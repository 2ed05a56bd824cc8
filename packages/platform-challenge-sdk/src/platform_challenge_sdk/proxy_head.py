"""The head of a submission's request to its proxy, read strictly and written anew. Pure."""

from __future__ import annotations

import re

from platform_challenge_sdk.means import Egress

MAX_HEAD = 16 * 1024
"""Bytes of a request's head, its last empty line included."""
_MAX_HEADERS = 100
_METHODS = {"CONNECT", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
"""TRACE is none of them: a proxy may answer it with the head that it was given."""
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})"
_CONNECT = re.compile(rf"({_HOST}):([1-9][0-9]{{0,4}})", re.ASCII)
_URL = re.compile(rf"http://({_HOST})(?::([1-9][0-9]{{0,4}}))?(?:[/?][\x21-\x7e]*)?", re.ASCII)
_REQUEST = re.compile(r"([A-Z]+) ([\x21-\x7e]+) HTTP/1\.[01]", re.ASCII)
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_OF_THE_HOP = {"proxy-authorization", "proxy-authenticate", "proxy-connection", "connection", "keep-alive"}


class HeadRefused(Exception):
    """The request is answered by the relay itself; `status` says how."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def rewrite_head(head: bytes, egress: Egress) -> bytes:
    """The head as the egress proxy gets it: with our credentials, and none of the submission's.

    Args:
        head: Up to and with the empty line.
        egress: The proxy that it goes to.

    Raises:
        HeadRefused: Not CONNECT host:port, nor an ordinary method with an http:// URL; another kind of
            message than HTTP/1; a host that is never asked for.
    """
    lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    request = _REQUEST.fullmatch(lines[0])
    if request is None:
        raise HeadRefused(400, "expected an HTTP/1 request to a proxy")
    method, target = request.groups()
    if method not in _METHODS:
        raise HeadRefused(405, f"expected one of {', '.join(sorted(_METHODS))}")
    found = (_CONNECT if method == "CONNECT" else _URL).fullmatch(target)
    if found is None:
        raise HeadRefused(400, "expected CONNECT host:port, or a method with http://host[:port]/path")
    if found.group(1).lower().rstrip(".") in egress.forbidden:
        raise HeadRefused(403, "this host is never reached from a submission")
    if len(lines) > _MAX_HEADERS:
        raise HeadRefused(431, f"expected at most {_MAX_HEADERS} headers")
    kept = [lines[0]]
    for line in lines[1:]:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise HeadRefused(400, "expected a header on each line")
        if header.group(1).lower() not in _OF_THE_HOP:
            kept.append(line)
    written = "\r\n".join(kept).encode("latin-1")
    return written + b"\r\nProxy-Authorization: " + egress.authorization + b"\r\n\r\n"


def own_answer(refused: HeadRefused) -> bytes:
    """What the relay answers by itself."""
    words = {400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed", 408: "Request Timeout"}
    words |= {431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable"}
    body = f"{refused}\n"
    head = f"HTTP/1.1 {refused.status} {words[refused.status]}\r\nContent-Type: text/plain\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode(
        "latin-1", "replace"
    )
