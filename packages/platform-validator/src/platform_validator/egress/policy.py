"""What a CVM may reach, and whether a request stays within it; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from platform_validator.egress.client_hello import Hello
from platform_validator.egress.refusals import Reason, Refused
from platform_validator.egress.target import Target, authority


@dataclass(frozen=True, slots=True)
class Grant:
    """Names, exact or `*.name` (every name below it, and not itself), and ports. Both empty: nothing."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]


def covers(pattern: str, host: str) -> bool:
    """Whether a name or pattern covers a name or pattern."""
    return pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def check_target(target: Target, grant: Grant) -> None:
    """Before anything is resolved: a name off the list costs no DNS query, so that none carries data out.

    Raises:
        Refused: HOST_NOT_ALLOWED or PORT_NOT_ALLOWED.
    """
    if not any(covers(pattern, target.host) for pattern in grant.hosts):
        raise Refused(Reason.HOST_NOT_ALLOWED, "the host is not one that this challenge may reach here")
    if target.port not in grant.ports:
        raise Refused(Reason.PORT_NOT_ALLOWED, "the port is not one that this challenge may reach here")


def check_hello(hello: Hello, target: Target) -> None:
    """What the ClientHello asks for must be what CONNECT named.

    Raises:
        Refused: ENCRYPTED_HELLO, NO_SNI or SNI_MISMATCH.
    """
    if hello.encrypted:
        raise Refused(Reason.ENCRYPTED_HELLO, "expected a ClientHello that hides no name (no ECH)")
    if hello.server_name is None:
        raise Refused(Reason.NO_SNI, "expected a ClientHello with a server name")
    if hello.server_name != target.host:
        raise Refused(Reason.SNI_MISMATCH, "expected the server name that CONNECT named")


def check_host_header(values: Sequence[bytes], target: Target) -> None:
    """Every request's Host is its target; one without (HTTP/1.0) gets it.

    Raises:
        Refused: HOST_MISMATCH.
    """
    for value in values:
        try:
            named = authority(value.decode("latin-1"), default_port=80)
        except Refused as error:
            raise Refused(Reason.HOST_MISMATCH, f"Host: {error}") from error
        if named != target:
            raise Refused(Reason.HOST_MISMATCH, "expected the Host of the request's target")
    if len(values) > 1:
        raise Refused(Reason.HOST_MISMATCH, "expected one Host")
