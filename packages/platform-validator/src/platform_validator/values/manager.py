"""The dynamic values of all challenges: `set` and `get` inside a session, `for_challenge` elsewhere."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import structlog

from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import (
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesRequest,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.values import ValueInvalid, checked_key, checked_prefix
from platform_validator.clock import Clock
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import (
    Resealed,
    SealedText,
    ValueChange,
    ValueRecord,
    ValueSlot,
    ValueUsage,
)
from platform_validator.values.changes import Facts, Present, ValueLimits, ValuesChange, decide, refusal
from platform_validator.values.errors import OutsideOfSession, ValueRefused, ValueUnreadable
from platform_validator.values.sealing import ValuesSeal

_BATCH = 200

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A value with its key and version."""

    key: str
    value: Any
    version: int


class DynamicValuesManager:
    """Keeps values, each under one challenge; durable when a call returns, sealed at rest.

    Args:
        store: Keeps them, and the replies to sessions.
        clock: For when they were written.
        seal: Seals and opens.
        limits: Of each challenge.
    """

    def __init__(
        self, *, store: Store, clock: Clock, seal: ValuesSeal, limits: ValueLimits | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._seal = seal
        self._limits = limits or ValueLimits()
        self._scope: ContextVar[ChallengeId | None] = ContextVar("values_scope", default=None)

    def for_challenge(self, challenge_id: ChallengeId) -> ChallengeValues:
        """The values of one challenge."""
        return ChallengeValues(self, challenge_id)

    @contextmanager
    def session(self, challenge_id: ChallengeId) -> Iterator[ChallengeValues]:
        """Inside, bare `get` and `set` are those of that challenge."""
        token = self._scope.set(challenge_id)
        try:
            yield self.for_challenge(challenge_id)
        finally:
            self._scope.reset(token)

    async def set(self, key: str, value: Any) -> int:
        """Store a JSON value for the session's challenge; returns its version.

        Raises:
            OutsideOfSession: No session says whose value it is.
            ValueRefused: It cannot be kept.
        """
        return await self._here().set(key, value)

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of the session's challenge, or `default`. Raises OutsideOfSession or ValueRefused."""
        return await self._here().get(key, default)

    async def answer(
        self, challenge_id: ChallengeId, session_id: str | None, request: ValuesRequest
    ) -> ValuesResult:
        """Answer one request; refusals are answers too, never exceptions.

        Args:
            challenge_id: Whose values they are: the session's word, never the guest's.
            session_id: A request of a session is applied once, however often it is sent; None: nobody's.
            request: What is asked.
        """
        with self.session(challenge_id):
            try:
                match request:
                    case ValuesGet():
                        return await self._get(challenge_id, request)
                    case ValuesList():
                        return await self._list(challenge_id, request)
                    case _:
                        return await self._change(challenge_id, session_id, request)
            except (ValueRefused, ValueInvalid) as error:
                return refusal(request.request_id, error.code, str(error))
            except ValueUnreadable as error:
                _log.error("value_unreadable", challenge_id=challenge_id, reason=str(error))
                return refusal(
                    request.request_id, "value_unreadable", "the value cannot be read: see the validator"
                )
            except StoreUnavailable:
                return refusal(request.request_id, "store_unavailable", "nothing changed; try again later")

    async def used(self) -> Sequence[ValueUsage]:
        """What each challenge keeps. Raises StoreUnavailable."""
        return await self._store.values_used()

    async def entries(self, challenge_id: ChallengeId, prefix: str = "") -> list[Entry]:
        """Every value of a challenge, by key. Raises StoreUnavailable or ValueUnreadable."""
        records = await self._store.values(challenge_id, checked_prefix(prefix), self._limits.keys)
        return [Entry(record.key, self._clear(record), record.version) for record in records]

    async def reseal(self) -> Resealed:
        """Seal everything under the active key, a few at a time; what does not open is left, and told.

        Raises:
            StoreUnavailable: What was resealed stays so: do it again.
        """
        done = left = 0
        for batch_of, reseal in (
            (self._store.reseal_values, self._or_left(self._seal.reseal_value)),
            (self._store.reseal_replies, self._or_left(self._seal.reseal_reply)),
        ):
            skip = 0
            while any(batch := await batch_of(self._seal.active, limit=_BATCH, skip=skip, reseal=reseal)):
                done, left, skip = done + batch.done, left + batch.left, skip + batch.left
        return Resealed(done, left)

    @staticmethod
    def _or_left(reseal: Callable[[Any], SealedText]) -> Callable[[Any], SealedText | None]:
        def sealed(row: Any) -> SealedText | None:
            try:
                return reseal(row)
            except ValueUnreadable as error:
                _log.error("value_not_resealed", of=type(row).__name__, reason=str(error))
                return None

        return sealed

    def _here(self) -> ChallengeValues:
        challenge_id = self._scope.get()
        if challenge_id is None:
            raise OutsideOfSession(
                "whose value? Inside a session it is known; elsewhere use for_challenge(id)"
            )
        return self.for_challenge(challenge_id)

    def _clear(self, record: ValueRecord) -> Any:
        return json.loads(self._seal.open_value(record))

    async def _get(self, challenge_id: ChallengeId, request: ValuesGet) -> ValuesResult:
        record = await self._store.value(challenge_id, checked_key(request.key))
        if record is None:
            return ValuesResult(request_id=request.request_id)
        return ValuesResult(request_id=request.request_id, value=self._clear(record), version=record.version)

    async def _list(self, challenge_id: ChallengeId, request: ValuesList) -> ValuesResult:
        records = await self._store.values(challenge_id, checked_prefix(request.prefix), request.limit)
        return ValuesResult(request_id=request.request_id, keys=[record.key for record in records])

    async def _change(
        self, challenge_id: ChallengeId, session_id: str | None, request: ValuesChange
    ) -> ValuesResult:
        key = checked_key(request.key)
        session = session_id or ""

        def change(slot: ValueSlot) -> ValueChange:
            """In the store's thread, inside the transaction: between reading and writing comes nobody."""
            done = decide(request, self._facts(slot), self._limits)
            answer = done.answer.model_dump_json().encode()
            reply = self._seal.seal_reply(session, request.request_id, answer)
            if done.text is None:
                return ValueChange(reply, remove=done.remove)
            put = self._seal.seal_value(challenge_id, key, slot.last_version + 1, done.text)
            return ValueChange(reply, put=put, size=done.size)

        reply = await self._store.change_value(
            challenge_id,
            key,
            change=change,
            request=None if session_id is None else (session_id, request.request_id),
            at=self._clock.now(),
        )
        return ValuesResult.model_validate_json(self._seal.open_reply(session, request.request_id, reply))

    def _facts(self, slot: ValueSlot) -> Facts:
        record = slot.present
        present = None if record is None else Present(self._clear(record), record.version, record.size)
        return Facts(present, slot.last_version, slot.keys, slot.bytes)


class ChallengeValues:
    """The values of one challenge. Every method may raise ValueRefused, with the reason's stable word."""

    def __init__(self, manager: DynamicValuesManager, challenge_id: ChallengeId) -> None:
        self._manager = manager
        self._challenge_id = challenge_id

    async def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default`."""
        value, version = await self.get_versioned(key)
        return default if version == 0 else value

    async def get_versioned(self, key: str) -> tuple[Any, int]:
        """(value, version); (None, 0) where there is none."""
        answer = await self._ask(ValuesGet(request_id=_fresh(), key=key))
        return answer.value, answer.version or 0

    async def set(self, key: str, value: Any) -> int:
        """Write a JSON value; returns its version."""
        return (await self._ask(ValuesSet(request_id=_fresh(), key=key, value=value))).version or 0

    async def delete(self, key: str) -> None:
        """Remove it; one that is not there is no error."""
        await self._ask(ValuesDelete(request_id=_fresh(), key=key))

    async def list(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Keys, in order."""
        return (await self._ask(ValuesList(request_id=_fresh(), prefix=prefix, limit=limit))).keys or []

    async def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number; one that is not there counts as 0. Returns the sum."""
        return (await self._ask(ValuesIncrement(request_id=_fresh(), key=key, by=by))).value

    async def compare_and_set(self, key: str, expected_version: int, value: Any) -> int:
        """Write at the expected version alone (0: not there); returns the new one."""
        order = ValuesCas(request_id=_fresh(), key=key, expected_version=expected_version, value=value)
        return (await self._ask(order)).version or 0

    async def _ask(self, request: ValuesRequest) -> ValuesResult:
        answer = await self._manager.answer(self._challenge_id, None, request)
        if answer.error is not None:
            raise ValueRefused(answer.error.code, answer.error.message)
        return answer


def _fresh() -> str:
    return uuid.uuid4().hex
