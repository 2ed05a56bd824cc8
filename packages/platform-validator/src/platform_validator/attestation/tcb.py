"""Whether a platform's TCB status is good enough: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from platform_validator.attestation.checks import Check

STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
"""Intel's words for a TCB level, from best to worst; Revoked is never accepted."""

ANY = "any"


@dataclass(frozen=True, slots=True)
class TcbRules:
    """What is accepted.

    Args:
        statuses: Accepted whatever their age.
        advisories: Accepted Intel advisories (INTEL-SA-…); `any` accepts all.
        grace: How long an out-of-date platform is accepted after the level that it lacks was published, if
            its status is not accepted anyway.
    """

    statuses: tuple[str, ...] = ("UpToDate",)
    advisories: tuple[str, ...] = ()
    grace: timedelta = timedelta(0)


def judge_tcb(
    status: str, advisories: Sequence[str], since: datetime | None, *, rules: TcbRules, now: datetime
) -> list[tuple[Check, str]]:
    """What is wrong with it, at most one finding for each of the two checks."""
    found = []
    outdated = status.startswith("OutOfDate")
    in_grace = outdated and since is not None and now < since + rules.grace
    if status not in rules.statuses and not in_grace:
        detail = f"the platform's TCB is {status}; accepted: {', '.join(rules.statuses) or 'none'}"
        if outdated and since is not None and rules.grace:
            detail += f", and within {rules.grace} of {since:%Y-%m-%d}, when the level it lacks was published"
        found.append((Check.TCB_STATUS, f"{detail} (attestation.tcb_statuses, attestation.tcb_grace)"))
    if ANY not in rules.advisories:
        unknown = [one for one in advisories if one not in rules.advisories]
        if unknown:
            found.append(
                (Check.ADVISORIES, f"{', '.join(unknown)} apply to the platform (attestation.advisories)")
            )
    return found
