"""Reading the Platform API's answers: strict JSON within caps, and problems mapped to the port's errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import Any

from platform_validator.platform_client.port import (
    AlreadyClaimed,
    JobUnknown,
    LeaseRefused,
    NotAuthorized,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
)
from platform_validator.platform_client.retries import retry_after

MAX_BODY = 8 * 1024 * 1024
MAX_DEPTH = 32
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
_HTTP_REDIRECT = range(300, 400)
_HTTP_SERVER_ERROR = 500
_TRY_LATER = frozenset({408, 425, 429})
_NOT_AUTHORIZED = frozenset({401, 403})
_KINDS: Mapping[int, type[PlatformRefused]] = {
    404: JobUnknown,
    409: LeaseRefused,
    410: LeaseRefused,
    413: ResultRefused,
    422: ResultRefused,
}


class Call(Enum):
    """Kinds of calls, as far as their refusals differ."""

    PLAIN = auto()
    CLAIM = auto()
    LEASE = auto()
    RESULT = auto()


_ABOUT_A_JOB = frozenset({Call.CLAIM, Call.LEASE, Call.RESULT})


def read_json(body: bytes) -> Any:
    """Parse an answer.

    Raises:
        PlatformUnavailable: Not JSON, nested deeper than `MAX_DEPTH`, duplicate keys, or numbers that
            are not finite: this is no answer of the Platform API's.
    """
    depth = 0
    for token in _TOKENS.finditer(body):
        mark = token.group()[:1]
        if mark in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise PlatformUnavailable(f"the answer is nested deeper than {MAX_DEPTH} levels")
        elif mark in b"]}":
            depth -= 1
    try:
        return json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PlatformUnavailable(f"the answer is no JSON of the Platform API's: {_short(error)}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def problem_code(body: bytes) -> tuple[str, str, Mapping[str, Any]]:
    """The stable word, the sentence and the whole object of a problem; empty where there is none."""
    try:
        problem = read_json(body)
    except PlatformUnavailable:
        return "", "", {}
    if not isinstance(problem, dict):
        return "", "", {}
    code, detail = problem.get("code"), problem.get("detail") or problem.get("title")
    return (
        code[:100] if isinstance(code, str) else "",
        detail[:500] if isinstance(detail, str) else "",
        problem,
    )


def refusal(call: Call, status: int, headers: Mapping[str, str], body: bytes, now: datetime) -> PlatformError:
    """The port's error for an answer that is no success."""
    code, detail, _ = problem_code(body)
    said = f"the Platform API answered {status} {code}: {detail}".rstrip(": ")
    if status in _HTTP_REDIRECT:
        return PlatformUnavailable(f"{said}: a redirect, which is never followed")
    if status in _TRY_LATER or status >= _HTTP_SERVER_ERROR:
        return PlatformUnavailable(said, retry_after(headers.get("Retry-After"), now))
    kind = _kind(call, status, code)
    if not code and kind is not NotAuthorized:
        # A 404 or 409 of some proxy in between decides nothing about a job.
        return PlatformUnavailable(f"{said}, without a problem code: not the Platform API's answer")
    return kind(said, code=code or "unauthorized", status=status)


def _kind(call: Call, status: int, code: str) -> type[PlatformRefused]:
    if status in _NOT_AUTHORIZED and code != "no_lease":
        return NotAuthorized
    if call is Call.CLAIM and code == "already_claimed":
        return AlreadyClaimed
    return _KINDS.get(status, PlatformRefused) if call in _ABOUT_A_JOB else PlatformRefused


def _short(error: BaseException) -> str:
    return str(error)[:200]
