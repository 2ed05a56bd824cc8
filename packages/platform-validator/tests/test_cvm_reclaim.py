"""What to do about each VM: pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from platform_protocol.ids import ChallengeId, VmId, VmName
from platform_protocol.resources import Resources
from platform_validator.cvm.reclaim import plan_reclaim
from platform_validator.cvm.vmm import Vm, VmState
from platform_validator.store.records import Purpose, VmPhase, VmRecord

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SIZE = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
A, B = VmName("pv-0123456789-a"), VmName("pv-0123456789-b")


def record(name: VmName, phase: VmPhase = VmPhase.CREATED, *, left: float = 60) -> VmRecord:
    return VmRecord(
        name=name,
        purpose=Purpose.JOB,
        challenge_id=ChallengeId("c"),
        instance_key="i",
        resources=SIZE,
        phase=phase,
        sealed_secret=b"",
        compose=b"",
        host_port=1,
        session_id="s",
        intended_at=NOW,
        hard_deadline=NOW + timedelta(seconds=left),
    )


def seen(*names: VmName) -> dict[VmName, Vm]:
    return {
        name: Vm(VmId(name), name, VmState.RUNNING, "done", "", None, ("127.0.0.1", 1), SIZE)
        for name in names
    }


def plan(
    records: list[VmRecord], names: list[VmName], held: set[VmName], ended: tuple[VmName, ...] = ()
) -> tuple[tuple[VmName, ...], tuple[VmName, ...]]:
    found = plan_reclaim(records, seen(*names), held, ended=ended, state_id="0123456789", now=NOW)
    return found.destroy, found.strays


def test_what_is_held_stays() -> None:
    """A boot, a job or the ready pool has it."""
    assert plan([record(A)], [A], {A}) == ((), ())


def test_what_nobody_holds_is_destroyed() -> None:
    """Whether or not the VMM shows it: its creation may be on the way."""
    assert plan([record(A), record(B)], [A], set()) == ((A, B), ())


def test_what_is_being_destroyed_is_left_to_its_destroyer() -> None:
    """It is not handed over again."""
    assert plan([record(A, VmPhase.DESTROYING)], [A], set()) == ((), ())


def test_a_held_cvm_past_its_hard_deadline_is_destroyed() -> None:
    """None outlives its record."""
    assert plan([record(A, left=0)], [A], {A}) == ((A,), ())


def test_a_vm_of_an_ended_record_is_destroyed() -> None:
    """Its create was done after we had looked for it: ours by its exact name."""
    assert plan([], [A], set(), ended=(A,)) == ((A,), ())


def test_a_vm_with_our_state_id_that_the_journal_does_not_know_is_only_reported() -> None:
    """A restored backup: an operator decides."""
    assert plan([], [A], set()) == ((), (A,))


def test_foreign_vms_are_never_named() -> None:
    """Neither destroyed nor reported, however alike."""
    foreign = [VmName("pv-0123456789x-a"), VmName("pv-9999999999-a"), VmName("web")]
    assert plan([], foreign, set()) == ((), ())
