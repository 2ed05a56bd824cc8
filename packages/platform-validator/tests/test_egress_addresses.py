"""The egress proxy's decisions: which addresses are dialled."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.egress.addresses import dialable, is_public
from platform_validator.egress.refusals import Reason, Refused


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "169.254.169.254",
        "168.63.129.16", "172.16.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1",
        "100::1", "2001::1", "2001:0:4136:e378::1", "2001:db8::1", "2002:7f00:1::1", "3fff::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "2a00:1450::5efe:7f00:1",
        "2a00:1450::200:5efe:a00:1", "fe80::1%eth0",
    ],
)  # fmt: skip
def test_no_address_that_is_not_of_the_public_internet_is_dialled(address: str) -> None:
    """Nor one that hides such a one: mapped, compatible, NAT64, 6to4, Teredo, ISATAP."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_are(address: str) -> None:
    """Unless the operator denies their network."""
    found = ipaddress.ip_address(address)
    assert is_public(found)
    assert not is_public(found, [ipaddress.ip_network(f"{address}/{16}", strict=False)])


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_dialled_only_if_it_is_global(address: ipaddress.IPv4Address) -> None:
    """And never in the form of an IPv6 one."""
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
    assert not is_public(ipaddress.IPv6Address(f"::ffff:{address}"))
    assert not is_public(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80)))


def test_of_many_answers_the_public_foreign_ones_are_kept() -> None:
    """In their order, each once; what remains of nothing is refused with a word of its own."""

    def of(*texts: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        return [ipaddress.ip_address(text) for text in texts]

    ours = of("9.9.9.9")
    found = dialable(of("10.0.0.1", "8.8.8.8", "9.9.9.9", "8.8.8.8", "1.1.1.1"), is_own=ours.__contains__)
    assert list(found.addresses) == of("8.8.8.8", "1.1.1.1")
    for addresses, reason in (
        ([], Reason.NAME_UNKNOWN),
        (of("10.0.0.1", "::1"), Reason.PRIVATE_ADDRESS),
        (of("9.9.9.9"), Reason.OWN_ADDRESS),
    ):
        with pytest.raises(Refused) as error:
            dialable(addresses, is_own=ours.__contains__)
        assert error.value.reason is reason
