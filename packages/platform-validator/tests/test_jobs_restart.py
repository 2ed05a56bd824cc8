"""Starts and stops of a validator with jobs: what is released, submitted, claimed again or not."""

from __future__ import annotations

import uuid

from job_house import CHALLENGE, CVM, Endless, House, tick

from platform_protocol.ids import ClaimId, JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import SystemClock
from platform_validator.jobs.recovery import recover
from platform_validator.platform_client.conformance import a_result
from platform_validator.store.records import JobOutcome, JobRecord, Stage


async def test_a_drained_validator_releases_what_runs(house: House) -> None:
    """A drained validator releases what runs."""
    house.work = work = Endless()
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await work.begun.wait()
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
