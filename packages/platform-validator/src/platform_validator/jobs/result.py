"""From what a CVM sent to the body that is submitted: validated, scored, in its one canonical form. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from platform_protocol.canonical import NotCanonical, canonical_json
from platform_protocol.platform_messages import (
    AttestationKind,
    Claim,
    IsolationLevel,
    ResourceUsage,
    ResultBody,
    ResultOutcome,
)
from platform_validator.scoring import ScoringRule, final_score

MAX_LOGS = 256 * 1024
MAX_LINE = 8 * 1024
MAX_ERROR = 4096
MAX_METRICS = 1000
FINAL_SCORE = "final_score"
_TIMEOUT_CODES = frozenset({"timeout", "timed_out", "job_timeout"})


@dataclass(frozen=True, slots=True)
class Finding:
    """What a job came to. An error means a score of exactly 0.0, never rescaled."""

    outcome: ResultOutcome
    score: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    logs: tuple[str, ...] = ()

    @classmethod
    def failed(cls, error: str) -> Finding:
        """The submission failed."""
        return cls(ResultOutcome.FAILED, metrics={FINAL_SCORE: 0.0}, error=_text(error, MAX_ERROR))

    @classmethod
    def timed_out(cls, error: str) -> Finding:
        """The submission took too long."""
        return cls(ResultOutcome.TIMEOUT, metrics={FINAL_SCORE: 0.0}, error=_text(error, MAX_ERROR))


def judge(
    result: dict[str, Any] | None,
    error: tuple[str, str] | None,
    *,
    max_bytes: int,
    rule: ScoringRule,
    size: int | None = None,
) -> Finding:
    """Validate what the SDK sent and score it.

    Args:
        result: The handler's answer: `score` is a finite number, `metrics` and `logs` are optional.
        error: Code and message; its presence is failure, even when both are empty.
        max_bytes: The largest result, in its canonical form.
        rule: For `metrics.final_score`.
        size: Of a result that is not all here, in bytes of compact JSON.
    """
    if error is not None:
        code, message = error
        said = f"{code}: {message}" if code else message
        return Finding.timed_out(said) if code in _TIMEOUT_CODES else Finding.failed(said)
    if result is None:
        return Finding.failed("invalid_result: neither a result nor an error")
    try:
        size = len(canonical_json(result)) if size is None else size
    except (NotCanonical, RecursionError) as fault:
        return Finding.failed(f"invalid_result: {fault}")
    if size > max_bytes:
        return Finding.failed(f"result_too_large: {size} bytes, at most {max_bytes}")
    return _scored(result, rule)


def _scored(result: dict[str, Any], rule: ScoringRule) -> Finding:
    score = result.get("score")
    if not _finite(score):
        return Finding.failed(f"invalid_result: score: expected a finite number, got {_shown(score)}")
    metrics = result.get("metrics") or {}
    if not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        return Finding.failed(f"invalid_result: metrics: expected at most {MAX_METRICS} named numbers")
    for name, value in metrics.items():
        if not _finite(value):
            return Finding.failed(
                f"invalid_result: metrics.{name[:100]}: expected a finite number, got {_shown(value)}"
            )
    numbers = {name: float(value) for name, value in metrics.items()}
    numbers[FINAL_SCORE] = final_score(float(score), numbers, rule)
    logs = result.get("logs")
    lines = tuple(str(line) for line in logs) if isinstance(logs, list) else ()
    return Finding(ResultOutcome.SUCCEEDED, score=float(score), metrics=numbers, logs=lines)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def result_body(
    finding: Finding,
    *,
    claim: Claim,
    logs: Sequence[str],
    execution_time_ms: int,
    usage: ResourceUsage | None,
    commit: str,
    compose_hash: str,
    isolation_level: IsolationLevel,
    attestation: AttestationKind,
    receipt: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _: None,
) -> bytes:
    """The exact bytes that are stored and sent: RFC 8785 of the result body.

    `receipt` is given the body, and makes what goes into its `receipt`.
    """
    body = ResultBody(
        lease_token=claim.lease.token,
        attempt=claim.attempt,
        outcome=finding.outcome,
        score=finding.score,
        metrics=finding.metrics,
        logs=last_lines([*logs, *finding.logs], MAX_LOGS),
        execution_time_ms=max(execution_time_ms, 0),
        error=finding.error,
        resource_usage=usage
        or ResourceUsage(cpu_time_ms=0, memory_peak_bytes=0, disk_bytes=0, network_bytes=0),
        github_commit=commit,
        compose_hash=compose_hash,
        isolation_level=isolation_level,
        attestation=attestation,
        receipt=None,
    )
    shown = body.model_dump(mode="json")
    return canonical_json(shown | {"receipt": receipt(shown)})


def last_lines(lines: Sequence[str], limit: int) -> list[str]:
    """The last lines that fit into `limit` bytes; a line over 8 KiB is cut."""
    kept: list[str] = []
    size = 0
    for line in reversed(lines):
        text = _text(line, MAX_LINE)
        size += len(text.encode()) + 1
        if size > limit:
            break
        kept.append(text)
    return kept[::-1]


def _text(text: str, limit: int) -> str:
    """Guest text as valid UTF-8 of at most `limit` bytes, with control characters shown as escapes."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    shown = "".join(c if c.isprintable() or c in "\t\n" else f"\\x{ord(c):02x}" for c in clean)
    return shown.encode()[:limit].decode("utf-8", "ignore")
