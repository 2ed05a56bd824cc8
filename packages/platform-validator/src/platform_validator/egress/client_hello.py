"""The server name that a TLS ClientHello asks for (RFC 8446 4.1.2, RFC 6066 3), read as it arrives; pure."""

from __future__ import annotations

from dataclasses import dataclass

from platform_validator.egress.refusals import Reason, Refused

MAX_HELLO = 64 * 1024
"""Bytes on the wire until the hello must be complete; a post-quantum one has about 2 KiB."""

_HANDSHAKE, _CLIENT_HELLO = 22, 1
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4
_MAX_RECORD = 16384
_MAX_SESSION_ID = 32
_MAJOR = 3
_SERVER_NAME = 0
_ENCRYPTED = frozenset({0xFE0D, 0xFFCE})
"""encrypted_client_hello (RFC 9849) and the encrypted_server_name of its drafts."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`server_name` in lower case, None without one. `encrypted`: another name may be hidden in it."""

    server_name: str | None
    encrypted: bool


class HelloReader:
    """Takes bytes as they come, however they are cut, and says when the hello is whole.

    Each byte is looked at once: one that sends its hello in pieces of one byte costs no more than others.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._raw = bytearray()
        self._message = bytearray()

    def feed(self, data: bytes) -> Hello | None:
        """The hello, or None while it is not whole.

        Raises:
            Refused: NOT_TLS: what came is no TLS record; BAD_HELLO: it is no ClientHello of one reading.
        """
        self._seen += len(data)
        self._raw += data
        at = 0
        while (size := self._record_at(at)) is not None:
            self._message += self._raw[at + _RECORD_HEADER : at + _RECORD_HEADER + size]
            at += _RECORD_HEADER + size
            if (found := self._hello()) is not None:
                return found
        del self._raw[:at]
        if self._seen > MAX_HELLO:
            raise _bad(f"expected a ClientHello of at most {MAX_HELLO} bytes")
        return None

    def _record_at(self, at: int) -> int | None:
        """The size of the whole handshake record that begins there, None while it is not whole."""
        head = bytes(self._raw[at : at + _RECORD_HEADER])
        if head[:1] not in {b"", bytes([_HANDSHAKE])} or head[1:2] not in {b"", bytes([_MAJOR])}:
            if self._message:
                raise _bad("expected the ClientHello's records one after the other")
            raise Refused(Reason.NOT_TLS, "expected a TLS handshake")
        if len(head) < _RECORD_HEADER:
            return None
        size = int.from_bytes(head[3:5])
        if not 0 < size <= _MAX_RECORD:
            raise _bad(f"expected records of 1 to {_MAX_RECORD} bytes")
        return size if len(self._raw) >= at + _RECORD_HEADER + size else None

    def _hello(self) -> Hello | None:
        if self._message[0] != _CLIENT_HELLO:
            raise _bad("expected a ClientHello first")
        if len(self._message) < _MESSAGE_HEADER:
            return None
        size = int.from_bytes(self._message[1:4])
        if size > MAX_HELLO:
            raise _bad(f"expected a ClientHello of at most {MAX_HELLO} bytes")
        if len(self._message) < _MESSAGE_HEADER + size:
            return None
        if len(self._message) > _MESSAGE_HEADER + size:
            raise _bad("expected nothing behind the ClientHello")
        return _read(bytes(self._message[_MESSAGE_HEADER:]))


class _Bytes:
    """Reads one vector after the other; whatever is too short is refused."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise _bad("expected more bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, length_bytes: int) -> bytes:
        return self.take(self.number(length_bytes))

    @property
    def rest(self) -> int:
        return len(self._data) - self._at


def _read(body: bytes) -> Hello:
    data = _Bytes(body)
    if data.take(2)[0] != _MAJOR:
        raise _bad("expected TLS")
    data.take(32)
    if len(data.vector(1)) > _MAX_SESSION_ID:
        raise _bad("expected a session id of at most 32 bytes")
    suites, compressions = data.vector(2), data.vector(1)
    if not suites or len(suites) % 2 or not compressions:
        raise _bad("expected cipher suites and compression methods")
    extensions = _extensions(data)
    name = None
    if _SERVER_NAME in extensions:
        name = _server_name(extensions[_SERVER_NAME])
    return Hello(name, encrypted=not _ENCRYPTED.isdisjoint(extensions))


def _extensions(data: _Bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    if not data.rest:
        return found
    inner = _Bytes(data.vector(2))
    if data.rest:
        raise _bad("expected nothing behind the extensions")
    while inner.rest:
        kind = inner.number(2)
        if kind in found:
            raise _bad("expected each extension once")
        found[kind] = inner.vector(2)
    return found


def _server_name(extension: bytes) -> str:
    outer = _Bytes(extension)
    names = _Bytes(outer.vector(2))
    kind, name = names.number(1), names.vector(2)
    if outer.rest or names.rest or kind != 0 or not name:
        raise _bad("expected exactly one host name")
    try:
        return name.decode("ascii").lower()
    except UnicodeDecodeError as error:
        raise _bad("expected a host name of ASCII") from error


def _bad(message: str) -> Refused:
    return Refused(Reason.BAD_HELLO, f"ClientHello: {message}")
