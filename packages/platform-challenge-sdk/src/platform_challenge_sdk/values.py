"""The challenge's dynamic values, kept by the validator: durable before a call returns."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from platform_challenge_sdk.errors import SdkError, ValueRefused
from platform_protocol.session.messages import (
    GuestMessage,
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesRequest,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.values import ValueInvalid, checked_key, checked_prefix, value_text

_TIMEOUT = 15 * 60.0
T = TypeVar("T")


class Values:
    """JSON values under string keys, scoped to this challenge. All methods are async; `sync` has twins.

    Each raises ValueRefused when the validator refuses, or when a key (512 bytes, printable) or value
    (I-JSON, 1 MiB) is none; and TimeoutError after 15 min without an answer (a write may then have
    happened). A call waits through broken connections: it is asked again, and applied once.
    """

    def __init__(self, send: Callable[[GuestMessage], None]) -> None:
        self._send = send
        self._waiting: dict[str, tuple[ValuesRequest, asyncio.Future[ValuesResult]]] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def sync(self) -> SyncValues:
        """The same calls for handlers that are plain functions."""
        return SyncValues(self, self._loop)

    async def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        answer = await self._ask(ValuesGet(request_id=_fresh(), key=_key(key)))
        return default if answer.version is None else answer.value

    async def get_versioned(self, key: str) -> tuple[Any, int]:
        """(value, version); (None, 0) where there is none."""
        answer = await self._ask(ValuesGet(request_id=_fresh(), key=_key(key)))
        return answer.value, answer.version or 0

    async def set(self, key: str, value: Any) -> int:
        """Write a JSON value; returns its new version."""
        order = ValuesSet(request_id=_fresh(), key=_key(key), value=_json(value))
        return (await self._ask(order)).version or 0

    async def delete(self, key: str) -> None:
        """Remove a value; one that is not there is no error."""
        await self._ask(ValuesDelete(request_id=_fresh(), key=_key(key)))

    async def list(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Keys that begin with `prefix`, in order."""
        order = ValuesList(request_id=_fresh(), prefix=_prefix(prefix), limit=limit)
        return (await self._ask(order)).keys or []

    async def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number, atomically; a missing one counts as 0. Returns the new number."""
        return (await self._ask(ValuesIncrement(request_id=_fresh(), key=_key(key), by=_json(by)))).value

    async def compare_and_set(self, key: str, expected_version: int, value: Any) -> int:
        """Write if the version is still the expected one (0: not there); returns the new version."""
        order = ValuesCas(
            request_id=_fresh(), key=_key(key), expected_version=expected_version, value=_json(value)
        )
        return (await self._ask(order)).version or 0

    def answered(self, answer: ValuesResult) -> None:
        """An answer came (called by the session)."""
        _, waiting = self._waiting.pop(answer.request_id, (None, None))
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def unanswered(self) -> Sequence[ValuesRequest]:
        """What is to be asked again after a resume, with the same request_id (called by the session)."""
        return [request for request, _ in self._waiting.values()]

    async def _ask(self, request: ValuesRequest) -> ValuesResult:
        if asyncio.get_running_loop() is not self._loop:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(request), self._loop))
        waiting: asyncio.Future[ValuesResult] = self._loop.create_future()
        self._waiting[request.request_id] = request, waiting
        self._send(request)
        try:
            async with asyncio.timeout(_TIMEOUT):
                answer = await waiting
        finally:
            self._waiting.pop(request.request_id, None)
        if answer.error is not None:
            raise ValueRefused(answer.error.message, answer.error.code)
        return answer


class SyncValues:
    """Values for a plain handler in its worker thread: each call waits for its answer."""

    def __init__(self, values: Values, loop: asyncio.AbstractEventLoop) -> None:
        self._values = values
        self._loop = loop

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        return self._wait(self._values.get(key, default))

    def get_versioned(self, key: str) -> tuple[Any, int]:
        """(value, version); (None, 0) where there is none."""
        return self._wait(self._values.get_versioned(key))

    def set(self, key: str, value: Any) -> int:
        """Write a JSON value; returns its new version."""
        return self._wait(self._values.set(key, value))

    def delete(self, key: str) -> None:
        """Remove a value; one that is not there is no error."""
        self._wait(self._values.delete(key))

    def list(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Keys that begin with `prefix`, in order."""
        return self._wait(self._values.list(prefix, limit))

    def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number, atomically; returns the new number."""
        return self._wait(self._values.increment(key, by))

    def compare_and_set(self, key: str, expected_version: int, value: Any) -> int:
        """Write if the version is still the expected one; returns the new version."""
        return self._wait(self._values.compare_and_set(key, expected_version, value))

    def _wait(self, asking: Coroutine[Any, Any, T]) -> T:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        asking.close()
        raise SdkError(f"values.sync would block the event loop {running!r}: await the call without sync")


def _fresh() -> str:
    return uuid.uuid4().hex


def _key(key: str) -> str:
    return _kept(checked_key, key)


def _prefix(prefix: str) -> str:
    return _kept(checked_prefix, prefix)


def _json(value: Any) -> Any:
    _kept(value_text, value)
    return value


def _kept(check: Callable[[Any], T], what: Any) -> T:
    """What cannot be kept is refused here: sent, it might break the session."""
    try:
        return check(what)
    except ValueInvalid as error:
        raise ValueRefused(str(error), error.code) from error
