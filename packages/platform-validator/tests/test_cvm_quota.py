"""Reservations: never above the limits, released once, rebuilt from what runs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from platform_protocol.resources import Resources
from platform_validator.cvm.quota import (
    Limits,
    Quota,
    Refusal,
    Reservation,
    ReservationSpent,
    Use,
    add,
    decide,
)

LIMITS = Limits(Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240, gpu_count=1), max_cvms=3)
KINDS = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count")
ONE = Resources(cpu_cores=1, memory_mb=512, disk_mb=1024)


def sizes() -> st.SearchStrategy[Resources]:
    return st.builds(
        Resources,
        cpu_cores=st.integers(0, 5),
        memory_mb=st.integers(0, 2500),
        disk_mb=st.integers(0, 12_000),
        gpu_count=st.integers(0, 2),
    )


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Resources(cpu_cores=5, memory_mb=9999, disk_mb=99999, gpu_count=9), "cpu"),
        (Resources(cpu_cores=1, memory_mb=9999, disk_mb=99999, gpu_count=9), "memory"),
        (Resources(cpu_cores=1, memory_mb=1, disk_mb=99999, gpu_count=9), "disk"),
        (Resources(cpu_cores=1, memory_mb=1, disk_mb=1, gpu_count=9), "gpu"),
    ],
)
def test_the_first_reason_in_the_guide_s_order_is_given(request_: Resources, reason: str) -> None:
    """CPU, memory, disk, GPU: the count comes last."""
    refusal = decide(LIMITS, [ONE] * 3, request_)
    assert refusal is not None
    assert refusal.reason == reason


def test_the_count_is_the_last_reason() -> None:
    """Everything fits but one CVM more."""
    refusal = decide(LIMITS, [ONE] * 3, Resources(cpu_cores=1, memory_mb=1, disk_mb=1))
    assert refusal == Refusal("cvms", 1, 0)


def test_a_request_of_all_that_is_left_fits() -> None:
    """Limits are inclusive."""
    assert decide(LIMITS, [], LIMITS.resources) is None


@given(st.lists(sizes(), max_size=6), sizes())
def test_what_fits_never_exceeds_the_limits(held: list[Resources], request_: Resources) -> None:
    """Whatever is held, an accepted request leaves every sum within its limit."""
    if decide(LIMITS, held, request_) is not None:
        return
    for kind in KINDS:
        wanted = getattr(request_, kind)
        total = sum(getattr(share, kind) for share in held) + wanted
        assert wanted == 0 or total <= getattr(LIMITS.resources, kind)
    assert len(held) < LIMITS.max_cvms


def test_a_reservation_is_released_once() -> None:
    """The second time is a fault of the caller, and changes nothing."""
    quota = Quota(LIMITS)
    share = quota.reserve(ONE, "job")
    assert isinstance(share, Reservation)
    quota.release(share)
    with pytest.raises(ReservationSpent):
        quota.release(share)
    assert quota.view().cvms == 0


def test_a_rebuild_holds_what_runs_even_over_lowered_limits() -> None:
    """What runs is a fact: free is then nothing, and not less."""
    quota = Quota(Limits(Resources(cpu_cores=1, memory_mb=512, disk_mb=1024), max_cvms=1))
    shares = quota.rebuild([("a", ONE), ("b", ONE)])
    view = quota.view()
    assert (view.cvms, view.used.cpu_cores, view.free.cpu_cores) == (2, 2, 0)
    assert isinstance(quota.reserve(ONE, "c"), Refusal)
    for share in shares:
        quota.release(share)
    assert isinstance(quota.reserve(ONE, "c"), Reservation)


def test_refusals_are_counted_by_reason() -> None:
    """For the metrics and the status page."""
    quota = Quota(LIMITS)
    for _ in range(2):
        quota.reserve(Resources(cpu_cores=5, memory_mb=1, disk_mb=1), "big")
    assert quota.view().refused == {"cpu": 2}


def test_refusals_are_shown_in_the_guide_s_order() -> None:
    """Whatever was refused first."""
    quota = Quota(LIMITS)
    for wanted in (ONE.model_copy(update={"memory_mb": 9999}), ONE.model_copy(update={"cpu_cores": 5})):
        quota.reserve(wanted, "big")
    assert list(quota.view().refused) == ["cpu", "memory"]


def test_each_use_is_an_account_of_its_own_within_the_one() -> None:
    """Challenge, job and ready CVMs; a share moves with what its CVM is for, and goes with it."""
    quota = Quota(LIMITS)
    proving = quota.reserve(ONE, "challenge", use=Use.CHALLENGE)
    job = quota.reserve(ONE, "job")
    assert isinstance(proving, Reservation)
    assert isinstance(job, Reservation)
    assert counts(quota) == {"challenge": 1, "job": 1, "ready": 0}
    quota.reassign(proving, Use.READY)
    assert counts(quota) == {"challenge": 0, "job": 1, "ready": 1}
    assert quota.view().by_use[Use.READY].used == ONE
    quota.reassign(proving, Use.JOB)
    quota.release(job)
    quota.reassign(job, Use.READY)
    assert counts(quota) == {"challenge": 0, "job": 1, "ready": 0}


def counts(quota: Quota) -> dict[str, int]:
    """CVMs by use."""
    return {use.value: part.cvms for use, part in quota.view().by_use.items()}


class QuotaMachine(RuleBasedStateMachine):
    """Reserve, release and crash in any order."""

    shares: Bundle[Reservation] = Bundle("shares")

    def __init__(self) -> None:
        super().__init__()
        self.quota = Quota(LIMITS)
        self.model: list[Reservation] = []

    @rule(target=shares, size=sizes())
    def reserve(self, size: Resources) -> Reservation:
        """A share, or a refusal that the model agrees with."""
        answer = self.quota.reserve(size, "owner")
        expected = decide(LIMITS, [share.resources for share in self.model], size)
        if isinstance(answer, Refusal):
            assert answer == expected
            return Reservation("refused", size)
        assert expected is None
        self.model.append(answer)
        return answer

    @rule(share=consumes(shares))
    def release(self, share: Reservation) -> None:
        """Held shares come back; others never."""
        if any(share is held for held in self.model):
            self.quota.release(share)
            self.model = [held for held in self.model if held is not share]
        else:
            with pytest.raises(ReservationSpent):
                self.quota.release(share)

    @rule(share=shares, use=st.sampled_from(Use))
    def reassign(self, share: Reservation, use: Use) -> None:
        """Its CVM is for something else now; a spent share is passed over."""
        self.quota.reassign(share, use)

    @rule()
    def crash(self) -> None:
        """A new process rebuilds the account from what runs."""
        self.quota = Quota(LIMITS)
        self.model = self.quota.rebuild((share.owner, share.resources) for share in self.model)

    @invariant()
    def the_account_is_the_sum_of_what_is_held(self) -> None:
        """And never above the limits."""
        view = self.quota.view()
        assert view.cvms == len(self.model) <= LIMITS.max_cvms
        for kind in KINDS:
            used = sum(getattr(share.resources, kind) for share in self.model)
            assert getattr(view.used, kind) == used <= getattr(LIMITS.resources, kind)
            assert getattr(view.free, kind) == getattr(LIMITS.resources, kind) - used
        assert add(part.used for part in view.by_use.values()) == view.used
        assert sum(part.cvms for part in view.by_use.values()) == view.cvms


QuotaMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestQuotaMachine = QuotaMachine.TestCase
