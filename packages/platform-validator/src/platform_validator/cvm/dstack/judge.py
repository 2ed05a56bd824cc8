"""Judges any VMM: runs every check, tells each deviation, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from platform_validator.cvm.conformance import CASES, Case
from platform_validator.cvm.dstack.bench import Bench, Deviation, Skipped, require
from platform_validator.cvm.dstack.checks import CHECKS, Check
from platform_validator.cvm.dstack.guest_checks import GUEST_CHECKS
from platform_validator.cvm.dstack.vm_checks import VM_CHECKS
from platform_validator.cvm.vmm import VmmError

STARTS = frozenset(case.__name__ for case in CASES if case.__name__ != "an_unknown_vm_is_not_found") - {
    "it_names_its_version_and_images"
}
"""Cases of the port that start VMs: the port has no other kind."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How one check went: `ok`, `deviation` or `skipped`, and why."""

    check: str
    outcome: str
    detail: str = ""


@dataclass
class Verdict:
    """All of them."""

    version: str
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        """How many went so."""
        return sum(one.outcome == outcome for one in self.findings)

    def summary(self) -> dict[str, object]:
        """As the last line says it."""
        return {
            "checks": len(self.findings),
            "failed": self.count("deviation"),
            "skipped": self.count("skipped"),
            "version": self.version,
            "wall_s": round(self.seconds, 1),
        }


def all_checks() -> tuple[Check | Case, ...]:
    """The wire's, the VMs', and the port's own through the validator's client."""
    return (*CHECKS, *VM_CHECKS, *GUEST_CHECKS, *CASES)


async def judge(bench: Bench, tell: Callable[[Finding], None]) -> Verdict:
    """Run every check in turn; `tell` hears of each as it ends."""
    began, verdict = time.monotonic(), Verdict(bench.can.version)
    for check in (*all_checks(), nothing_is_left):
        finding = await judged(bench, check)
        verdict.findings.append(finding)
        tell(finding)
    verdict.seconds = time.monotonic() - began
    return verdict


async def nothing_is_left(bench: Bench) -> None:
    """What this run made, also by a check that failed in the middle, can be removed."""
    left = await bench.sweep()
    require(not left, f"VMs of this run could not be removed: {', '.join(left)}")


async def judged(bench: Bench, check: Check | Case) -> Finding:
    """One check's finding; never raises."""
    name = check.__name__
    if name in STARTS and not bench.start:
        return Finding(name, "skipped", "it starts a VM: --start allows it")
    try:
        await check(bench)
    except Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except (Deviation, AssertionError, VmmError, TimeoutError) as error:
        return Finding(name, "deviation", str(error) or type(error).__name__)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Finding(name, "deviation", f"an answer of another form: {type(error).__name__} {error}")
    return Finding(name, "ok")
