"""Dynamic values: what a challenge keeps between its jobs, one scope a challenge, durable when answered.

A write carries (session, request): one that is sent again after a resume is answered and not applied again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from platform_protocol.canonical import NotCanonical, canonical_json
from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import (
    JobError,
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesResult,
    ValuesSet,
)
from platform_validator.clock import Clock
from platform_validator.errors import ValidatorError
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import ValueRecord

MAX_KEY = 512
MAX_VALUE = 256 * 1024
_DELETE = "!delete"
_LARGEST = 2**53 - 1

ValuesRequest = ValuesGet | ValuesSet | ValuesDelete | ValuesList | ValuesIncrement | ValuesCas
_Change = Callable[[ValueRecord | None], tuple[str | None, str]]


class ValueRefused(ValidatorError):
    """A request that is answered with an error: `code` is its stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DynamicValues:
    """Answers values requests over the Store.

    Args:
        store: Keeps the values and the replies.
        clock: For `updated_at`.
    """

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        """Answer one request of a challenge's session; refusals are answers too, never exceptions."""
        try:
            match request:
                case ValuesGet():
                    return await self._get(challenge_id, request)
                case ValuesList():
                    return await self._list(challenge_id, request)
                case _:
                    return await self._change(challenge_id, session_id, request)
        except (ValueRefused, NotCanonical) as error:
            code = error.code if isinstance(error, ValueRefused) else "not_json"
            return _refused(request.request_id, code, str(error))
        except StoreUnavailable:
            return _refused(request.request_id, "store_unavailable", "nothing changed; try again later")

    async def _get(self, challenge_id: ChallengeId, request: ValuesGet) -> ValuesResult:
        record = await self._store.value(challenge_id, _checked(request.key))
        if record is None:
            return ValuesResult(request_id=request.request_id)
        return _found(request.request_id, record.value, record.version)

    async def _list(self, challenge_id: ChallengeId, request: ValuesList) -> ValuesResult:
        records = await self._store.values(challenge_id, request.prefix, request.limit)
        return ValuesResult(request_id=request.request_id, keys=[record.key for record in records])

    async def _change(
        self,
        challenge_id: ChallengeId,
        session_id: str,
        request: ValuesSet | ValuesDelete | ValuesIncrement | ValuesCas,
    ) -> ValuesResult:
        reply = await self._store.change_value(
            challenge_id,
            _checked(request.key),
            change=_change_of(request),
            session_id=session_id,
            request_id=request.request_id,
            at=self._clock.now(),
        )
        return ValuesResult.model_validate_json(reply.reply)


def _change_of(request: ValuesSet | ValuesDelete | ValuesIncrement | ValuesCas) -> _Change:
    """The pure change that a request stands for."""
    match request:
        case ValuesSet():
            text = _text(request.value)
            return lambda present: (text, _reply(request.request_id, text, _version(present) + 1))
        case ValuesDelete():
            return lambda present: _deleted(request.request_id, present)
        case ValuesIncrement():
            return lambda present: _incremented(request, present)
        case ValuesCas():
            text = _text(request.value)
            return lambda present: _swapped(request, text, present)


def _deleted(request_id: str, present: ValueRecord | None) -> tuple[str | None, str]:
    reply = ValuesResult(request_id=request_id).model_dump_json()
    return None, reply if present is None else _DELETE + reply


def _incremented(request: ValuesIncrement, present: ValueRecord | None) -> tuple[str | None, str]:
    before = json.loads(present.value) if present is not None else 0
    if isinstance(before, bool) or not isinstance(before, int | float):
        return None, _refused(request.request_id, "not_a_number", "the value is no number").model_dump_json()
    after = before + request.by
    if not math.isfinite(after) or (isinstance(after, int) and abs(after) > _LARGEST):
        return None, _refused(request.request_id, "out_of_range", "the sum is too large").model_dump_json()
    text = _text(after)
    return text, _reply(request.request_id, text, _version(present) + 1)


def _swapped(request: ValuesCas, text: str, present: ValueRecord | None) -> tuple[str | None, str]:
    version = _version(present)
    if version != request.expected_version:
        said = f"expected version {request.expected_version}, it is {version}"
        return None, _refused(request.request_id, "version_conflict", said, version).model_dump_json()
    return text, _reply(request.request_id, text, version + 1)


def _version(present: ValueRecord | None) -> int:
    return present.version if present is not None else 0


def _reply(request_id: str, text: str, version: int) -> str:
    return _found(request_id, text, version).model_dump_json()


def _found(request_id: str, text: str, version: int) -> ValuesResult:
    return ValuesResult(request_id=request_id, value=json.loads(text), version=version)


def _refused(request_id: str, code: str, message: str, version: int | None = None) -> ValuesResult:
    return ValuesResult(
        request_id=request_id, version=version, error=JobError(code=code, message=message[:1000])
    )


def _checked(key: str) -> str:
    if not key or len(key.encode("utf-8", "replace")) > MAX_KEY or not key.isprintable():
        raise ValueRefused("bad_key", f"expected 1 to {MAX_KEY} bytes of printable text")
    return key


def _text(value: Any) -> str:
    text = canonical_json(value)
    if len(text) > MAX_VALUE:
        raise ValueRefused("value_too_large", f"expected at most {MAX_VALUE} bytes, got {len(text)}")
    return text.decode()
