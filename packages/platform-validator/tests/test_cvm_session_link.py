"""A session over several connections: what a break costs, and which connections are cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from session_pair import (
    MakePair,
    gated,
    session_pairs,
)

from platform_protocol.ids import JobId
from platform_validator.cvm.connection import SessionPace


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    async with session_pairs() as make:
        yield make


async def test_a_dropped_connection_is_resumed_and_the_job_goes_on(make_pair: MakePair) -> None:
    """The same session, a whole new handshake, configured once, ordered once."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.guest.drop()
        await pair.guest.until(lambda guest: guest.connections == 2)
        gate.set()
    assert job.result().result == {"score": 1.0}
    assert (len(pair.guest.orders), len(pair.guest.configured)) == (1, 1)
    assert len(pair.judged) == 2
    assert pair.judged[0].report_data != pair.judged[1].report_data
    assert pair.told.count("started") == 1


async def test_a_result_that_was_not_acknowledged_comes_again_and_counts_once(make_pair: MakePair) -> None:
    """Acknowledged is what the caller has stored, and nothing before."""
    pair = await make_pair()
    await pair.ready()
    result = await pair.execute()
    assert pair.guest.pending == 1
    pair.guest.drop()
    await pair.guest.until(lambda guest: guest.connections == 2)
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)


async def test_an_acknowledgement_made_while_disconnected_is_sent_after_the_resume(
    make_pair: MakePair,
) -> None:
    """It is not lost, and costs the new connection no number."""
    pair = await make_pair()
    await pair.ready()
    result = await pair.execute()
    pair.guest.drop()
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)
    assert (await pair.execute(job=JobId("another"))).result is not None


async def test_three_unanswered_pings_mean_reconnect(make_pair: MakePair) -> None:
    """A connection that is silently dead is resumed."""
    gate = asyncio.Event()
    script = gated(gate)
    pair = await make_pair(script, pace=SessionPace(ping=0.02, resume_for=2, retry=0.01))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        script.answers_pings = False
        await pair.guest.until(lambda guest: guest.connections == 2)
        script.answers_pings = True
        gate.set()
    assert job.result().error is None


@pytest.mark.parametrize(("frames", "age"), [(8, 3600.0), (2**31, 0.05)])
async def test_keys_are_replaced_by_a_resume_in_the_middle_of_a_job(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, frames: int, age: float
) -> None:
    """After so many frames, or so long; the job is ordered once, and its result comes once."""
    monkeypatch.setattr("platform_validator.cvm.session_link._REKEY_FRAMES", frames)
    gate = asyncio.Event()
    pair = await make_pair(gated(gate), pace=SessionPace(ping=0.02, resume_for=5, retry=0.01, rekey=age))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: guest.connections >= 3 and len(guest.orders) == 1)
        gate.set()
    assert job.result().error is None
    assert len({offer.report_data for offer in pair.judged}) == len(pair.judged) >= 3
    assert len(pair.guest.orders) == 1
