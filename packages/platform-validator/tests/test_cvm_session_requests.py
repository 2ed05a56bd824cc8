"""What a session's ends ask of each other: values, weights, and how much of it at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from session_pair import (
    MakePair,
    session_pairs,
)
from waiting import until

from platform_protocol.session.messages import (
    JobExecute,
    ValuesGet,
    ValuesResult,
    ValuesSet,
)
from platform_validator.cvm.testing_guest import GuestScript, Outcome, ScriptedGuest


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    async with session_pairs() as make:
        yield make


async def test_a_values_request_is_answered_though_its_connection_broke(make_pair: MakePair) -> None:
    """Asked over one connection, answered over the next; applied once."""
    answers: list[ValuesResult] = []

    async def work(guest: ScriptedGuest, _order: JobExecute, _submission: bytes) -> Outcome:
        answers.append(await guest.ask(ValuesGet(request_id="r1", key="k")))
        return {}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    pair.values.gate.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(pair.execute())
        await until(lambda: pair.values.asked)
        pair.guest.drop()
        await pair.guest.until(lambda guest: guest.connections == 2)
        pair.values.gate.set()
    assert [answer.value for answer in answers] == [1]
    assert pair.values.asked == ["r1"]


async def test_an_answer_that_was_lost_on_its_way_is_sent_again(make_pair: MakePair) -> None:
    """It left, the connection broke before it arrived: the resume brings it."""
    pair = await make_pair()
    await pair.ready()
    await pair.guest.ask(ValuesSet(request_id="r1", key="k", value=1))
    pair.guest._asked["r1"] = waiting = asyncio.get_running_loop().create_future()
    pair.guest.drop()
    async with asyncio.timeout(5):
        assert (await waiting).request_id == "r1"
    assert pair.values.asked == ["r1"]


async def test_a_guest_that_asks_faster_than_it_is_answered_has_to_wait(make_pair: MakePair) -> None:
    """No more than 64 requests are held; the rest stays with the guest, and is answered later."""
    pair = await make_pair()
    await pair.ready()
    pair.values.gate.clear()
    asked = [
        asyncio.create_task(pair.guest.ask(ValuesGet(seq=0, request_id=f"r{number}", key="k")))
        for number in range(200)
    ]
    await until(lambda: len(pair.values.asked) >= 64)
    for _ in range(500):
        await asyncio.sleep(0)  # a turn of the loop, in which it could take more
    held = len(pair.values.asked)
    pair.values.gate.set()
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*asked)
    assert held == 64
    assert {answer.request_id for answer in answers} == {f"r{number}" for number in range(200)}


async def test_weights_are_asked_for_and_answered(make_pair: MakePair) -> None:
    """Over a dropped connection too."""
    pair = await make_pair(GuestScript(weights={"5A": 0.75}))
    await pair.ready()
    assert await pair.session.weights([{"score": 1.0}]) == {"5A": 0.75}
