"""A validator's jobs over the twins: real git, real loops, a Platform API and a fleet in memory."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from job_house import CHALLENGE, CVM, OTHER, TOML, Endless, House, answered, good, new_commit, tick

from platform_protocol.ids import JobId
from platform_protocol.notifications import JobCancelled, NewJob
from platform_protocol.platform_messages import IsolationLevel, ReleaseReason, ResourceUsage
from platform_protocol.session.messages import JobError
from platform_validator.challenges.memory import MemorySession
from platform_validator.cvm.errors import AttestationUnavailable, BootFailed, SessionLost
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.usage import VmUsage
from platform_validator.store.records import InstanceState, JobOutcome, Stage


async def test_a_job_goes_from_pending_to_its_accepted_result(house: House) -> None:
    """A job goes from pending to its accepted result."""
    seen: list[bytes | None] = []

    async def looking(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        seen.append(submission.read_bytes() if submission else None)
        assert order.payload == {"k": 1}
        return await good(session, order, submission)

    house.work = looking
    job_id = house.platform.add_job(CHALLENGE, submission=b"the submission", payload={"k": 1}, job_name="n")
    async with house.open():
        await house.ended(job_id)
        await house.journaled(job_id, JobOutcome.SUCCEEDED)
        await house.all_gone()
    job = house.platform.jobs[job_id]
    assert seen == [b"the submission"]
    assert (job.status, job.outcome, job.attempt) == ("completed", "succeeded", 1)
    assert job.result is not None
    assert job.result.score == 0.5
    assert job.result.metrics == {"accuracy": 0.5, "final_score": 0.5}
    assert job.result.isolation_level is IsolationLevel.CONTAINER
    assert job.result.logs == ["info: working"]
    assert not await house.store.outbox()
    assert not list((house.folder / "cache" / "submissions").iterdir())


async def test_a_result_tells_what_its_cvm_used(house: House) -> None:
    """What is not known of it is 0."""
    house.fleet.used = VmUsage(cpu_time_ms=12, memory_bytes=5, memory_peak_bytes=34, network_bytes=56)
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await house.ended(job_id)
    result = house.platform.jobs[job_id].result
    assert result is not None
    assert result.resource_usage == ResourceUsage(
        cpu_time_ms=12, memory_peak_bytes=34, disk_bytes=0, network_bytes=56
    )


async def test_each_job_has_a_cvm_of_its_own_and_none_is_left(house: House) -> None:
    """Each job has a cvm of its own and none is left."""
    used: list[int] = []

    async def noting(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        used.append(id(session))
        return await good(session, order, submission)

    house.work = noting
    jobs = [house.platform.add_job(CHALLENGE) for _ in range(8)]
    async with house.open():
        for job_id in jobs:
            await house.ended(job_id)
        await house.all_gone()
    assert len(set(used)) == 8


async def test_an_error_of_the_handler_is_failed_with_zero(house: House) -> None:
    """An error of the handler is failed with zero."""

    async def failing(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        return answered(order, None, JobError(code="submission_failed", message="exit 1"))

    house.work = failing
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await house.ended(job_id)
    job = house.platform.jobs[job_id]
    assert job.result is not None
    assert (job.status, job.outcome, job.result.score) == ("failed", "failed", 0.0)
    assert job.result.error == "submission_failed: exit 1"
    assert job.result.metrics == {"final_score": 0.0}


@pytest.mark.robustness(26, "late")
async def test_time_is_counted_from_the_acknowledgement_and_ends_as_timeout(house: House) -> None:
    """Time is counted from the acknowledgement and ends as timeout."""
    house.work = Endless()
    job_id = house.platform.add_job(CHALLENGE, timeout_s=1)
    async with house.open():
        await house.ended(job_id)
        await house.all_gone()
    job = house.platform.jobs[job_id]
    assert job.result is not None
    assert (job.outcome, job.result.score, job.result.execution_time_ms) == ("timeout", 0.0, 1000)
    assert [reason for cvm in house.fleet.booted for _, reason in cvm.session.cancelled] == ["timeout"]


async def test_a_cvm_that_dies_while_running_is_sandbox_died_and_never_scored(house: House) -> None:
    """A cvm that dies while running is sandbox died and never scored."""

    async def dying(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        house.work = good
        raise SessionLost("the CVM is gone")

    house.work = dying
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await house.ended(job_id)
        await house.journaled(job_id, JobOutcome.SANDBOX_DIED)
    job = house.platform.jobs[job_id]
    assert job.releases == [ReleaseReason.SANDBOX_DIED]
    assert (job.outcome, job.attempt) == ("succeeded", 2)


async def test_a_failing_boot_gives_the_job_back_as_infra(house: House) -> None:
    """A failing boot gives the job back as infra."""
    house.publish(new_commit(house.folder, TOML + "[execution]\nready = 0\n"))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.fleet.next_boot(error=BootFailed("no kernel"))
        house.fleet.next_boot(error=AttestationUnavailable("no collateral"))
        job_id = house.platform.add_job(CHALLENGE)
        await house.ended(job_id)
        await house.all_gone()
    job = house.platform.jobs[job_id]
    assert job.releases == [ReleaseReason.INFRA, ReleaseReason.ATTESTATION_UNAVAILABLE]
    assert (job.outcome, job.attempt) == ("succeeded", 3)
    assert house.quota.view().cvms == 0


@pytest.mark.robustness(14, "claim")
async def test_a_lost_claim_answer_is_asked_for_again_with_the_same_claim_id(house: House) -> None:
    """A lost claim answer is asked for again with the same claim id."""
    job_id = house.platform.add_job(CHALLENGE)
    house.platform.fail_next("claim", after=True)
    house.platform.fail_next("claim")
    async with house.open():
        await house.ended(job_id)
    assert house.platform.calls.count("claim") == 3
    assert house.platform.jobs[job_id].attempt == 1
    assert len(await house.store.recent_jobs(10)) == 1


async def test_a_claim_is_journaled_before_it_is_sent(house: House) -> None:
    """A claim is journaled before it is sent."""
    journaled: list[int] = []
    claim = house.client.claim

    async def watched(job_id: JobId, claim_id: str) -> object:
        journaled.append(len([r for r in await house.store.open_jobs() if r.claim_id == claim_id]))
        return await claim(job_id, claim_id)  # type: ignore[arg-type] # passed through

    house.client.claim = watched  # type: ignore[method-assign,assignment] # watches the order of two acts
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await house.ended(job_id)
    assert journaled == [1]


@pytest.mark.robustness(16, "two-validators")
async def test_losing_a_claim_to_another_validator_is_a_normal_event(house: House) -> None:
    """Losing a claim to another validator is a normal event."""
    other = house.platform.client("validator-2")
    job_id = house.platform.add_job(CHALLENGE)
    listed = house.client.pending_jobs

    async def overtaken(*arguments: object, **named: object) -> object:
        jobs = await listed(*arguments, **named)  # type: ignore[arg-type] # passed through
        for job in jobs:
            await other.claim(job.id, uuid.uuid4().hex)  # type: ignore[arg-type] # any id
        return jobs

    house.client.pending_jobs = overtaken  # type: ignore[method-assign,assignment] # another is quicker
    async with house.open():
        await house.journaled(job_id, JobOutcome.CANCELLED)
        await house.jobs.idle()
    holder = house.platform.jobs[job_id].holder
    assert holder is not None
    assert holder[0] == "validator-2"


async def test_a_push_is_only_a_hint(house: House) -> None:
    """Forged, repeated and late pushes change nothing; without any push the poll finds the job."""
    house.platform.term = timedelta(hours=1)
    quiet = house.platform.add_job(CHALLENGE, push=False)
    async with house.open():
        await house.ended(quiet)
        ghost = JobId("ffffffff-0000-4000-8000-000000000000")
        for seq in range(1000):
            house.platform.push_hint(NewJob(seq=seq, job_id=ghost, challenge_id=CHALLENGE))
            house.platform.push_hint(JobCancelled(seq=seq, job_id=ghost))
        running = asyncio.Event()
        go_on = asyncio.Event()

        async def waiting(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
            session.started(False)
            running.set()
            await go_on.wait()
            return answered(order, {"score": 1.0})

        house.work = waiting
        job_id = house.platform.add_job(CHALLENGE)
        await running.wait()
        renewals = house.platform.calls.count("renew")
        house.platform.push_hint(JobCancelled(seq=5000, job_id=job_id))
        # Its own renewal would be due in twenty minutes: the hint alone makes it ask.
        while house.platform.calls.count("renew") == renewals:
            await tick()
        go_on.set()
        await house.ended(job_id)
    assert house.platform.jobs[job_id].outcome == "succeeded"
    assert ghost not in {record.job_id for record in await house.store.recent_jobs(100)}


async def test_a_cancelled_job_is_stopped_and_its_cvm_destroyed(house: House) -> None:
    """A cancelled job is stopped and its cvm destroyed."""
    house.work = work = Endless()
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await work.begun.wait()
        house.platform.cancel_job(job_id)
        await house.journaled(job_id, JobOutcome.CANCELLED)
        await house.all_gone()
    assert house.platform.jobs[job_id].result is None
    assert house.platform.jobs[job_id].releases == []


@pytest.mark.robustness(14, "result")
async def test_results_outlive_an_outage_and_arrive_once(house: House) -> None:
    """Results outlive an outage and arrive once."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        job_id = house.platform.add_job(CHALLENGE)

        async def cut(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
            house.platform.down = True
            return await good(session, order, submission)

        house.work = cut
        while not await house.store.outbox():
            await tick()
        while "submit_result" not in house.platform.calls[-5:]:
            await tick()
        assert await house.store.outbox()
        house.platform.fail_next("submit_result", after=True)
        house.platform.down = False
        house.outbox.wake(retry=True)
        await house.journaled(job_id, JobOutcome.SUCCEEDED)
    assert house.platform.jobs[job_id].outcome == "succeeded"
    assert not await house.store.outbox()


@pytest.mark.robustness(17, "after-the-result")
async def test_a_refused_result_is_the_end_of_it(house: House) -> None:
    """A refused result is the end of it."""

    async def overtaken(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        house.platform.cancel_job(JobId(order.job_id), push=False)
        return answered(order, {"score": 1.0})

    house.work = overtaken
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        while not any(r.stage is Stage.DONE for r in await house.store.recent_jobs(5)):
            await tick()
    assert house.platform.jobs[job_id].result is None
    assert not await house.store.outbox()


async def test_no_more_jobs_run_at_once_than_there_are_slots(tmp_path: Path) -> None:
    """No more jobs run at once than there are slots."""
    house = House(tmp_path, max_concurrent=2)
    house.publish(new_commit(tmp_path, TOML))
    at_once, most = 0, 0

    async def counting(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        nonlocal at_once, most
        session.started(False)
        at_once += 1
        most = max(most, at_once)
        await tick()
        at_once -= 1
        return answered(order, {"score": 1.0})

    house.work = counting
    jobs = [house.platform.add_job(CHALLENGE) for _ in range(8)]
    async with house.open():
        for job_id in jobs:
            await house.ended(job_id)
    assert 1 <= most <= 2


async def test_an_idle_ready_cvm_yields_to_a_job_that_has_no_room(tmp_path: Path) -> None:
    """An idle ready cvm yields to a job that has no room."""
    house = House(tmp_path, limits=CVM)
    commit = new_commit(tmp_path, TOML)
    house.publish(commit)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.publish(commit, OTHER, "other")
        await house.state(InstanceState.ACTIVE, OTHER)
        first = house.platform.add_job(CHALLENGE)
        second = house.platform.add_job(OTHER)
        await house.ended(first)
        await house.ended(second)
    assert house.platform.jobs[first].outcome == house.platform.jobs[second].outcome == "succeeded"
