"""What a request does to a value: decided purely, over what is in clear.

| request | writes | refused as |
|---|---|---|
| set | the value | `too_many_keys`, `challenge_full` |
| delete | removes the key; one that is not there is no error | |
| increment | number + by; one that is not there counts as 0 | `not_a_number`, `out_of_range`, as set |
| compare and set | the value, at the expected version alone (0: not there) | `version_conflict`, as set |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from platform_protocol.session.messages import (
    JobError,
    ValuesCas,
    ValuesDelete,
    ValuesIncrement,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.values import value_text

_LARGEST = 2**53 - 1
_MESSAGE = 1000

ValuesChange = ValuesSet | ValuesDelete | ValuesIncrement | ValuesCas


@dataclass(frozen=True, slots=True)
class ValueLimits:
    """Of one challenge: how many keys, and bytes of keys and JSON texts in clear, together."""

    keys: int = 10_000
    bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Present:
    """A value that is there."""

    value: Any
    version: int
    size: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What a change is decided on: see `ValueSlot`; `present` in clear."""

    present: Present | None
    last_version: int
    keys: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is answered, and what is written: `text` (RFC 8785), a removal, or nothing."""

    answer: ValuesResult
    text: bytes | None = None
    size: int = 0
    remove: bool = False


def decide(request: ValuesChange, facts: Facts, limits: ValueLimits) -> Decision:
    """What a request does.

    Raises:
        ValueInvalid: The value cannot be kept.
    """
    match request:
        case ValuesSet():
            return _put(request, request.value, facts, limits)
        case ValuesDelete():
            return Decision(ValuesResult(request_id=request.request_id), remove=True)
        case ValuesIncrement():
            return _increment(request, facts, limits)
        case ValuesCas():
            version = facts.present.version if facts.present is not None else 0
            if version != request.expected_version:
                said = f"expected version {request.expected_version}, it is {version}"
                return _refuse(request, "version_conflict", said, version)
            return _put(request, request.value, facts, limits)


def refusal(request_id: str, code: str, message: str, version: int | None = None) -> ValuesResult:
    """An answer that is an error."""
    return ValuesResult(
        request_id=request_id, version=version, error=JobError(code=code, message=message[:_MESSAGE])
    )


def _increment(request: ValuesIncrement, facts: Facts, limits: ValueLimits) -> Decision:
    before = facts.present.value if facts.present is not None else 0
    if isinstance(before, bool) or not isinstance(before, int | float):
        return _refuse(request, "not_a_number", "the value is no number")
    after = before + request.by
    if not math.isfinite(after) or (isinstance(after, int) and abs(after) > _LARGEST):
        return _refuse(request, "out_of_range", "the sum is too large")
    return _put(request, after, facts, limits)


def _put(request: ValuesChange, value: Any, facts: Facts, limits: ValueLimits) -> Decision:
    text = value_text(value)
    size = len(request.key.encode()) + len(text)
    before = facts.present.size if facts.present is not None else 0
    if facts.present is None and facts.keys >= limits.keys:
        return _refuse(request, "too_many_keys", f"this challenge keeps {facts.keys} keys, the most allowed")
    if size > before and facts.bytes - before + size > limits.bytes:
        said = f"this challenge keeps {facts.bytes} bytes; with this value it would be over {limits.bytes}"
        return _refuse(request, "challenge_full", said)
    answer = ValuesResult(request_id=request.request_id, value=value, version=facts.last_version + 1)
    return Decision(answer, text=text, size=size)


def _refuse(request: ValuesChange, code: str, message: str, version: int | None = None) -> Decision:
    return Decision(refusal(request.request_id, code, message, version))
