"""Capacity, the claim gate and leases, decided without I/O."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.resources import Resources
from platform_validator.cvm.quota import Refusal
from platform_validator.jobs.capacity import (
    Capacity,
    CapacityFacts,
    Need,
    NoCapacity,
    covers,
    has_capacity,
    largest,
)
from platform_validator.jobs.gate import ClaimGate
from platform_validator.jobs.lease import LeaseRules, LeaseState, Renew, Stop, Wait, decide
from platform_validator.jobs.waiting import Tally, Waiting
from platform_validator.store.records import Stage

C, J = ChallengeId("challenge"), JobId("job")
SIZE = Resources(cpu_cores=2, memory_mb=512, disk_mb=1024, gpu_count=1)
FREE = CapacityFacts(
    claiming=True,
    held=frozenset(),
    active=frozenset({C}),
    can_attest=True,
    gate_open=True,
    room=None,
    ready=None,
    active_jobs=0,
    max_jobs=4,
)
NEED = Need(J, C, SIZE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"claiming": False}, NoCapacity.STOPPED),
        ({"held": frozenset({J})}, NoCapacity.HELD),
        ({"active": frozenset()}, NoCapacity.NOT_ACTIVE),
        ({"can_attest": False}, NoCapacity.NO_ATTESTATION),
        ({"gate_open": False}, NoCapacity.GATE),
        ({"room": Refusal("host", 1, 0)}, NoCapacity.HOST),
        ({"room": Refusal("image", 1, 0)}, NoCapacity.IMAGE),
        ({"room": Refusal("cpu", 2, 1)}, NoCapacity.CPU),
        ({"room": Refusal("memory", 512, 511)}, NoCapacity.MEMORY),
        ({"room": Refusal("disk", 1024, 0)}, NoCapacity.DISK),
        ({"room": Refusal("gpu", 1, 0)}, NoCapacity.GPU),
        ({"active_jobs": 4}, NoCapacity.JOBS),
        ({"room": Refusal("cvms", 1, 0)}, NoCapacity.CVMS),
        # The guide's order: resources before the job limit before the CVM quota.
        ({"room": Refusal("cpu", 2, 0), "active_jobs": 9}, NoCapacity.CPU),
        ({"active_jobs": 9, "room": Refusal("cvms", 1, 0)}, NoCapacity.JOBS),
        # A ready CVM has its share already.
        ({"room": Refusal("cpu", 2, 0), "ready": SIZE}, None),
        ({"room": Refusal("cvms", 1, 0), "ready": SIZE}, None),
        ({"ready": SIZE, "active_jobs": 4}, NoCapacity.JOBS),
        (
            {"ready": SIZE.model_copy(update={"memory_mb": 1}), "room": Refusal("cvms", 1, 0)},
            NoCapacity.CVMS,
        ),
    ],
)
def test_the_first_failing_check_gives_the_reason(
    change: dict[str, object], reason: NoCapacity | None
) -> None:
    """The first failing check gives the reason."""
    answer = has_capacity(NEED, replace(FREE, **change))  # type: ignore[arg-type] # the table mixes fields
    assert answer.refusal is reason
    assert bool(answer) is (reason is None)


def test_only_a_lack_of_room_is_helped_by_yielding() -> None:
    """Only a lack of room is helped by yielding."""
    lacking = {reason for reason in NoCapacity if Capacity(reason).lacks_room}
    assert lacking == {NoCapacity.CPU, NoCapacity.MEMORY, NoCapacity.DISK, NoCapacity.GPU, NoCapacity.CVMS}


sizes = st.builds(
    Resources,
    cpu_cores=st.integers(0, 8),
    memory_mb=st.integers(0, 4096),
    disk_mb=st.integers(0, 4096),
    gpu_count=st.integers(0, 2),
)


@given(sizes, sizes)
def test_largest_covers_both(first: Resources, second: Resources) -> None:
    """Largest covers both."""
    both = largest(first, second)
    assert covers(both, first)
    assert covers(both, second)


def test_a_refusal_brings_its_figures() -> None:
    """For whoever reads the status: what is wanted, what is free, how many run."""
    full = has_capacity(NEED, replace(FREE, room=Refusal("memory", 512, 100)))
    assert full.detail == "512 wanted, 100 free"
    assert has_capacity(NEED, replace(FREE, active_jobs=4)).detail == "4 of 4 run"


def test_a_tally_has_a_row_for_each_reason_in_the_guide_s_order() -> None:
    """With the figures of the first job; jobs that were claimed are not in it."""
    tally = Tally()
    for answer in (
        Capacity(NoCapacity.CVMS, detail="cvms: 1 wanted, 0 free"),
        Capacity(NoCapacity.CPU, detail="first"),
        Capacity(NoCapacity.CPU, detail="second"),
        Capacity(None),
    ):
        tally.add(answer)
    cvms = Waiting(NoCapacity.CVMS, 1, "cvms: 1 wanted, 0 free")
    assert tally.rows() == (Waiting(NoCapacity.CPU, 2, "first"), cvms)


def test_the_gate_closes_after_three_errors_in_a_row_at_one_stage() -> None:
    """The gate closes after three errors in a row at one stage."""
    gate = ClaimGate()
    for _ in range(2):
        gate = gate.failed(Stage.BOOTING, now=0.0)
        assert gate.admits(0.0)
    gate = gate.failed(Stage.BOOTING, now=0.0)
    assert not gate.admits(29.9)
    assert gate.admits(30.0)


def test_errors_at_different_stages_or_with_a_success_between_do_not_close_it() -> None:
    """Errors at different stages or with a success between do not close it."""
    gate = ClaimGate().failed(Stage.BOOTING, 0).failed(Stage.ATTESTING, 0).failed(Stage.BOOTING, 0)
    assert gate.admits(0)
    gate = ClaimGate().failed(Stage.BOOTING, 0).failed(Stage.BOOTING, 0).succeeded().failed(Stage.BOOTING, 0)
    assert gate.admits(0)


def test_a_half_open_gate_lets_one_job_through_whose_end_decides() -> None:
    """A half open gate lets one job through whose end decides."""
    gate = ClaimGate()
    for _ in range(3):
        gate = gate.failed(Stage.BOOTING, 0.0)
    probing = gate.claimed()
    assert not probing.admits(31.0)
    assert probing.succeeded() == ClaimGate()
    assert probing.withdrawn().admits(31.0)
    again = probing.failed(Stage.BOOTING, 31.0)
    assert not again.admits(31.0 + 59.0)
    assert again.admits(31.0 + 60.0)


def test_the_gate_pauses_no_longer_than_ten_minutes() -> None:
    """The gate pauses no longer than ten minutes."""
    gate, now = ClaimGate(), 0.0
    for _ in range(50):
        gate = gate.failed(Stage.BOOTING, now)
    assert gate.admits(now + 600.0)


RULES = LeaseRules(stall_limit=timedelta(minutes=10), outage_grace=timedelta(hours=1))
HELD = LeaseState(term=120.0, granted_at=1000.0, asked_at=1000.0)


@pytest.mark.parametrize(
    ("state", "fed_at", "now", "step"),
    [
        (HELD, 1000.0, 1000.0, Wait(40.0)),
        (HELD, 1000.0, 1039.9, Wait(0.1)),
        (HELD, 1000.0, 1040.0, Renew()),
        # After a gap longer than the term: renew first.
        (HELD, 4000.0, 4000.0, Renew()),
        # Refused: stop, whatever else holds.
        (HELD.denied(1040.0, "lease_lost"), 1040.0, 1040.0, Stop("lease_lost")),
        (HELD.denied(1040.0, "job_cancelled"), 0.0, 9e9, Stop("job_cancelled")),
        # Unanswered: go on, soon again, for an hour.
        (HELD.silent(1040.0), 1040.0, 1040.5, Wait(0.5)),
        (HELD.silent(1040.0), 1040.0, 1041.0, Renew()),
        (HELD.silent(4599.0), 4599.0, 4599.9, Wait(0.1)),
        (HELD.silent(4599.0), 4599.0, 4600.0, Stop("outage")),
        # The job's own task is dead: nobody would use the lease.
        (HELD, 400.0, 1000.0, Stop("stalled")),
        (HELD, 401.0, 1000.0, Wait(1.0)),
    ],
)
def test_lease_decisions(state: LeaseState, fed_at: float, now: float, step: object) -> None:
    """Lease decisions."""
    decided = decide(state, fed_at=fed_at, now=now, rules=RULES)
    if isinstance(decided, Wait):
        decided = Wait(round(decided.seconds, 6))
    assert decided == step


def test_a_renewal_counts_from_before_it_was_sent() -> None:
    """A renewal counts from before it was sent."""
    renewed = HELD.granted(asked_at=1040.0, term=60.0)
    assert isinstance(decide(renewed, fed_at=1040.0, now=1059.9, rules=RULES), Wait)
    assert decide(renewed, fed_at=1040.0, now=1060.0, rules=RULES) == Renew()


@given(
    silent=st.integers(0, 200),
    fed_ago=st.floats(0, 1200),
    granted_ago=st.floats(0, 7200),
    asked_ago=st.floats(0, 7200),
)
def test_a_lease_is_never_given_up_before_its_time(
    silent: int, fed_ago: float, granted_ago: float, asked_ago: float
) -> None:
    """A lease is never given up before its time."""
    now = 10_000.0
    state = LeaseState(120.0, now - granted_ago, now - min(asked_ago, granted_ago), silent)
    step = decide(state, fed_at=now - fed_ago, now=now, rules=RULES)
    if isinstance(step, Stop):
        assert (step.reason == "stalled" and fed_ago >= 599.9) or (silent and granted_ago >= 3599.9)
    if isinstance(step, Wait):
        assert 0 < step.seconds <= 600
