"""What every Store must do: named checks, run against each implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta

from platform_protocol.ids import ChallengeId, ClaimId, LeaseToken, VmId, VmName
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.compaction_conformance import CASES as COMPACTION
from platform_validator.store.port import DuplicateRecord, Store, UnknownRecord
from platform_validator.store.records import EnvRecord, InstanceState, JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import CHALLENGE, NOW, cvm, instance, job, refuses, require
from platform_validator.store.value_conformance import CASES as VALUES

Check = Callable[[Store], Awaitable[None]]


async def identity_never_changes(store: Store) -> None:
    """The identity is made once: ten hex digits and a uuid."""
    first = await store.identity()
    require(first == await store.identity(), "the identity changed")
    require(len(first.state_id) == 10 and len(first.instance) == 36, "the identity has another form")


async def a_claim_is_written_before_it_is_sent(store: Store) -> None:
    """open_claim shows as an open job at once; the same claim twice is refused."""
    await store.open_claim(job())
    require(await store.job(ClaimId("claim-1")) == job(), "the claim came back changed")
    await refuses(DuplicateRecord, store.open_claim(job()))


async def a_claim_goes_through_its_stages(store: Store) -> None:
    """Granted, advanced with its CVM kept, ended."""
    await store.open_claim(job())
    claim = ClaimId("claim-1")
    await store.claim_granted(claim, granted=b'{"a":1}', attempt=3, token=LeaseToken("t"), at=NOW)
    await store.advance(claim, Stage.BOOTING, at=NOW, vm=VmName("pv-1"))
    await store.advance(claim, Stage.RUNNING, at=NOW)
    record = await store.job(claim)
    require(record is not None, "the job is gone")
    if record is not None:
        shown = (record.stage, record.vm, record.attempt, record.token, record.granted)
        require(shown == (Stage.RUNNING, "pv-1", 3, "t", b'{"a":1}'), f"unexpected {shown}")
    await store.end_job(claim, outcome=JobOutcome.INFRA_ERROR, reason="why", at=NOW)
    require(not await store.open_jobs(), "an ended job is open")


async def the_first_result_stands(store: Store) -> None:
    """A second result changes neither outcome nor body; ending the job keeps the outcome."""
    await store.open_claim(job())
    claim = ClaimId("claim-1")
    await store.store_result(claim, JobOutcome.SUCCEEDED, b"first", at=NOW)
    await store.store_result(claim, JobOutcome.FAILED, b"second", at=NOW)
    [entry] = await store.outbox()
    require(entry.body == b"first", "the second result replaced the first")
    await store.end_job(claim, outcome=JobOutcome.INFRA_ERROR, reason=None, at=NOW)
    record = await store.job(claim)
    require(record is not None and record.outcome is JobOutcome.SUCCEEDED, "the outcome was lost")


async def delivery_empties_the_outbox(store: Store) -> None:
    """Delivered: gone and submitted; delivering again changes nothing."""
    await store.open_claim(job())
    claim = ClaimId("claim-1")
    await store.store_result(claim, JobOutcome.FAILED, b"x", at=NOW)
    await store.outbox_tried(claim, "no answer")
    [entry] = await store.outbox()
    require((entry.tries, entry.last_error) == (1, "no answer"), "the try was not counted")
    for _ in range(2):
        await store.outbox_delivered(claim, at=NOW)
    record = await store.job(claim)
    require(not await store.outbox(), "the entry is still there")
    require(record is not None and record.stage is Stage.DONE, "the job is not done")


async def a_refusal_ends_the_job(store: Store) -> None:
    """Refused: gone; lease_lost, or cancelled when that is the code."""
    for number, (code, outcome) in enumerate(
        (("lease_lost", JobOutcome.LEASE_LOST), ("job_cancelled", JobOutcome.CANCELLED))
    ):
        await store.open_claim(job(number))
        claim = ClaimId(f"claim-{number}")
        await store.store_result(claim, JobOutcome.SUCCEEDED, b"x", at=NOW)
        await store.outbox_refused(claim, code, at=NOW)
        record = await store.job(claim)
        ended = record is not None and (record.stage, record.outcome) == (Stage.DONE, outcome)
        require(ended, f"{code}: unexpected {record}")
    require(not await store.outbox(), "an entry is still there")


async def jobs_come_in_order(store: Store) -> None:
    """Open ones oldest first, recent ones newest first."""
    for number in range(5):
        await store.open_claim(job(number))
    await store.end_job(ClaimId("claim-2"), outcome=JobOutcome.CANCELLED, reason="x", at=NOW)
    require([j.job_id for j in await store.open_jobs()] == ["job-0", "job-1", "job-3", "job-4"], "open")
    require([j.job_id for j in await store.recent_jobs(2)] == ["job-4", "job-3"], "recent")


async def unknown_records_are_refused(store: Store) -> None:
    """A method that names nothing says so."""
    claim, name = ClaimId("nobody"), VmName("nobody")
    await refuses(UnknownRecord, store.advance(claim, Stage.RUNNING, at=NOW))
    await refuses(UnknownRecord, store.store_result(claim, JobOutcome.FAILED, b"", at=NOW))
    await refuses(UnknownRecord, store.end_job(claim, outcome=JobOutcome.FAILED, reason=None, at=NOW))
    await refuses(UnknownRecord, store.vm_created(name, VmId("x")))
    await refuses(UnknownRecord, store.vm_phase(name, VmPhase.GONE, at=NOW))


async def a_cvm_goes_forward_only(store: Store) -> None:
    """Phases never go back; gone CVMs are not open."""
    await store.intend_vm(cvm())
    await refuses(DuplicateRecord, store.intend_vm(cvm()))
    name = VmName("pv-1")
    await store.vm_created(name, VmId("id"))
    await store.vm_phase(name, VmPhase.DESTROYING, at=NOW, reason="drained")
    await store.vm_phase(name, VmPhase.READY, at=NOW)
    await store.vm_created(name, VmId("late"))
    record = await store.vm(name)
    wanted = replace(cvm(), phase=VmPhase.DESTROYING, vm_id=VmId("late"), reason="drained")
    require(record == wanted, f"unexpected {record}")
    await store.vm_phase(name, VmPhase.GONE, at=NOW)
    require(not await store.open_vms(), "a gone CVM is open")
    gone = await store.vm(name)
    require(gone is not None and gone.gone_at == NOW, "gone_at is not stamped")


async def an_instance_id_belongs_to_one_cvm(store: Store) -> None:
    """Two CVMs cannot show one instance id; several may show none. What a receipt will say stays with it."""
    for number in (1, 2, 3):
        await store.intend_vm(cvm(number))
    told = '{"trust":"pinned"}'
    await store.vm_attested(VmName("pv-1"), attestation="simulated", vm_instance="aa", os_image=told)
    attested = await store.vm(VmName("pv-1"))
    require(attested is not None and attested.os_image == told, f"unexpected {attested}")
    duplicate = store.vm_attested(VmName("pv-2"), attestation="simulated", vm_instance="aa")
    await refuses(DuplicateRecord, duplicate)
    for name in ("pv-2", "pv-3"):
        await store.vm_attested(VmName(name), attestation="none", vm_instance=None)


async def a_ready_cvm_is_taken_once(store: Store) -> None:
    """One claim ever; the job knows its CVM from the same transaction on."""
    await store.intend_vm(cvm())
    for number in (1, 2):
        await store.open_claim(job(number))
    await store.vm_assigned(VmName("pv-1"), ClaimId("claim-1"))
    await refuses(DuplicateRecord, store.vm_assigned(VmName("pv-1"), ClaimId("claim-2")))
    record = await store.job(ClaimId("claim-1"))
    require(record is not None and record.vm == "pv-1", "the job does not know its CVM")


async def what_became_of_instances_is_kept(store: Store) -> None:
    """Every state and reason once, with its time, newest first; also of what is forgotten."""
    later = NOW + timedelta(seconds=1)
    first, second = instance(1), instance(2)
    active = replace(first, state=InstanceState.ACTIVE, since=later)
    failed = replace(second, state=InstanceState.FAILED, reason="no kernel", since=later)
    for record in (first, first, second, failed, replace(failed, failures=3)):
        await store.put_instance(record)
    await store.switch_instances(active, None)
    await store.remove_instance("key-2", at=later, reason="superseded")
    await store.remove_instance("key-3", at=later, reason="never there")
    events = await store.challenge_history(CHALLENGE, 9)
    found = [(each.key, each.state, each.reason, each.at) for each in events]
    expected = [
        ("key-1", InstanceState.CREATED, None, NOW),
        ("key-2", InstanceState.CREATED, None, NOW),
        ("key-2", InstanceState.FAILED, "no kernel", later),
        ("key-1", InstanceState.ACTIVE, None, later),
        ("key-2", None, "superseded", later),
    ]
    require(found == expected[::-1], f"the history is {found}")
    newest = await store.challenge_history(CHALLENGE, 1)
    require([each.state for each in newest] == [None], "the limit does not take the newest")
    require(not await store.challenge_history(ChallengeId("other"), 9), "another challenge's history")


async def a_drained_host_is_remembered(store: Store) -> None:
    """Since the first time it was drained, until it is undrained; a CVM's host is kept with it."""
    one, other = HostName("one"), HostName("other")
    later = NOW + timedelta(seconds=1)
    await store.drain_host(other, at=NOW)
    await store.drain_host(one, at=NOW)
    await store.drain_host(one, at=later)
    require(await store.drained_hosts() == {one: NOW, other: NOW}, "not as they were drained")
    await store.undrain_host(one)
    await store.undrain_host(one)
    require(await store.drained_hosts() == {other: NOW}, "not as they were undrained")
    await store.intend_vm(replace(cvm(1), host=one))
    await store.intend_vm(cvm(2))
    require([vm.host for vm in await store.open_vms()] == [one, DEFAULT_HOST], "a CVM's host was not kept")


async def instances_switch_together(store: Store) -> None:
    """Put, replaced, switched, removed; order is that of first sight."""
    for number in (1, 2):
        await store.put_instance(instance(number))
    new = replace(instance(2), state=InstanceState.ACTIVE)
    old = replace(instance(1), state=InstanceState.RECYCLING, superseded_by="key-2")
    await store.switch_instances(new, old)
    require(list(await store.instances()) == [old, new], "the switch did not happen")
    await store.remove_instance("key-1", at=NOW)
    await store.remove_instance("key-1", at=NOW)
    require(list(await store.instances()) == [new], "the instance is still there")


async def a_stage_never_goes_back(store: Store) -> None:
    """A late advance changes nothing, and nothing opens a job that has ended."""
    claim = ClaimId("claim-1")
    await store.open_claim(job())
    await store.advance(claim, Stage.RUNNING, at=NOW, vm=VmName("pv-1"))
    await store.advance(claim, Stage.CREATING, at=NOW, vm=VmName("pv-2"))
    record = await store.job(claim)
    require(record is not None and (record.stage, record.vm) == (Stage.RUNNING, "pv-1"), f"went to {record}")
    await store.end_job(claim, outcome=JobOutcome.INFRA_ERROR, reason="why", at=NOW)
    ended = await store.job(claim)
    await store.advance(claim, Stage.RUNNING, at=NOW)
    await store.store_result(claim, JobOutcome.SUCCEEDED, b"late", at=NOW)
    await store.end_job(claim, outcome=JobOutcome.CANCELLED, reason=None, at=NOW + timedelta(hours=1))
    require(await store.job(claim) == ended, "an ended job was changed")
    require(not await store.outbox(), "an ended job has a result")


async def an_ended_job_stays_ended_when_its_result_is_delivered(store: Store) -> None:
    """Delivery after the end empties the outbox and opens nothing."""
    claim = ClaimId("claim-1")
    await store.open_claim(job())
    await store.store_result(claim, JobOutcome.SUCCEEDED, b"x", at=NOW)
    await store.end_job(claim, outcome=JobOutcome.SUCCEEDED, reason=None, at=NOW)
    await store.outbox_delivered(claim, at=NOW)
    require(not await store.open_jobs() and not await store.outbox(), "open again, or still to deliver")


async def a_cancelled_write_happens_wholly_or_not_at_all(store: Store) -> None:
    """Journal and outbox agree, whenever the caller was cancelled."""
    for number in range(12):
        claim = ClaimId(f"claim-{number}")
        await store.open_claim(job(number))
        writing = asyncio.ensure_future(store.store_result(claim, JobOutcome.SUCCEEDED, b"x", at=NOW))
        for _ in range(number % 3):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait({writing})
        record = await store.job(claim)
        listed = claim in {entry.claim_id for entry in await store.outbox()}
        require(record is not None and (record.outcome is not None) == listed, f"half a write: {record}")


async def a_variable_is_kept_once_under_its_name(store: Store) -> None:
    """The newest of a name stands, with its repository; each challenge has its own."""
    old = EnvRecord(CHALLENGE, "KEY", "https://old.example/x", b"\x00old", NOW)
    new = replace(old, repository="https://new.example/x", sealed=b"\xffnew", given_at=NOW + timedelta(1))
    other = replace(old, challenge_id=ChallengeId("other"))
    another = replace(old, name="ANOTHER")
    for record in (old, other, new, another):
        await store.put_env(record)
    require(await store.env(CHALLENGE) == [another, new], "not the newest, by name")
    require(await store.env() == [another, new, other], "not all, by challenge")
    require(await store.remove_env(CHALLENGE, "KEY"), "it was there")
    require(not await store.remove_env(CHALLENGE, "KEY"), "it was gone")
    require(await store.env() == [another, other], "another one went")


async def a_cvm_is_not_given_to_an_unknown_claim(store: Store) -> None:
    """Refused wholly: the CVM stays ready."""
    await store.intend_vm(cvm())
    await refuses(UnknownRecord, store.vm_assigned(VmName("pv-1"), ClaimId("nobody")))
    require(await store.vm(VmName("pv-1")) == cvm(), "it was taken all the same")


CASES: tuple[Check, ...] = (
    identity_never_changes,
    a_claim_is_written_before_it_is_sent,
    a_claim_goes_through_its_stages,
    the_first_result_stands,
    delivery_empties_the_outbox,
    a_refusal_ends_the_job,
    jobs_come_in_order,
    unknown_records_are_refused,
    a_cvm_goes_forward_only,
    an_instance_id_belongs_to_one_cvm,
    a_ready_cvm_is_taken_once,
    a_drained_host_is_remembered,
    instances_switch_together,
    what_became_of_instances_is_kept,
    a_variable_is_kept_once_under_its_name,
    a_stage_never_goes_back,
    an_ended_job_stays_ended_when_its_result_is_delivered,
    a_cancelled_write_happens_wholly_or_not_at_all,
    a_cvm_is_not_given_to_an_unknown_claim,
    *COMPACTION,
    *VALUES,
)
