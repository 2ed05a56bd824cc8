"""Which resolved addresses a CVM may be connected to: those of the public internet that are not ours; pure.

`ipaddress` says what is global; this list adds what IPv6 hides an IPv4 address in, what clouds serve their
metadata on, and what is handed out as public and never is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import NamedTuple

from platform_validator.egress.refusals import Reason, Refused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NEVER: tuple[Network, ...] = tuple(
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata is 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host agent, at an address of the public range
        "169.254.0.0/16",  # link-local, with most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # IETF assignments; Oracle's metadata is 192.0.0.192
        "192.0.2.0/24",
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "2001::/23",  # IETF assignments: Teredo, ORCHID, benchmarking
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address inside
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",
        "3fff::/20",
        "5f00::/16",
    )
)
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that is assigned of IPv6. Mapped, NAT64, unique local, link-local and multicast lie outside."""
_ISATAP = (0x00005EFE, 0x02005EFE)
"""RFC 5214: the upper half of an interface id whose lower half is an IPv4 address."""
MOST = 16
"""Addresses of one name that are looked at."""


class Dialable(NamedTuple):
    """In the order in which they are tried."""

    addresses: tuple[Address, ...]


def is_public(address: Address, denied: Iterable[Network] = ()) -> bool:
    """Whether an address is one of the public internet, and in none of the operator's `denied` networks."""
    if isinstance(address, ipaddress.IPv6Address):
        hidden = int(address) >> 32 & 0xFFFFFFFF
        if address not in _UNICAST or hidden in _ISATAP or address.scope_id is not None:
            return False
    if not address.is_global or address.is_multicast:
        return False
    return not any(
        address.version == network.version and address in network for network in (*_NEVER, *denied)
    )


def dialable(
    found: Iterable[Address], *, is_own: Callable[[Address], bool], denied: Iterable[Network] = ()
) -> Dialable:
    """The addresses of a name that may be dialled. Of mixed answers, only the public ones.

    Args:
        found: What the name resolved to.
        is_own: Whether an address is one of this machine's.
        denied: The operator's.

    Raises:
        Refused: NAME_UNKNOWN, PRIVATE_ADDRESS or OWN_ADDRESS: none is left.
    """
    first = list(dict.fromkeys(found))[:MOST]
    if not first:
        raise Refused(Reason.NAME_UNKNOWN, "the name has no address")
    denied = tuple(denied)
    public = [each for each in first if is_public(each, denied)]
    if not public:
        raise Refused(Reason.PRIVATE_ADDRESS, "the name resolves to no public address")
    foreign = tuple(each for each in public if not is_own(each))
    if not foreign:
        raise Refused(Reason.OWN_ADDRESS, "the name resolves to this machine")
    return Dialable(foreign)
