"""Leases kept in a thread and in a task: the same rules, and what becomes of the work (I4)."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest
from waiting import until

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_validator.clock import SystemClock
from platform_validator.jobs.lease import LeaseRules, LeaseState, TaskRenewer, ThreadRenewer
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.port import LeaseRefused, PlatformUnavailable

JOB, TOKEN = JobId("job"), LeaseToken("token")
CLOCK = SystemClock()
TERM = timedelta(milliseconds=15)


class Api:
    """Answers renewals from a script; the last answer goes on for ever."""

    def __init__(self, *answers: timedelta | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.often = threading.Event()

    def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """One blocking renewal."""
        assert (job_id, token) == (JOB, TOKEN)
        self.asked += 1
        if self.asked >= 5:
            self.often.set()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def refused(code: str) -> LeaseRefused:
    """A refusal."""
    return LeaseRefused(f"409 {code}", code=code, status=409)


def renewer(api: Api, **rules: timedelta) -> ThreadRenewer:
    """The thread over scripted answers."""
    return ThreadRenewer(renew=api.renew, clock=CLOCK, rules=LeaseRules(**rules))


async def lost_reason(renewer: ThreadRenewer, term: float = TERM.total_seconds()) -> str:
    """Keep a lease until it is lost; returns why."""
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with (
        asyncio.timeout(10),
        renewer.keep(JOB, TOKEN, term=term, asked_at=CLOCK.boottime(), on_lost=lost.set_result),
    ):
        return await lost


@pytest.mark.robustness(4, "renewals")
async def test_renewal_goes_on_while_the_event_loop_is_blocked() -> None:
    """Renewal goes on while the event loop is blocked."""
    api = Api(TERM)
    lost: list[str] = []
    async with renewer(api).keep(
        JOB, TOKEN, term=TERM.total_seconds(), asked_at=CLOCK.boottime(), on_lost=lost.append
    ):
        # The loop's own thread waits here: nothing of the loop runs until the renewals have happened.
        assert api.often.wait(10)
    assert not lost


@pytest.mark.parametrize("code", ["lease_lost", "job_cancelled", "attempt_expired"])
async def test_a_refused_renewal_ends_the_work(code: str) -> None:
    """A refused renewal ends the work."""
    assert await lost_reason(renewer(Api(TERM, refused(code)))) == code


async def test_unanswered_renewals_are_borne_and_then_answered() -> None:
    """Unanswered renewals are borne and then answered."""
    api = Api(PlatformUnavailable("down"), TERM)
    async with renewer(api).keep(
        JOB, TOKEN, term=TERM.total_seconds(), asked_at=CLOCK.boottime(), on_lost=pytest.fail
    ):
        assert await asyncio.to_thread(api.often.wait, 10)


async def test_an_outage_is_borne_for_its_grace_alone() -> None:
    """An outage is borne for its grace alone."""
    api = Api(PlatformUnavailable("down"))
    assert await lost_reason(renewer(api, outage_grace=timedelta(milliseconds=50))) == "outage"


async def test_a_fault_in_a_renewal_is_no_answer_and_not_the_end_of_the_thread() -> None:
    """A fault in a renewal is no answer, and not the end of the thread."""
    api = Api(RuntimeError("a fault of ours"), TERM)
    async with renewer(api).keep(
        JOB, TOKEN, term=TERM.total_seconds(), asked_at=CLOCK.boottime(), on_lost=pytest.fail
    ):
        assert await asyncio.to_thread(api.often.wait, 10)


async def test_the_rules_may_change_while_a_lease_is_kept() -> None:
    """The rules may change while a lease is kept."""
    thread = renewer(Api(PlatformUnavailable("down")))
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with (
        asyncio.timeout(10),
        thread.keep(JOB, TOKEN, term=0.015, asked_at=CLOCK.boottime(), on_lost=lost.set_result),
    ):
        thread.rules = LeaseRules(outage_grace=timedelta(milliseconds=20))
        assert await lost == "outage"


async def test_a_job_whose_task_shows_no_life_is_not_renewed_for_ever() -> None:
    """A job whose task shows no life is not renewed for ever."""
    assert await lost_reason(renewer(Api(TERM), stall_limit=timedelta(milliseconds=50))) == "stalled"


async def test_a_hint_makes_it_ask_at_once() -> None:
    """A hint makes it ask at once."""
    api = Api(refused("job_cancelled"))
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with (
        asyncio.timeout(10),
        renewer(api).keep(
            JOB, TOKEN, term=3600.0, asked_at=CLOCK.boottime(), on_lost=lost.set_result
        ) as lease,
    ):
        lease.renew_now()
        assert await lost == "job_cancelled"


async def test_nothing_is_said_after_the_lease_was_let_go() -> None:
    """Nothing is said after the lease was let go."""
    api = Api(refused("lease_lost"))
    lost: list[str] = []
    async with renewer(api).keep(JOB, TOKEN, term=3600.0, asked_at=CLOCK.boottime(), on_lost=lost.append):
        pass
    await asyncio.sleep(0)  # the turn in which it would be said
    assert not lost
    assert api.asked == 0


async def test_the_task_keeps_a_lease_by_the_same_rules() -> None:
    """The task keeps a lease by the same rules."""
    platform = MemoryPlatform(term=timedelta(milliseconds=30))
    job_id = platform.add_job(ChallengeId("c"))
    client = platform.client()
    claim = await client.claim(job_id, ClaimId("claim"))
    tasks = TaskRenewer(client=client, clock=CLOCK, rules=LeaseRules())
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with (
        asyncio.timeout(10),
        tasks.keep(
            job_id,
            claim.lease.token,
            term=claim.lease.term_s,
            asked_at=CLOCK.boottime(),
            on_lost=lost.set_result,
        ) as lease,
    ):
        platform.fail_next("renew")
        while platform.calls.count("renew") < 3:
            await asyncio.sleep(0)  # a turn of the loop: it is fed in each, as by a loop that lives
            lease.feed()
        platform.cancel_job(job_id)
        lease.renew_now()
        assert await lost == "job_cancelled"


def test_only_a_gap_puts_a_lease_in_doubt_and_only_an_answer_ends_that() -> None:
    """Silence in an outage is no doubt; after a gap longer than the term silence is no answer."""
    fresh = LeaseState(120.0, granted_at=0.0, asked_at=0.0)
    assert not fresh.in_doubt(120.0)
    assert fresh.in_doubt(121.0)
    outage = fresh.silent(40.0).silent(100.0).silent(200.0)
    assert not outage.in_doubt(210.0)
    after_gap = fresh.silent(300.0)
    assert after_gap.in_doubt(301.0)
    assert after_gap.silent(310.0).in_doubt(311.0)
    assert not after_gap.granted(320.0, 120.0).in_doubt(321.0)


async def test_the_thread_says_when_it_is_in_doubt() -> None:
    """A claim whose answer took longer than the term is in doubt until it is renewed."""
    api = Api(timedelta(hours=1))
    async with (
        asyncio.timeout(10),
        renewer(api).keep(JOB, TOKEN, term=1.0, asked_at=CLOCK.boottime() - 5.0, on_lost=print) as lease,
    ):
        await until(lambda: not lease.in_doubt())
    assert api.asked == 1
