"""From what a CVM sent to the body that is submitted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId, JobId, LeaseToken
from platform_protocol.platform_messages import (
    AttestationKind,
    Claim,
    IsolationLevel,
    Lease,
    ResultBody,
    ResultOutcome,
)
from platform_protocol.resources import Resources
from platform_validator.jobs.result import Finding, judge, last_lines, result_body
from platform_validator.scoring import ScoringRule

CLAIM = Claim(
    id=JobId("job"),
    challenge_id=ChallengeId("challenge"),
    attempt=2,
    lease=Lease(token=LeaseToken("token"), term_s=120),
    timeout_s=60,
    resources=Resources(cpu_cores=1, memory_mb=1, disk_mb=1),
)

DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]


def judged(result: dict[str, Any] | None, error: tuple[str, str] | None = None) -> Finding:
    """Judge with the default rule and 1 KiB."""
    return judge(result, error, max_bytes=1024, rule=ScoringRule())


def body(finding: Finding, logs: list[str] | None = None) -> dict[str, Any]:
    """The body, read back."""
    data = result_body(
        finding,
        claim=CLAIM,
        logs=logs or [],
        execution_time_ms=7,
        usage=None,
        commit="a" * 40,
        compose_hash="b" * 64,
        isolation_level=IsolationLevel.CONTAINER,
        attestation=AttestationKind.SIMULATED,
    )
    read: dict[str, Any] = json.loads(data)
    assert canonical_json(read) == data
    ResultBody.model_validate(read)
    return read


def test_a_good_result_keeps_its_raw_score_and_gets_a_final_one() -> None:
    """A good result keeps its raw score and gets a final one."""
    found = judged({"score": 5, "metrics": {"accuracy": 0.5}, "logs": ["a line"]})
    assert found.outcome is ResultOutcome.SUCCEEDED
    assert (found.score, found.metrics, found.error) == (5.0, {"accuracy": 0.5, "final_score": 1.0}, None)
    sent = body(found, ["first"])
    assert sent["logs"] == ["first", "a line"]
    assert (sent["attempt"], sent["lease_token"], sent["receipt"]) == (2, "token", None)
    assert (sent["isolation_level"], sent["attestation"]) == ("Container", "simulated")


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "invalid_result"),
        ({}, "score"),
        ({"score": "1"}, "score"),
        ({"score": True}, "score"),
        ({"score": None}, "score"),
        ({"score": math.nan}, "score"),
        ({"score": math.inf}, "score"),
        ({"score": 2**60}, "score"),
        ({"score": 1, "metrics": [1]}, "metrics"),
        ({"score": 1, "metrics": {"a": "1"}}, "metrics.a"),
        ({"score": 1, "metrics": {"a": math.inf}}, "a"),
        ({"score": 1, "x": "\ud800"}, "x"),
        ({"score": 1, "x": "y" * 2000}, "result_too_large"),
        ({"score": 1, "x": DEEP}, "nested"),
    ],
)
@pytest.mark.robustness(24, "nan", "200-mb-result", "deep-json")
def test_what_is_no_result_is_the_submissions_failure_with_a_score_of_zero(
    result: dict[str, Any] | None, said: str
) -> None:
    """What is no result is the submissions failure with a score of zero."""
    found = judged(result)
    assert found.outcome is ResultOutcome.FAILED
    assert found.score == 0.0
    assert found.metrics == {"final_score": 0.0}
    assert found.error is not None
    assert said in found.error
    body(found)


def test_failure_is_the_presence_of_an_error_even_an_empty_one() -> None:
    """Failure is the presence of an error even an empty one."""
    found = judged({"score": 1}, ("", ""))
    assert (found.outcome, found.score, found.error) == (ResultOutcome.FAILED, 0.0, "")


def test_a_timeout_inside_the_cvm_is_a_timeout() -> None:
    """A timeout inside the cvm is a timeout."""
    assert judged(None, ("timeout", "took too long")).outcome is ResultOutcome.TIMEOUT


@given(st.text(st.characters(), max_size=200))
@pytest.mark.robustness(24, "utf-8")
def test_any_error_text_makes_a_body_that_the_api_can_read(text: str) -> None:
    """Any error text makes a body that the api can read."""
    found = judged(None, ("handler_failed", text * 100))
    assert len((found.error or "").encode()) <= 4096
    body(found, [text])


@pytest.mark.robustness(24, "escapes")
def test_terminal_escapes_are_shown_and_not_sent() -> None:
    """Terminal escapes are shown and not sent."""
    assert last_lines(["\x1b[31mred\r"], 100) == ["\\x1b[31mred\\x0d"]


@given(st.lists(st.text(max_size=50)), st.integers(0, 500))
@pytest.mark.robustness(24, "lines")
def test_the_last_lines_fit(lines: list[str], limit: int) -> None:
    """The last lines fit."""
    kept = last_lines(lines, limit)
    assert sum(len(line.encode()) + 1 for line in kept) <= limit
    assert len(kept) <= len(lines)


@pytest.mark.robustness(24, "no-newline")
def test_one_long_line_is_cut() -> None:
    """One long line is cut."""
    assert [len(line) for line in last_lines(["x" * 100_000], 256 * 1024)] == [8192]
