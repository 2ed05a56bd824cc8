"""Loops that stopped turning are named."""

from __future__ import annotations

from datetime import timedelta

import pytest

from platform_validator.clock import SystemClock
from platform_validator.daemon.pulse import Pulse


class Hands(SystemClock):
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def pulse(clock: Hands) -> Pulse:
    return Pulse(clock, within=timedelta(seconds=10))


def test_a_loop_that_turns_is_not_silent(pulse: Pulse, clock: Hands) -> None:
    pulse.expect("jobs")
    for _ in range(5):
        clock.at += 9
        pulse.of("jobs")()
    assert pulse.silent() == {}


def test_a_loop_that_stopped_is_named_with_its_silence(pulse: Pulse, clock: Hands) -> None:
    """And no longer when it turns again."""
    pulse.expect("jobs")
    pulse.expect("fleet")
    clock.at += 11
    pulse.beat("fleet")
    assert pulse.silent() == {"jobs": 11.0}
    pulse.beat("jobs")
    assert pulse.silent() == {}


def test_a_loop_that_never_began_to_turn_is_silent_too(pulse: Pulse, clock: Hands) -> None:
    pulse.expect("jobs")
    clock.at += 11
    assert "jobs" in pulse.silent()


def test_being_started_again_is_no_turn(pulse: Pulse, clock: Hands) -> None:
    """A loop that dies at once each time is as good as none."""
    pulse.expect("jobs")
    clock.at += 11
    pulse.expect("jobs")
    assert "jobs" in pulse.silent()


def test_a_loop_that_was_ended_is_not_missed(pulse: Pulse, clock: Hands) -> None:
    """Nor by a late beat of it."""
    pulse.expect("jobs")
    pulse.forget("jobs")
    pulse.beat("jobs")
    clock.at += 11
    assert pulse.silent() == {}
