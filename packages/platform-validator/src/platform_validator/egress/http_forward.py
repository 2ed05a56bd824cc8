"""One HTTP request to an allowed host and its answer back: read whole, written anew, never passed as it came.

Both sides are spoken to through h11, so that what one reads as the end of a message is what the other does
(no request smuggling); a connection carries one request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11

from platform_validator.egress.refusals import Reason, Refused

MAX_HEAD = 32 * 1024
"""Bytes of a request's or an answer's head."""
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"http2-settings",
    }
)

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a Proxy-Authorization names."""

    vm: str
    password: str


def credentials(headers: Headers) -> Credentials | None:
    """`Basic <base64 of vm:password>`, given once and well formed, or None."""
    values = [value for name, value in headers if name == b"proxy-authorization"]
    if len(values) != 1:
        return None
    scheme, _, encoded = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        vm, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("ascii").partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return Credentials(vm, password) if colon else None


def values_of(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a header (lower case)."""
    return [value for each, value in headers if each == name]


def onward(request: h11.Request, *, path: str, host: str) -> h11.Request:
    """The request as the host gets it: its Host, nothing of the hop before, and the end of the connection.

    Raises:
        Refused: BAD_REQUEST: its length can be read in two ways.
    """
    framing = values_of(request.headers, b"transfer-encoding"), values_of(request.headers, b"content-length")
    if (framing[0] and framing[1]) or len(framing[0]) > 1 or (framing[0] and request.http_version < b"1.1"):
        raise Refused(Reason.BAD_REQUEST, "expected either Content-Length or Transfer-Encoding")
    headers = [(b"Host", host.encode()), *_end_to_end(request.headers, without={b"host"})]
    if framing[0]:
        headers.append((b"Transfer-Encoding", b"chunked"))
    return h11.Request(
        method=request.method, target=path.encode(), headers=[*headers, (b"Connection", b"close")]
    )


def backward(response: h11.Response) -> h11.Response:
    """The answer as the guest gets it."""
    headers = [*_end_to_end(response.headers, without=set()), (b"Connection", b"close")]
    return h11.Response(status_code=response.status_code, reason=response.reason, headers=headers)


def answer(status: int, reason: Reason, message: str) -> bytes:
    """The proxy's own answer: why, as a word in a header and a sentence in the body."""
    body = f"{reason.value}: {message}\n".encode()
    words = {
        400: "Bad Request",
        403: "Forbidden",
        407: "Proxy Authentication Required",
        408: "Request Timeout",
        429: "Too Many Requests",
        502: "Bad Gateway",
    }
    lines = [
        f"HTTP/1.1 {status} {words[status]}",
        f"Content-Length: {len(body)}",
        "Content-Type: text/plain",
        "Connection: close",
        f"X-Egress-Refused: {reason.value}",
    ]
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:  # RFC 9110 15.5.8: it names the scheme
        lines.append('Proxy-Authenticate: Basic realm="egress"')
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _end_to_end(headers: Headers, *, without: set[bytes]) -> list[tuple[bytes, bytes]]:
    named = {one.strip().lower() for value in values_of(headers, b"connection") for one in value.split(b",")}
    dropped = _HOP_BY_HOP | without | (named - {b"content-length", b"host"})
    return [(name, value) for name, value in headers if name not in dropped]
