"""When a call to the Platform API is made again, and when its answer stands: one table, decided purely.

`docs/architecture.md` shows the same table, and a test holds the two together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum

from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import (
    HotkeyInUse,
    JobUnknown,
    LeaseRefused,
    NotAuthorized,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
    SubmissionUnusable,
)

LONGEST_RETRY_AFTER = timedelta(hours=1)
UNANSWERED = "unanswered"
_DIGITS = 12


class Kind(StrEnum):
    """Kinds of calls, as far as their retries differ."""

    LIST = "list"
    CLAIM = "claim"
    RENEWAL = "renewal"
    RELEASE = "release"
    LOGS = "logs"
    SUBMISSION = "submission"
    RESULT = "result"
    PUSH = "push"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one kind of call is repeated.

    `deadline`: of one try, from connecting to the last byte. `pause`: between two tries; a Retry-After is
    obeyed up to its cap. `patience`: how long silence is borne; None: for as long as there is a reason to
    ask, which the caller knows. `bears`: up to how many failed tries in a row an answer that decides
    nothing about the job (401, 403, and refusals not in `final`) is borne; None: no end. `final`: errors
    that are the answer, though never a 401 or 403. `then`: what becomes of it.
    """

    deadline: timedelta
    pause: Backoff
    patience: timedelta | None
    bears: int | None
    final: tuple[type[PlatformError], ...]
    then: str


def _pause(first: float, cap: float) -> Backoff:
    return Backoff(timedelta(seconds=first), timedelta(seconds=cap))


_CALL = timedelta(seconds=20)

TABLE: Mapping[Kind, Rule] = {
    Kind.LIST: Rule(_CALL, _pause(5, 20), None, None, (), "asked again by the next pass; what runs goes on"),
    Kind.CLAIM: Rule(
        _CALL,
        _pause(1, 10),
        timedelta(minutes=2),
        3,
        (PlatformRefused,),
        "the claim ends in the journal; a lease that was granted unheard lapses",
    ),
    Kind.RENEWAL: Rule(
        timedelta(seconds=10),
        _pause(1, 10),
        timedelta(hours=1),
        None,
        (LeaseRefused, JobUnknown),
        "the work stops, its CVM is destroyed, nothing is submitted",
    ),
    Kind.RELEASE: Rule(_CALL, _pause(0.5, 10), None, 3, (PlatformRefused,), "the lease lapses by itself"),
    Kind.LOGS: Rule(_CALL, _pause(0, 0), timedelta(0), 0, (PlatformRefused,), "these lines are dropped"),
    Kind.SUBMISSION: Rule(
        timedelta(minutes=5),
        _pause(0.5, 10),
        None,
        3,
        (PlatformRefused, SubmissionUnusable),
        "the job is given back",
    ),
    Kind.RESULT: Rule(
        _CALL,
        _pause(1, 30),
        None,
        None,
        (LeaseRefused, ResultRefused, JobUnknown),
        "it leaves the outbox under the refusal's code",
    ),
    Kind.PUSH: Rule(
        timedelta(seconds=15), _pause(1, 60), None, None, (HotkeyInUse,), "no more jobs are claimed; exit 5"
    ),
}
"""Every rule. A renewal's patience is `jobs.outage_grace` where that is set."""


@dataclass(frozen=True, slots=True)
class Again:
    """Try again after that many seconds."""

    after: float


@dataclass(frozen=True, slots=True)
class Over:
    """Try no more: a refusal's code, or `unanswered`."""

    code: str


def decide(
    kind: Kind,
    error: PlatformError,
    *,
    failures: int,
    waited: float,
    rng: random.Random,
    patience: timedelta | None = None,
) -> Again | Over:
    """What follows a failed try.

    Args:
        kind: Which rule.
        error: What the try brought.
        failures: Tries in a row that brought no deciding answer, this one included.
        waited: Seconds since the first of them began.
        rng: Jitter.
        patience: Instead of the rule's, where the caller has its own.
    """
    rule = TABLE[kind]
    # 1. An answer that decides. A 401 or 403 says something about us, and nothing about the job.
    if isinstance(error, rule.final) and not isinstance(error, NotAuthorized):
        return Over(code_of(error))
    # 2. An answer that decides nothing is borne for a while: keys, clocks and proxies recover.
    if isinstance(error, PlatformRefused) and rule.bears is not None and failures > rule.bears:
        return Over(error.code)
    # 3. Silence is borne for longer.
    limit = rule.patience if patience is None else patience
    if limit is not None and waited >= limit.total_seconds():
        return Over(UNANSWERED)
    return Again(max(rule.pause.wait(failures, rng), asked_for(kind, error)))


def asked_for(kind: Kind, error: Exception) -> float:
    """Seconds for which the server wants to be left alone, as far as it is obeyed."""
    asked = error.retry_after if isinstance(error, PlatformUnavailable) else None
    if asked is None:
        return 0.0
    return min(max(asked, timedelta(0)), TABLE[kind].pause.cap).total_seconds()


def code_of(error: PlatformError) -> str:
    """The stable word for an error."""
    if isinstance(error, PlatformRefused):
        return error.code
    return "submission_unusable" if isinstance(error, SubmissionUnusable) else UNANSWERED


def retry_after(value: str | None, now: datetime) -> timedelta | None:
    """Retry-After in either form (RFC 9110 10.2.3), capped at an hour; None when absent or absurd."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        seconds = float(min(int(text[:_DIGITS]), int(LONGEST_RETRY_AFTER.total_seconds())))
        return timedelta(seconds=seconds)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(moment - now, timedelta(0)), LONGEST_RETRY_AFTER)
