"""When a call is made again: the table, what is decided by it, and the page that shows it."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.jobs.lease import LeaseRules
from platform_validator.platform_client.port import (
    AlreadyClaimed,
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
from platform_validator.platform_client.retries import TABLE, UNANSWERED, Again, Kind, Over, Rule, decide

PAGE = Path(__file__).parents[3] / "docs" / "architecture.md"
HEADING = "| call | one try | between tries | silence is borne | a 401 or 403 | what is final | then |"
RNG = random.Random(5)

TAKEN = AlreadyClaimed("409", code="already_claimed", status=409)
LOST = LeaseRefused("409", code="lease_lost", status=409)
GONE = LeaseRefused("410", code="gone", status=410)
UNKNOWN = JobUnknown("404", code="job_not_found", status=404)
INVALID = ResultRefused("422", code="invalid_result", status=422)
UNAUTHORIZED = NotAuthorized("401", code="bad_signature", status=401)
FORBIDDEN = NotAuthorized("403", code="not_registered", status=403)
TEAPOT = PlatformRefused("418", code="teapot", status=418)
SILENCE = PlatformUnavailable("503")
FOREIGN = SubmissionUnusable("elsewhere")
REPLACED = HotkeyInUse("4409")


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        (Kind.CLAIM, TAKEN, "already_claimed"),
        (Kind.CLAIM, LOST, "lease_lost"),
        (Kind.CLAIM, UNKNOWN, "job_not_found"),
        (Kind.CLAIM, UNAUTHORIZED, None),
        (Kind.CLAIM, SILENCE, None),
        (Kind.RENEWAL, LOST, "lease_lost"),
        (Kind.RENEWAL, UNKNOWN, "job_not_found"),
        (Kind.RENEWAL, FORBIDDEN, None),
        (Kind.RENEWAL, TEAPOT, None),
        (Kind.RENEWAL, SILENCE, None),
        (Kind.RELEASE, LOST, "lease_lost"),
        (Kind.RELEASE, UNAUTHORIZED, None),
        (Kind.RESULT, LOST, "lease_lost"),
        (Kind.RESULT, GONE, "gone"),
        (Kind.RESULT, UNKNOWN, "job_not_found"),
        (Kind.RESULT, INVALID, "invalid_result"),
        (Kind.RESULT, TEAPOT, None),
        (Kind.RESULT, FORBIDDEN, None),
        (Kind.RESULT, SILENCE, None),
        (Kind.SUBMISSION, FOREIGN, "submission_unusable"),
        (Kind.SUBMISSION, TEAPOT, "teapot"),
        (Kind.SUBMISSION, UNAUTHORIZED, None),
        (Kind.LOGS, SILENCE, UNANSWERED),
        (Kind.PUSH, REPLACED, UNANSWERED),
        (Kind.PUSH, UNAUTHORIZED, None),
        (Kind.LIST, FORBIDDEN, None),
    ],
)
def test_which_answers_are_final(kind: Kind, error: PlatformError, code: str | None) -> None:
    """Which answers are final; None: it is tried again."""
    step = decide(kind, error, failures=1, waited=0.0, rng=RNG)
    if code is None:
        assert isinstance(step, Again)
    else:
        assert step == Over(code)


@pytest.mark.parametrize("kind", [Kind.CLAIM, Kind.RELEASE, Kind.SUBMISSION])
@pytest.mark.robustness(12, "401", "403")
def test_a_401_is_borne_three_times(kind: Kind) -> None:
    """Once is an accident; for good, the key or the registration is wrong, and the job is let go."""
    steps = [decide(kind, UNAUTHORIZED, failures=tries, waited=0.0, rng=RNG) for tries in (1, 2, 3, 4)]
    assert [isinstance(step, Again) for step in steps] == [True, True, True, False]
    assert steps[3] == Over("bad_signature")


@pytest.mark.robustness(12, "403")
def test_a_result_and_a_renewal_bear_any_number() -> None:
    """A stored result outlives a revoked key; a lease its grace."""
    for kind in (Kind.RESULT, Kind.RENEWAL):
        assert isinstance(decide(kind, FORBIDDEN, failures=10_000, waited=60.0, rng=RNG), Again)


@pytest.mark.parametrize(("kind", "seconds"), [(Kind.CLAIM, 120), (Kind.RENEWAL, 3600)])
def test_silence_is_borne_for_a_time(kind: Kind, seconds: int) -> None:
    """And then it is over, without an answer."""
    assert isinstance(decide(kind, SILENCE, failures=9, waited=seconds - 1, rng=RNG), Again)
    assert decide(kind, SILENCE, failures=9, waited=seconds, rng=RNG) == Over(UNANSWERED)


def test_the_caller_s_patience_wins() -> None:
    """A drain, or `jobs.outage_grace`, may set another limit."""
    short = timedelta(seconds=3)
    step = decide(Kind.RENEWAL, SILENCE, failures=1, waited=3.0, rng=RNG, patience=short)
    assert step == Over(UNANSWERED)


@given(
    kind=st.sampled_from(sorted(set(Kind) - {Kind.LOGS})),
    failures=st.integers(1, 10**6),
    asked=st.one_of(st.none(), st.timedeltas()),
)
@pytest.mark.robustness(12, "retry-after")
def test_no_wait_is_absurd(kind: Kind, failures: int, asked: timedelta | None) -> None:
    """Whatever the server asks for, a wait lies between what it asked and the rule's cap."""
    step = decide(kind, PlatformUnavailable("503", asked), failures=failures, waited=0.0, rng=RNG)
    assert isinstance(step, Again)
    cap = TABLE[kind].pause.cap
    least = timedelta(0) if asked is None else min(asked, cap)
    assert least.total_seconds() <= step.after <= cap.total_seconds()


def test_the_lease_s_grace_is_the_table_s() -> None:
    """Two places name it; they name the same hour."""
    assert LeaseRules().outage_grace == TABLE[Kind.RENEWAL].patience


_FINAL = {
    AlreadyClaimed: "taken",
    PlatformRefused: "any other refusal",
    LeaseRefused: "409, 410",
    JobUnknown: "404",
    ResultRefused: "413, 422",
    SubmissionUnusable: "wrong bytes",
    HotkeyInUse: "4409",
}


def _said(rule: Rule, kind: Kind) -> str:
    first, cap = (f"{each.total_seconds():g}" for each in (rule.pause.first, rule.pause.cap))
    patience = "no end" if rule.patience is None else _time(rule.patience)
    return " | ".join(
        [
            f"| {kind.value}",
            _time(rule.deadline),
            f"{first} to {cap} s" if cap != "0" else "none",
            patience if rule.patience != timedelta(0) else "not at all",
            "no end" if rule.bears is None else f"{rule.bears} times" if rule.bears else "not at all",
            ", ".join(_FINAL[each] for each in rule.final) or "none",
            f"{rule.then} |",
        ]
    )


def _time(length: timedelta) -> str:
    seconds = int(length.total_seconds())
    for size, name in ((3600, "h"), (60, "min")):
        if seconds and seconds % size == 0:
            return f"{seconds // size} {name}"
    return f"{seconds} s"


def test_the_page_shows_the_table() -> None:
    """Row for row: whoever changes a rule changes the page, and the other way round."""
    lines = PAGE.read_text().splitlines()
    start = lines.index(HEADING) + 2
    assert lines[start : start + len(TABLE)] == [_said(rule, kind) for kind, rule in TABLE.items()]
    assert not lines[start + len(TABLE)].startswith("|")
