"""A validator's jobs over the twins: real git, real loops, a Platform API and a fleet in memory."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from job_house import CHALLENGE, CVM, OTHER, TOML, House, answered, good, new_commit, tick

from platform_protocol.ids import ClaimId, JobId
from platform_protocol.notifications import JobCancelled, NewJob
from platform_protocol.platform_messages import IsolationLevel, ReleaseReason, ResourceUsage
from platform_protocol.session.messages import JobError
from platform_validator.challenges.memory import MemorySession
from platform_validator.clock import SystemClock
from platform_validator.cvm.errors import AttestationUnavailable, BootFailed, SessionLost
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.usage import VmUsage
from platform_validator.jobs.recovery import recover
from platform_validator.platform_client.conformance import a_result
from platform_validator.store.records import InstanceState, JobOutcome, JobRecord, Stage


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A validator with one published challenge."""
    made = House(tmp_path)
    made.publish(new_commit(tmp_path, TOML))
    return made


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


async def test_time_is_counted_from_the_acknowledgement_and_ends_as_timeout(house: House) -> None:
    """Time is counted from the acknowledgement and ends as timeout."""

    async def endless(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        await asyncio.Event().wait()
        raise AssertionError

    house.work = endless
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
    running = asyncio.Event()

    async def endless(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        running.set()
        await asyncio.Event().wait()
        raise AssertionError

    house.work = endless
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await running.wait()
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


async def test_a_new_commit_is_proved_beside_the_old_one_before_it_serves(house: House) -> None:
    """A new commit is proved beside the old one before it serves."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        old = house.challenges.views()[0].serving
        assert old is not None
        proof = asyncio.Event()
        house.fleet.next_boot(until=proof)
        house.publish(new_commit(house.folder, TOML + "# two\n"))
        while house.challenges.views()[0].candidate is None:
            await tick()
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
        assert house.challenges.acquire(CHALLENGE) is not None
        proof.set()
        while (new := house.challenges.views()[0].serving) is None or new.commit == old.commit:
            await tick()
    assert new.commit != old.commit


async def test_an_old_instance_finishes_its_jobs_before_it_goes(house: House) -> None:
    """An old instance finishes its jobs before it goes."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        held = house.challenges.acquire(CHALLENGE)
        assert held is not None
        second = new_commit(house.folder, TOML + "# two\n")
        house.publish(second)
        while not (old := house.challenges.views()[0].old):
            await tick()
        assert (old[0].commit, old[0].state, old[0].jobs) == (held.commit, InstanceState.RECYCLING, 1)
        assert old[0].superseded_by is not None
        assert second in old[0].superseded_by
        states = {record.commit: record.state for record in await house.store.instances()}
        assert states == {held.commit: InstanceState.RECYCLING, second: InstanceState.ACTIVE}
        held.release()
        while house.challenges.views()[0].old:
            await tick()


async def test_a_broken_new_commit_leaves_the_old_one_serving(house: House) -> None:
    """A broken new commit leaves the old one serving."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.publish(new_commit(house.folder, "nonsense = [\n"))
        while (candidate := house.challenges.views()[0].candidate) is None or candidate.reason is None:
            await tick()
        assert "platform_toml_invalid" in candidate.reason
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
        job_id = house.platform.add_job(CHALLENGE)
        await house.ended(job_id)
    assert house.platform.jobs[job_id].outcome == "succeeded"


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        (TOML.replace("cpu_cores = 1", "cpu_cores = 64"), "does_not_fit"),
        (TOML.replace("[cvm]", '[cvm]\nos_image = "none"'), "image_unknown"),
        (TOML.replace("[cvm]", '[cvm]\nruntime = "none"'), "runtime_unknown"),
        (TOML + "[env.KEY]\n", "env_missing"),
    ],
)
async def test_what_cannot_run_here_is_failed_with_its_reason(tmp_path: Path, toml: str, reason: str) -> None:
    """What cannot run here is failed with its reason."""
    house = House(tmp_path)
    house.publish(new_commit(tmp_path, toml))
    async with house.open():
        await house.state(InstanceState.FAILED)
        candidate = house.challenges.views()[0].candidate
    assert candidate is not None
    assert (candidate.reason or "").startswith(reason)


async def test_one_slow_challenge_delays_no_other(house: House) -> None:
    """One slow challenge delays no other."""
    stuck = asyncio.Event()
    house.fleet.next_boot(until=stuck)
    async with house.open():
        while not house.fleet.alive:
            await tick()
        house.publish(new_commit(house.folder, TOML), OTHER, "other")
        await house.state(InstanceState.ACTIVE, OTHER)
        assert house.challenges.active_ids() == [OTHER]


async def test_a_challenge_that_leaves_the_list_is_drained_and_removed(house: House) -> None:
    """A challenge that leaves the list is drained and removed."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        held = house.challenges.acquire(CHALLENGE)
        assert held is not None
        house.platform.remove_challenge(CHALLENGE)
        house.challenges.wake()
        await house.state(InstanceState.RECYCLING)
        held.release()
        while house.challenges.views():
            await tick()
        assert not await house.store.instances()


async def test_a_drained_validator_releases_what_runs(house: House) -> None:
    """A drained validator releases what runs."""
    running = asyncio.Event()

    async def endless(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        running.set()
        await asyncio.Event().wait()
        raise AssertionError

    house.work = endless
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await running.wait()
        house.jobs.stop_claiming()
    assert house.platform.jobs[job_id].releases == [ReleaseReason.DRAIN]
    assert house.platform.jobs[job_id].status == "pending"


async def test_what_a_crash_left_is_submitted_released_or_forgotten(house: House) -> None:
    """Recovery never runs a job again on its own authority."""
    clock = SystemClock()
    granted, finished = house.platform.add_job(CHALLENGE), house.platform.add_job(CHALLENGE)
    crashed = await abandoned(house, granted)
    claim = await house.client.claim(granted, crashed)
    await house.store.claim_granted(
        crashed, granted=b"{}", attempt=1, token=claim.lease.token, at=clock.now()
    )
    done = await abandoned(house, finished)
    claim = await house.client.claim(finished, done)
    await house.store.claim_granted(done, granted=b"{}", attempt=1, token=claim.lease.token, at=clock.now())
    await house.store.store_result(done, JobOutcome.SUCCEEDED, a_result(claim), at=clock.now())
    await abandoned(house, JobId("never-answered"))
    found = await recover(store=house.store, fleet=house.fleet, clock=clock)
    assert found.fates == {"submit": 1, "finish": 0, "adopt": 0, "release": 1, "forget": 1}
    house.jobs.inherit(found)
    async with house.open():
        while await house.store.open_jobs():
            await tick()
    assert house.platform.jobs[granted].releases == [ReleaseReason.INFRA]
    assert house.platform.jobs[finished].outcome == "succeeded"


async def test_a_job_that_the_journal_holds_is_not_claimed_again(house: House) -> None:
    """Its result waits for delivery while the API, whose lease on it lapsed, offers it again."""
    held = house.platform.add_job(CHALLENGE, push=False)
    claim_id = await abandoned(house, held)
    claim = await house.client.claim(held, claim_id)
    at = SystemClock().now()
    await house.store.claim_granted(claim_id, granted=b"{}", attempt=1, token=claim.lease.token, at=at)
    await house.store.store_result(claim_id, JobOutcome.SUCCEEDED, a_result(claim), at=at)
    for _ in range(50):
        house.platform.fail_next("submit_result")
    house.platform.lapse(held)
    async with house.open():
        house.platform.add_job(CHALLENGE)
        while len(await house.store.outbox()) < 2:
            await tick()
        assert house.platform.jobs[held].attempt == 1
        house.platform.clear_faults()
        house.outbox.wake(retry=True)
        await house.ended(held)
    assert (house.platform.jobs[held].attempt, house.platform.jobs[held].outcome) == (1, "succeeded")


async def abandoned(house: House, job_id: JobId) -> ClaimId:
    """A claim that an earlier process journaled."""
    claim_id = ClaimId(str(uuid.uuid4()))
    await house.store.open_claim(
        JobRecord(
            claim_id=claim_id,
            job_id=job_id,
            challenge_id=CHALLENGE,
            instance_key="key",
            resources=CVM,
            stage=Stage.PENDING,
            claimed_at=SystemClock().now(),
        )
    )
    return claim_id


async def test_an_unreachable_platform_is_said_and_recovered_from(house: House) -> None:
    """An unreachable platform is said and recovered from."""
    house.platform.down = True
    async with house.open():
        while house.challenges.last_error is None or "down" not in house.challenges.last_error:
            await tick()
        house.platform.down = False
        house.challenges.wake()
        job_id = house.platform.add_job(CHALLENGE)
        await house.ended(job_id)


async def test_another_instance_of_the_hotkey_stops_the_claiming(house: House) -> None:
    """Another instance of the hotkey stops the claiming."""
    async with house.open():
        while house.platform.connections == 0:
            await tick()
        queue = house.platform.connect("validator-1", "another-instance")
        while not house.in_use:
            await tick()
        assert not house.jobs.claiming
        house.platform.disconnect(queue)
