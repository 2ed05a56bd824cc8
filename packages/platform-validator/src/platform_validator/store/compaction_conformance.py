"""What `compact` must do in every Store: named checks, part of the one suite in `conformance`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from platform_protocol.ids import ClaimId, VmId, VmName
from platform_validator.store.port import Store
from platform_validator.store.records import JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import CHALLENGE, NOW, cvm, instance, job, require, writes

LATER = NOW + timedelta(days=1)


async def _ended(store: Store, number: int, *, at: datetime = NOW) -> ClaimId:
    claim = job(number).claim_id
    await store.open_claim(job(number))
    await store.end_job(claim, outcome=JobOutcome.CANCELLED, reason="x", at=at)
    return claim


async def _known(store: Store) -> list[str]:
    return [str(record.job_id) for record in await store.recent_jobs(10_000)]


async def what_ended_long_ago_is_forgotten(store: Store) -> None:
    """Jobs that ended before the moment go and are counted; a claim that is gone can be made again."""
    for number in range(3):
        await _ended(store, number, at=NOW + timedelta(hours=number))
    removed = await store.compact(ended_before=NOW + timedelta(hours=2), keep=0)
    require(removed == 2, f"removed {removed}")
    require(await _known(store) == ["job-2"], "another one than those two went")
    require(await store.job(ClaimId("claim-0")) is None, "a forgotten job is found")
    await store.open_claim(job(0))
    require(await _known(store) == ["job-0", "job-2"], "the order is lost")


async def an_open_job_is_never_forgotten(store: Store) -> None:
    """However old, at whatever stage: an earlier process may have left it."""
    stages = [stage for stage in Stage if stage is not Stage.DONE]
    for number, stage in enumerate(stages):
        await store.open_claim(job(number))
        await store.advance(job(number).claim_id, stage, at=NOW, kit=b"kit")
    before = await store.open_jobs()
    require(await store.compact(ended_before=LATER, keep=0) == 0, "an open job was counted as removed")
    require(await store.open_jobs() == before, "an open job is gone, or changed")


async def a_job_whose_result_is_undelivered_is_never_forgotten(store: Store) -> None:
    """Not even when it has ended: it goes after the delivery."""
    claim = ClaimId("claim-1")
    await store.open_claim(job())
    await store.store_result(claim, JobOutcome.SUCCEEDED, b"body", at=NOW)
    await store.end_job(claim, outcome=JobOutcome.SUCCEEDED, reason=None, at=NOW)
    other = await _ended(store, 2)
    require(await store.compact(ended_before=LATER, keep=0) == 1, "not just the delivered one went")
    require(await store.job(other) is None, "the other job is still there")
    require([entry.body for entry in await store.outbox()] == [b"body"], "the result is gone")
    await store.outbox_tried(claim, "no answer")
    await store.outbox_delivered(claim, at=NOW)
    record = await store.job(claim)
    require(record is not None and record.stage is Stage.DONE, "its job is gone before the delivery")
    require(await store.compact(ended_before=LATER, keep=0) == 1, "it stays for ever")


async def the_newest_claims_are_kept(store: Store) -> None:
    """`keep` counts claims, open ones and those on either side of a gap included."""
    for number in range(6):
        await _ended(store, number)
    await store.open_claim(job(6))
    require(await store.compact(ended_before=LATER, keep=100) == 0, "fewer than `keep` were kept")
    require(await store.compact(ended_before=LATER, keep=3) == 4, "not just the newest three were kept")
    require(await _known(store) == ["job-6", "job-5", "job-4"], "others were kept")
    await store.compact(ended_before=LATER, keep=0)
    require(await _known(store) == ["job-6"], "with keep=0 only what is open stays")
    await _ended(store, 7)
    require(await store.compact(ended_before=LATER, keep=2) == 0, "a gap counted as a claim")


async def a_cvm_that_holds_resources_is_never_forgotten(store: Store) -> None:
    """Only what the VMM confirmed gone, and not before the moment: the others hold quota and ports."""
    phases = list(VmPhase)
    for number, phase in enumerate(phases):
        await store.intend_vm(cvm(number))
        await store.vm_created(cvm(number).name, VmId(f"id-{number}"))
        await store.vm_phase(cvm(number).name, phase, at=NOW)
    await store.intend_vm(cvm(9))
    await store.vm_phase(VmName("pv-9"), VmPhase.GONE, at=LATER)
    before = await store.open_vms()
    require(len(before) == len(phases) - 1, "the check itself is wrong")
    require(await store.compact(ended_before=LATER, keep=0) == 1, "not just one went")
    require(await store.open_vms() == before, "a CVM that is not gone was forgotten")
    require(await store.vm(VmName("pv-9")) is not None, "one that went just now was forgotten")


async def values_and_instances_stay(store: Store) -> None:
    """Whatever their age."""
    await store.put_instance(instance())
    await store.change_value(CHALLENGE, "key", change=writes("1"), request=None, at=NOW)
    await store.compact(ended_before=LATER, keep=0)
    require([v.key for v in await store.values(CHALLENGE)] == ["key"], "a value is gone")
    require(len(await store.instances()) == 1, "an instance is gone")
    require(not await store.challenge_history(CHALLENGE, 9), "old history was kept")


async def compaction_may_be_repeated(store: Store) -> None:
    """Many times its batch in one call; then nothing is left to do, and the store writes as before."""
    for number in range(401):
        await _ended(store, number)
    await store.open_claim(job(5_000))
    require(await store.compact(ended_before=LATER, keep=0) == 401, "not all went")
    for _ in range(2):
        require(await store.compact(ended_before=LATER, keep=0) == 0, "something went twice")
    await store.advance(job(5_000).claim_id, Stage.RUNNING, at=NOW)
    require(await _known(store) == ["job-5000"], "others are there")


async def an_empty_store_compacts_to_nothing(store: Store) -> None:
    """At the first start."""
    require(await store.compact(ended_before=LATER, keep=10) == 0, "something was removed of nothing")


CASES: tuple[Callable[[Store], Awaitable[None]], ...] = (
    what_ended_long_ago_is_forgotten,
    an_open_job_is_never_forgotten,
    a_job_whose_result_is_undelivered_is_never_forgotten,
    the_newest_claims_are_kept,
    a_cvm_that_holds_resources_is_never_forgotten,
    values_and_instances_stay,
    compaction_may_be_repeated,
    an_empty_store_compacts_to_nothing,
)
