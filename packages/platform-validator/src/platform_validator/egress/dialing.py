"""Connects to an address that was decided; the name is not looked at again."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address

from platform_validator.egress.addresses import Address
from platform_validator.egress.refusals import Reason, Refused

CONNECT_WITHIN = 10.0
_EACH = 4.0
_TRIES = 4
LIMIT = 64 * 1024

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def is_own(address: Address) -> bool:
    """Whether an address is one of this machine's: only to those can a socket be bound.

    Where the kernel lets any address be bound (ip_nonlocal_bind), all are taken for ours: nothing goes out.
    """
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
    return True


async def connect(address: Address, port: int) -> Stream:
    """Open a TCP connection to exactly this address. Raises OSError."""
    return await asyncio.open_connection(str(address), port, limit=LIMIT)


async def dial(addresses: Sequence[Address], port: int) -> Stream:
    """Connect to the first of the addresses that answers.

    Raises:
        Refused: UNREACHABLE: none did in ten seconds.
    """
    try:
        async with asyncio.timeout(CONNECT_WITHIN):
            for address in addresses[:_TRIES]:
                try:
                    async with asyncio.timeout(_EACH):
                        return await connect(address, port)
                except (OSError, TimeoutError):
                    continue
    except TimeoutError:
        pass
    raise Refused(Reason.UNREACHABLE, "no address of the host could be connected to")
