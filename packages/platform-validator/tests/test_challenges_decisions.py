"""What is decided about challenges: when to follow, how much to keep ready, who makes room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.challenges.demand import MOST, WINDOW, Demand, pool_size
from platform_validator.challenges.settling import AT_ONCE, FIRST_HOLD, LONGEST_HOLD, followed_at
from platform_validator.challenges.yielding import PATIENCE, RoomFacts, Step, next_step

LIMIT = PATIENCE.total_seconds()


def test_a_few_changes_are_followed_at_once() -> None:
    """The first three within ten minutes wait for nothing."""
    for count in range(1, AT_ONCE + 1):
        changes = [float(at) for at in range(count)]
        assert followed_at(changes) == changes[-1]


def test_a_commit_that_flaps_must_stand_longer_each_time_and_never_for_ever() -> None:
    """The hold doubles from 15 s up to two minutes."""
    changes = [float(at) for at in range(40)]
    holds = [followed_at(changes[:count]) - changes[count - 1] for count in range(AT_ONCE + 1, 40)]
    assert holds[:4] == [15.0, 30.0, 60.0, 120.0]
    assert holds[0] == FIRST_HOLD.total_seconds()
    assert set(holds[4:]) == {LONGEST_HOLD.total_seconds()}


def test_a_calm_time_makes_up_for_a_flapping_one() -> None:
    """Changes of more than ten minutes ago count no more."""
    assert followed_at([0.0, 1.0, 2.0, 3.0, 4.0, 700.0]) == 700.0


@given(
    declared=st.integers(0, 64),
    ages=st.lists(st.floats(0, 2000), max_size=60),
    boot_s=st.floats(0, 600),
)
def test_the_pool_is_never_smaller_than_declared_and_bounded(
    declared: int, ages: list[float], boot_s: float
) -> None:
    """None is kept when none is declared; demand adds, up to a limit that a declaration may pass."""
    size = pool_size(declared, [3000.0 - age for age in ages], boot_s=boot_s, now=3000.0)
    assert size == 0 if declared == 0 else declared <= size <= max(declared, MOST)


def test_the_pool_holds_the_jobs_that_come_while_one_boots() -> None:
    """60 claims in five minutes, 20 s to boot: four come meanwhile."""
    claims = [float(at) for at in range(0, 300, 5)]
    assert pool_size(1, claims, boot_s=20.0, now=299.0) == 4
    assert pool_size(1, claims, boot_s=1.0, now=299.0) == 1
    assert pool_size(1, claims, boot_s=20.0, now=299.0 + WINDOW.total_seconds()) == 1


def test_demand_forgets_and_follows_newer_boots() -> None:
    """A boot that took long once does not keep the pool large for ever."""
    demand = Demand()
    for at in range(0, 300, 5):
        demand.claimed(float(at))
    demand.booted(100.0)
    assert demand.wanted(1, 299.0) == MOST
    for _ in range(30):
        demand.booted(1.0)
    assert demand.wanted(1, 299.0) == 1


@pytest.mark.parametrize(
    ("waited", "idle", "holds", "draining", "step"),
    [
        (0, True, True, False, Step.YIELD),
        (LIMIT * 9, True, True, False, Step.YIELD),
        (0, False, True, False, Step.WAIT),
        (LIMIT - 1, False, True, False, Step.WAIT),
        (LIMIT, False, True, False, Step.DRAIN),
        (LIMIT, False, True, True, Step.WAIT),
        (LIMIT, False, False, False, Step.WAIT),
    ],
)
def test_who_makes_room(waited: float, idle: bool, holds: bool, draining: bool, step: Step) -> None:
    """Idle ready CVMs, then nobody for a while, then the Active instance, if that makes room at all."""
    assert next_step(RoomFacts(waited, idle, holds, draining)) is step
