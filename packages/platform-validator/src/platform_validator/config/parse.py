"""Settings' values as people write them: durations, sizes, lists, addresses. Each raises ValueError."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from platform_protocol import ss58
from platform_protocol.signing import BadUrl, audience_of

Parser = Callable[[Any], Any]
E = TypeVar("E", bound=Enum)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|sec|min|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+)\s*(B|K|KB|KiB|M|MB|MiB|G|GB|GiB)?", re.IGNORECASE)
_BYTES = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_PORTS = 65535
_DNS_PORT = 53
_NAME = 253
_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+", re.ASCII)


def text(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a string that is not empty")
    return value.strip()


def whole(least: int, most: int = 2**31 - 1) -> Parser:
    """An integer between two bounds, both included."""

    def parse(value: Any) -> int:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()) else value
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ValueError(f"expected an integer from {least} to {most}")
        return number

    return parse


def boolean(value: Any) -> bool:
    """True or false; in the environment also 1, 0, yes, no, on, off."""
    word = str(value).strip().lower()
    if isinstance(value, bool) or (isinstance(value, str) and word in _TRUE | _FALSE):
        return word in _TRUE
    raise ValueError("expected true or false")


def duration(value: Any) -> timedelta:
    """Such as `90s`, `10min`, `1h`; a bare number is seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return timedelta(seconds=value)
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected a duration such as 90s, 10min or 1h")
    return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])


def size(value: Any) -> int:
    """Bytes: such as `512M`, `10 MiB`; a bare number is bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected a size such as 512M or 10 MiB")
    return int(found[1]) * _BYTES[(found[2] or "")[:1].lower()]


def size_from(least: int) -> Parser:
    """A size of `least` bytes or more."""

    def parse(value: Any) -> int:
        found = size(value)
        if found < least:
            raise ValueError(f"expected at least {least // 1024**2}M")
        return found

    return parse


def choice(kind: type[E]) -> Parser:
    """One of an enumeration's values, exactly as written there."""

    def parse(value: Any) -> E:
        known = [str(one.value) for one in kind]
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return kind(value)

    return parse


def word(*known: str) -> Parser:
    """One of a few words."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return value

    return parse


def listing(item: Parser, most: int | None = None) -> Parser:
    """A list, of `most` at most; in the environment separated by commas."""

    def parse(value: Any) -> tuple[Any, ...]:
        parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if isinstance(parts, list) and most is not None and len(parts) > most:
            raise ValueError(f"expected at most {most}")
        if isinstance(parts, list):
            return tuple(item(part) for part in parts)
        raise ValueError("expected a list")

    return parse


def hotkey(value: Any) -> str:
    """An SS58 address with prefix 42."""
    try:
        ss58.decode(text(value))
    except ss58.BadAddress as error:
        raise ValueError(str(error)) from error
    return text(value)


def web_url(value: Any) -> str:
    """An http or https URL."""
    try:
        audience_of(text(value))
    except BadUrl as error:
        raise ValueError(str(error)) from error
    if not text(value).startswith(("http://", "https://")):
        raise ValueError("expected an http or https URL")
    return text(value).rstrip("/")


def vmm_url(value: Any) -> str:
    """An http or https URL, or unix:/path."""
    if text(value).startswith("unix:"):
        if not text(value).removeprefix("unix:").startswith("/"):
            raise ValueError("expected unix: and an absolute path")
        return text(value)
    return web_url(value)


def listen(value: Any) -> tuple[str, int]:
    """HOST:PORT."""
    host, _, port = text(value).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= _PORTS:
        raise ValueError("expected HOST:PORT")
    return host.strip("[]"), int(port)


def host_pattern(value: Any) -> str:
    """A lower-case host name, or `*.` and one: never an address, which no CVM is let out to."""
    if not isinstance(value, str) or not _HOST.fullmatch(value) or len(value) > _NAME:
        raise ValueError("expected a lower-case host name, such as api.example.com or *.example.com")
    if value.rpartition(".")[2].isdigit():
        raise ValueError("expected a host name, not an address")
    return value


def dns_server(value: Any) -> tuple[str, int]:
    """An address, or ADDRESS:PORT, an IPv6 address with a port in brackets."""
    given = text(value)
    host, colon, port = given.rpartition(":")
    try:
        if colon and (host.startswith("[") or ":" not in host):
            server, number = host.strip("[]"), int(port)
        else:
            server, number = given.strip("[]"), _DNS_PORT
        ipaddress.ip_address(server)
    except ValueError:
        raise ValueError(
            "expected an IP address, such as 9.9.9.9, 127.0.0.1:5353 or [2620:fe::fe]:53"
        ) from None
    if not 0 < number <= _PORTS:
        raise ValueError(f"expected a port from 1 to {_PORTS}")
    return server, number


def network(value: Any) -> str:
    """A network such as 198.51.100.0/24."""
    try:
        return str(ipaddress.ip_network(text(value)))
    except ValueError as error:
        raise ValueError("expected a network such as 198.51.100.0/24") from error


def port_range(value: Any) -> tuple[int, int]:
    """FIRST-LAST, both included."""
    first, _, last = text(value).partition("-")
    if not (first.strip().isdigit() and last.strip().isdigit()):
        raise ValueError("expected FIRST-LAST, such as 10000-19999")
    if not 1 <= int(first) <= int(last) <= _PORTS:
        raise ValueError("expected FIRST-LAST between 1 and 65535")
    return int(first), int(last)
