"""Large guest messages: read in a process of their own, judged alike, and nobody waits for them (I4)."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from platform_protocol.ids import JobId, LeaseToken
from platform_protocol.session.errors import MessageInvalid
from platform_validator.clock import SystemClock
from platform_validator.cvm.reading import LARGE, condense, read_message
from platform_validator.jobs.lease import LeaseRules, ThreadRenewer
from platform_validator.jobs.result import judge
from platform_validator.scoring import ScoringRule

SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
RESULTS = st.fixed_dictionaries(
    {},
    optional={
        "score": SCALARS | VALUES,
        "metrics": VALUES | st.dictionaries(st.text(max_size=5), st.floats() | VALUES, max_size=5),
        "logs": VALUES | st.lists(VALUES, max_size=5),
        "more": VALUES,
    },
)


def message(**result: Any) -> bytes:
    """A `job_result`, as the SDK sends it."""
    return json.dumps({"type": "job_result", "seq": 3, "job_id": "job", "result": result}).encode()


def children() -> list[str]:
    """Processes that this one has started and that are still there."""
    return Path("/proc/thread-self/children").read_text().split()


@given(RESULTS)
def test_what_is_kept_of_a_large_result_is_judged_like_the_whole(result: dict[str, Any]) -> None:
    """What is kept of a large result is judged like the whole: the same outcome, score and metrics."""
    read = condense({"type": "job_result", "seq": 1, "job_id": "job", "result": result})
    assert read.result_bytes is not None
    rule = ScoringRule()
    whole = judge(result, None, max_bytes=10**9, rule=rule)
    part = judge(read.value["result"], None, max_bytes=10**9, rule=rule, size=read.result_bytes)
    if whole.error is not None and "invalid_result" in whole.error and part.error is None:
        # Only what is left out can make a result invalid that is else in order: numbers beyond RFC 8785.
        assert "more" in result or "logs" in result
        return
    assert (part.outcome, part.score, part.metrics) == (whole.outcome, whole.score, whole.metrics)


def test_the_size_of_a_large_result_counts_against_the_challenge_s_limit() -> None:
    """The size of a large result counts against the challenge's limit."""
    read = condense({"type": "job_result", "result": {"score": 1.0, "more": "x" * 2000}})
    finding = judge(read.value["result"], None, max_bytes=1024, rule=ScoringRule(), size=read.result_bytes)
    assert finding.error is not None
    assert finding.error.startswith("result_too_large: 20")


async def test_a_large_result_comes_back_as_what_is_used_of_it() -> None:
    """A large result comes back as what is used of it; its length is told."""
    text = message(score=0.5, metrics={"a": 1}, logs=["said"], more="x" * LARGE)
    read = await read_message(text)
    assert read.value == {
        "type": "job_result",
        "seq": 3,
        "job_id": "job",
        "result": {"score": 0.5, "metrics": {"a": 1}, "logs": ["said"]},
    }
    assert read.result_bytes is not None
    assert LARGE < read.result_bytes < len(text)


async def test_a_small_message_is_read_here_and_whole() -> None:
    """A small message is read here and whole."""
    read = await read_message(message(score=0.5, more=[1, 2]))
    assert read.value["result"] == {"score": 0.5, "more": [1, 2]}
    assert read.result_bytes is None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * LARGE,
        b"x" * LARGE,
        json.dumps({"type": "log", "message": "x" * LARGE}).encode(),
        json.dumps(["x" * LARGE]).encode(),
        message(more="x" * LARGE)[:-1],
    ],
    ids=["nested", "no-json", "another-type", "no-object", "cut-short"],
)
async def test_a_large_message_that_is_no_result_is_refused(text: bytes) -> None:
    """A large message that is no result is refused, and no process stays."""
    before = children()
    with pytest.raises(MessageInvalid):
        await read_message(text)
    assert children() == before


async def test_the_process_goes_with_whoever_waited_for_it() -> None:
    """The process goes with whoever waited for it."""
    before = children()
    reading = asyncio.ensure_future(read_message(message(more=[{}] * 5_000_000)))
    await until(lambda: children() != before)
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
    assert children() == before


@pytest.mark.slow("parses 60 MB that take seconds")
@pytest.mark.robustness(4, "renewals")
async def test_renewal_and_the_loop_go_on_while_a_huge_result_is_parsed() -> None:
    """I4: leases are renewed in time, and the event loop turns, while 60 MB of the worst JSON are parsed."""
    text = message(score=1.0, more=[{}] * 15_000_000)
    assert len(text) > 40 * 1024 * 1024
    term, renewed_at = 1.5, [time.monotonic()]

    def renew(_job_id: JobId, _token: LeaseToken) -> timedelta:
        renewed_at.append(time.monotonic())
        return timedelta(seconds=term)

    clock = SystemClock()
    renewer = ThreadRenewer(renew=renew, clock=clock, rules=LeaseRules())
    lags: list[float] = []

    async def turn() -> None:
        while True:
            due = time.monotonic() + 0.05
            await asyncio.sleep(0.05)
            lags.append(time.monotonic() - due)

    turning = asyncio.ensure_future(turn())
    async with renewer.keep(
        JobId("job"), LeaseToken("token"), term=term, asked_at=clock.boottime(), on_lost=pytest.fail
    ):
        read = await read_message(text)
    turning.cancel()
    renewed_at.append(time.monotonic())
    assert read.value["result"] == {"score": 1.0}
    assert max(later - sooner for sooner, later in itertools.pairwise(renewed_at)) < term
    assert max(lags) < 1.0
