"""What a request wants to reach: a name and a port, in one spelling only; pure.

Two programs that read one spelling differently are how a check is passed by: whatever is not plainly a host
name and a decimal port is refused, and so is every way to write an address instead of a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from platform_validator.egress.refusals import Reason, Refused

MAX_NAME = 253
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})+", re.IGNORECASE | re.ASCII)
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_MAX_PORT = 65535
# The WHATWG URL standard's "ends in a number": what a C library's inet_aton would take for an address.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE | re.ASCII)
_PATH = re.compile(r"[\x21-\x7e]*", re.ASCII)
_HTTP_PORT = 80


@dataclass(frozen=True, slots=True)
class Target:
    """A name in lower case, without a dot at its end, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def authority(text: str, *, default_port: int | None = None) -> Target:
    """Read `host:port`. Without `default_port` the port must be there.

    Raises:
        Refused: BAD_TARGET, or RAW_ADDRESS for an address in any spelling.
    """
    if "@" in text:
        raise Refused(Reason.BAD_TARGET, "expected host:port without user information")
    if text.startswith("["):
        raise Refused(Reason.RAW_ADDRESS, "expected a host name, got an IPv6 address")
    host, colon, port = text.partition(":")
    if not colon and default_port is not None:
        number = default_port
    elif _PORT.fullmatch(port) and int(port) <= _MAX_PORT:
        number = int(port)
    else:
        if port.count(":"):
            raise Refused(Reason.RAW_ADDRESS, "expected host:port, got what looks like an IPv6 address")
        raise Refused(Reason.BAD_TARGET, "expected host:port with a decimal port from 1 to 65535")
    return Target(_name(host), number)


def absolute_url(text: str) -> tuple[Target, str]:
    """Read `http://host[:port][/path][?query]` to what it names, and the path to ask for there.

    Raises:
        Refused: As `authority`.
    """
    scheme, mark, rest = text.partition("://")
    if not mark or scheme.lower() != "http":
        raise Refused(Reason.BAD_TARGET, "expected an http:// URL, or CONNECT host:port for TLS")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    path = rest[end:]
    if "#" in path or not _PATH.fullmatch(path):
        raise Refused(Reason.BAD_TARGET, "expected a path of printable ASCII without a fragment")
    return authority(rest[:end], default_port=_HTTP_PORT), path if path.startswith("/") else f"/{path}"


def is_address(host: str) -> bool:
    """Whether the last label is a number: such a name is an address to some program or other."""
    return _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]) is not None


def _name(host: str) -> str:
    if is_address(host):
        raise Refused(Reason.RAW_ADDRESS, "expected a host name, got an address")
    if len(host) > MAX_NAME or not _NAME.fullmatch(host):
        raise Refused(
            Reason.BAD_TARGET,
            "expected a host name of ASCII letters, digits and hyphens, with a dot and none at its end",
        )
    return host.lower()
