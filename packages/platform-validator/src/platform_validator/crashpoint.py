"""Named points at which a test may kill the process, or a simulation its validator; inert in production.

A point is armed by name, and strikes at its nth passing: with real processes through the environment
(`arm_from_environment`, SIGKILL), in a simulation through `hook`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping

ENVIRONMENT = "PLATFORM_VALIDATOR_CRASHPOINT"
"""`name` or `name:n`: SIGKILL at the nth passing of that point (default: the first)."""

POINTS = (
    "claim_sent",
    "claim_acknowledged",
    "claim_stored",
    "intent_written",
    "create_sent",
    "id_stored",
    "booting",
    "attesting",
    "running",
    "result_received",
    "result_stored",
    "submit_sent",
    "submit_acknowledged",
    "destroy_sent",
    "destroyed",
    "instance_created",
    "instance_fetched",
    "instance_booted",
    "instance_draining",
    "instance_switched",
    "instance_failed",
    "instance_recycled",
)
"""Every name, in the order in which a job and then a challenge's update passes them."""


class BadCrashpoint(ValueError):
    """No point of `POINTS`, or no count."""


class _Armed:
    hook: Callable[[str], None] | None = None


def crashpoint(name: str) -> None:
    """Pass a point. Does nothing unless a hook is armed."""
    if _Armed.hook is not None:
        _Armed.hook(name)


def arm(hook: Callable[[str], None] | None) -> None:
    """Have every point call `hook` with its name; None disarms."""
    _Armed.hook = hook


def arm_from_environment(environment: Mapping[str, str]) -> None:
    """Arm one point as `PLATFORM_VALIDATOR_CRASHPOINT` says; unset, nothing happens.

    Raises:
        BadCrashpoint: It names no point of `POINTS`, or no count.
    """
    asked = environment.get(ENVIRONMENT)
    if not asked:
        return
    name, _, count = asked.partition(":")
    if name not in POINTS or not (count or "1").isdigit():
        raise BadCrashpoint(
            f"{ENVIRONMENT}: expected one of {', '.join(POINTS)}, with :n or not; got {asked!r}"
        )
    nth, passed = int(count or "1"), Counter[str]()

    def strike(passing: str) -> None:
        passed[passing] += 1
        if passing == name and passed[passing] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    arm(strike)
