"""The egress proxy's decisions: which name a ClientHello asks for."""

from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.egress.client_hello import MAX_HELLO, Hello, HelloReader
from platform_validator.egress.refusals import Reason, Refused


def a_hello(server_name: str | None = "api.example.com") -> bytes:
    """What a real TLS client sends first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def in_records(message: bytes, size: int) -> bytes:
    """The same message in records of at most so many bytes."""
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in parts)


def made_hello(extensions: bytes, *, suites: bytes = b"\x13\x01", compression: bytes = b"\0") -> bytes:
    """A hello with these extensions, in one record."""
    body = b"\x03\x03" + bytes(32) + b"\0" + len(suites).to_bytes(2) + suites
    body += len(compression).to_bytes(1) + compression + extensions
    return in_records(b"\x01" + len(body).to_bytes(3) + body, 16384)


def extension(kind: int, data: bytes) -> bytes:
    """One of them."""
    return kind.to_bytes(2) + len(data).to_bytes(2) + data


def all_of(*extensions: bytes) -> bytes:
    """The vector of them."""
    joined = b"".join(extensions)
    return len(joined).to_bytes(2) + joined


def names(*entries: tuple[int, bytes]) -> bytes:
    """A server_name extension."""
    joined = b"".join(kind.to_bytes(1) + len(name).to_bytes(2) + name for kind, name in entries)
    return extension(0, len(joined).to_bytes(2) + joined)


NAME = (0, b"API.example.com")


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_real_hello_is_read_however_it_is_cut(record: int, piece: int) -> None:
    """Over records and over TCP segments, the name comes out when the last byte of it is there."""
    data = in_records(HELLO[5:], record)
    reader = HelloReader()
    found = [reader.feed(data[at : at + piece]) for at in range(0, len(data), piece)]
    assert found[:-1] == [None] * (len(found) - 1)
    assert found[-1] == Hello("api.example.com", encrypted=False)


HELLO = a_hello()


def test_hellos_without_a_name_and_with_a_hidden_one() -> None:
    """No extensions, none of that kind, ECH and its draft."""
    assert HelloReader().feed(made_hello(b"")) == Hello(None, encrypted=False)
    assert HelloReader().feed(made_hello(all_of(extension(10, b"x")))) == Hello(None, encrypted=False)
    for kind in (0xFE0D, 0xFFCE):
        hello = made_hello(all_of(names(NAME), extension(kind, b"x")))
        assert HelloReader().feed(hello) == Hello("api.example.com", encrypted=True)


@pytest.mark.parametrize(
    "data",
    [
        made_hello(all_of(names(NAME, (0, b"other.example")))),
        made_hello(all_of(names(NAME), names((0, b"other.example")))),
        made_hello(all_of(names((1, b"api.example.com")))),
        made_hello(all_of(names((0, b"")))),
        made_hello(all_of(names((0, b"\xff")))),
        made_hello(all_of(extension(0, b""))),
        made_hello(all_of(extension(0, b"\0\0"))),
        made_hello(all_of(names(NAME)) + b"x"),
        made_hello(b"\0"),
        made_hello(b"\0\1"),
        made_hello(b"", suites=b""),
        made_hello(b"", suites=b"\x13"),
        made_hello(b"", compression=b""),
        HELLO[:5] + b"\x02" + HELLO[6:],
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        in_records(HELLO[5:] + b"more", 16384),
        in_records(b"\x01\xff\xff\xff", 4),
        HELLO[:5] + HELLO[5:9] + b"\x02" + HELLO[10:],
        in_records(HELLO[5:], 8)[:13] + b"\x17\x03\x03\x00\x01x",
        in_records(b"\x01\x00\xff\xff" + bytes(0xFFFF), 1),
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
def test_a_hello_of_two_readings_or_none_is_refused(data: bytes) -> None:
    """Two names, another kind of name, lengths that do not add up, something between its records."""
    with pytest.raises(Refused) as error:
        HelloReader().feed(data)
    assert error.value.reason is Reason.BAD_HELLO


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x80\x2e\x01", b"\x15\x03\x01\x00\x02\x02\x28", b"\x16\x02\x01"]
)
def test_what_is_no_tls_is_seen_at_its_first_bytes(data: bytes) -> None:
    """HTTP, SSL 2, an alert."""
    with pytest.raises(Refused) as error:
        HelloReader().feed(data)
    assert error.value.reason is Reason.NOT_TLS


@given(st.lists(st.binary(max_size=64), max_size=8), st.integers(0, len(HELLO)), st.binary(max_size=4))
def test_whatever_comes_is_a_hello_more_or_refused(pieces: list[bytes], at: int, put: bytes) -> None:
    """Nothing else is raised, by noise or by a hello with something put into it."""
    for data in ([*pieces], [HELLO[:at] + put + HELLO[at + len(put) :]]):
        reader = HelloReader()
        with suppress(Refused):
            for piece in data:
                found = reader.feed(piece)
                assert found is None or isinstance(found, Hello)
    assert len(HELLO) < MAX_HELLO
