"""The session with a CVM: whom it refuses, what ends it, and whom its end reaches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from ports import free_port
from session_pair import (
    SECRET,
    VM,
    MakePair,
    gated,
    lost,
    session_pairs,
)
from waiting import until

from platform_protocol.ids import Hotkey
from platform_protocol.session.messages import (
    ValuesGet,
)
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import (
    AttestationRefused,
    AttestationUnavailable,
    SessionLost,
    SessionRefused,
)


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    async with session_pairs() as make:
        yield make


async def test_a_guest_that_does_not_know_the_launch_secret_is_refused_at_once(make_pair: MakePair) -> None:
    """4403: dialling again would change nothing."""
    pair = await make_pair(secret=b"x" * 32, pace=SessionPace(resume_for=60))
    with pytest.raises(SessionRefused, match="launch secret"):
        await pair.ready()


async def test_nothing_goes_into_a_guest_that_the_policy_refused(make_pair: MakePair) -> None:
    """No environment, no job, no submission."""
    pair = await make_pair()
    pair.verdict = AttestationRefused("compose_hash", "another one")
    with pytest.raises(AttestationRefused):
        await pair.ready()
    assert "compose_hash" in str(await lost(pair))
    assert (pair.guest.configured, pair.guest.orders) == ([], [])


async def test_the_policy_judges_every_resume(make_pair: MakePair) -> None:
    """A guest that was fine once is not fine for ever."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.verdict = AttestationRefused("instance_id", "another one")
        pair.guest.drop()
    assert isinstance(job.result(), AttestationRefused)


async def test_collateral_that_is_away_for_a_moment_loses_no_running_job(make_pair: MakePair) -> None:
    """At a resume it is judged again until it can be; at the first handshake it is the end."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate), pace=SessionPace(resume_for=5, retry=0.01, retry_most=0.02))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.verdict = AttestationUnavailable("the collateral service is down")
        pair.guest.drop()
        await until(lambda: len(pair.judged) >= 3)
        pair.verdict = None
        gate.set()
    assert job.result().error is None
    first = await make_pair()
    first.verdict = AttestationUnavailable("the collateral service is down")
    with pytest.raises(AttestationUnavailable):
        await first.ready()


async def test_a_rebooted_guest_is_lost(make_pair: MakePair) -> None:
    """It does not know the session: the job does not silently begin again."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.guest.reboot()
    assert "rebooted" in str(job.result())
    assert len(pair.guest.orders) == 1


async def test_a_guest_that_cannot_be_reached_is_lost_in_time(make_pair: MakePair) -> None:
    """Dialled until `resume_for`, then given up."""
    pair = await make_pair(pace=SessionPace(dial=0.1, resume_for=0.1, retry=0.01, retry_most=0.02))
    pair.session._callee = Callee(("127.0.0.1", free_port()), VM, SECRET, "s", Hotkey("5DD"))
    with pytest.raises(SessionLost, match="cannot be reached"):
        await pair.ready()


async def test_a_fault_over_one_guest_ends_its_session_alone(make_pair: MakePair) -> None:
    """`run` never raises: the fleet's other sessions go on."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    pair.values.error = RuntimeError("a bug")
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        await pair.guest.say(ValuesGet(request_id="r", key="k"))
    assert isinstance(job.result(), SessionLost)
    await pair.running


async def test_a_closed_session_ends_whoever_waits(make_pair: MakePair) -> None:
    """The CVM is about to be destroyed."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.session.close()
    assert "closed" in str(job.result())


async def test_a_session_whose_task_is_cancelled_ends_whoever_waits(make_pair: MakePair) -> None:
    """Nobody waits for ever for a loop that is gone."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.running.cancel()
    assert "has ended" in str(job.result())
