"""The challenge's dynamic values, kept by the validator: durable before a call returns."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from platform_challenge_sdk.errors import ValueRefused
from platform_protocol.session.messages import (
    GuestMessage,
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesResult,
    ValuesSet,
)

_TIMEOUT = 120.0


class Values:
    """JSON values under string keys, scoped to this challenge. All methods are async.

    Each raises ValueRefused when the validator refuses, and TimeoutError after 120 s without an answer (a
    write may then have happened).
    """

    def __init__(self, send: Callable[[GuestMessage], None]) -> None:
        self._send = send
        self._waiting: dict[str, asyncio.Future[ValuesResult]] = {}
        self._loop = asyncio.get_running_loop()

    async def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        answer = await self._ask(ValuesGet(request_id=_fresh(), key=key))
        return default if answer.version is None else answer.value

    async def get_versioned(self, key: str) -> tuple[Any, int]:
        """(value, version); (None, 0) where there is none."""
        answer = await self._ask(ValuesGet(request_id=_fresh(), key=key))
        return answer.value, answer.version or 0

    async def set(self, key: str, value: Any) -> int:
        """Write a JSON value; returns its new version."""
        return (await self._ask(ValuesSet(request_id=_fresh(), key=key, value=value))).version or 0

    async def delete(self, key: str) -> None:
        """Remove a value; one that is not there is no error."""
        await self._ask(ValuesDelete(request_id=_fresh(), key=key))

    async def list(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Keys that begin with `prefix`, in order."""
        return (await self._ask(ValuesList(request_id=_fresh(), prefix=prefix, limit=limit))).keys or []

    async def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number, atomically; a missing one counts as 0. Returns the new number."""
        return (await self._ask(ValuesIncrement(request_id=_fresh(), key=key, by=by))).value

    async def compare_and_set(self, key: str, expected_version: int, value: Any) -> int:
        """Write if the version is still the expected one (0: not there); returns the new version."""
        order = ValuesCas(request_id=_fresh(), key=key, expected_version=expected_version, value=value)
        return (await self._ask(order)).version or 0

    def answered(self, answer: ValuesResult) -> None:
        """An answer came (called by the session)."""
        waiting = self._waiting.pop(answer.request_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def _ask(self, request: Any) -> ValuesResult:
        if asyncio.get_running_loop() is not self._loop:
            future = asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)
            return await asyncio.wrap_future(future)
        waiting: asyncio.Future[ValuesResult] = self._loop.create_future()
        self._waiting[request.request_id] = waiting
        self._send(request)
        try:
            async with asyncio.timeout(_TIMEOUT):
                answer = await waiting
        finally:
            self._waiting.pop(request.request_id, None)
        if answer.error is not None:
            raise ValueRefused(answer.error.message, answer.error.code)
        return answer


def _fresh() -> str:
    return uuid.uuid4().hex
