"""Host ports: one CVM each, round and round."""

from __future__ import annotations

import pytest

from platform_validator.cvm.host_ports import HostPorts, NoHostPort


def test_each_port_goes_to_one_cvm() -> None:
    """Until the range is used up; the error names the setting."""
    ports = HostPorts(10, 12)
    assert [ports.take() for _ in range(3)] == [10, 11, 12]
    with pytest.raises(NoHostPort, match="port_range"):
        ports.take()


def test_a_port_that_came_back_is_used_last() -> None:
    """A closing socket has time to go."""
    ports = HostPorts(10, 12)
    ports.give_back(ports.take())
    assert [ports.take() for _ in range(3)] == [11, 12, 10]


def test_ports_from_before_a_restart_are_held() -> None:
    """And come back as the others."""
    ports = HostPorts(10, 11)
    ports.hold(10)
    assert ports.take() == 11
    ports.give_back(10)
    assert ports.take() == 10


def test_a_held_port_outside_the_range_does_no_harm() -> None:
    """The operator changed the range while a CVM of the old one was there."""
    ports = HostPorts(10, 10)
    ports.hold(99)
    assert ports.take() == 10
