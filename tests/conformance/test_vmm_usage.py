"""What CVMs use, read from their guest agents, by dstack's double."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from tests.conformance.house import PATIENCE, VERSIONS, MakeHouse
from tests.dstack_double import Fault
from tests.dstack_double.guest import DISK_USED, RECEIVED, SENT, USED

each_version = pytest.mark.parametrize("version", VERSIONS)


@each_version
async def test_what_a_cvm_uses_is_read_from_its_guest_agent(make: MakeHouse, version: str) -> None:
    """A disk counts once, and so does what goes through docker's bridge; dstack counts no CPU time."""
    async with make(version, sample_every=timedelta(seconds=5)) as one:
        cvm = await one.boot()
        used = await one.fleet.usage(cvm.name)
        assert used is not None
        assert (used.memory_bytes, used.disk_bytes, used.network_bytes) == (USED, DISK_USED, RECEIVED + SENT)
        assert (used.cpu_time_ms, used.cpu_percent) == (None, None)
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


@each_version
@pytest.mark.parametrize(
    "fault",
    [
        Fault(silent=True),
        Fault(cut=True),
        Fault(error="guest agent is not reachable"),
        Fault(status=200, body="[" * 100_000),
        Fault(status=200, body=" " * 300_000),
    ],
)
async def test_a_guest_agent_that_cannot_be_asked_ends_nothing(
    make: MakeHouse, version: str, fault: Fault
) -> None:
    """Silent, cut off, away, nonsense or too much: not known, within a moment, and the CVM goes on."""
    async with make(version, sample_every=timedelta(seconds=5)) as one:
        one.double.faults.always("SysInfo", fault)
        cvm = await one.boot()
        async with asyncio.timeout(PATIENCE):
            assert await one.fleet.usage(cvm.name) is None
        await cvm.session.confirm()
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()
