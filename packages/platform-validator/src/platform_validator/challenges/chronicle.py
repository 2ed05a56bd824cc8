"""Tells what becomes of a challenge's instances: journal, log and metrics, in the same words."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import structlog

from platform_protocol.ids import ChallengeId
from platform_validator.challenges.instance import Instance
from platform_validator.challenges.lifecycle import Aside, Fact
from platform_validator.challenges.parts import RunnerParts
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import InstanceState

_MAX_REASON, _KEPT_HEAD = 2000, 500

_log = structlog.get_logger(__name__)


class Chronicle:
    """Of one challenge."""

    def __init__(self, challenge_id: ChallengeId, parts: RunnerParts) -> None:
        self._id = challenge_id
        self._parts = parts

    def note(self, instance: Instance, fact: Fact, reason: str | None = None) -> InstanceState | Aside:
        """Apply a fact, and tell the state that it leads to; the journal hears of it by `store`."""
        verdict = instance.told(fact, at=self._parts.clock.now(), reason=_shortened(reason))
        if isinstance(verdict, InstanceState):
            self.said(instance)
        return verdict

    async def tell(self, instance: Instance, fact: Fact) -> None:
        """The same, and journal it.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        self.note(instance, fact)
        await self.store(instance)

    async def store(self, instance: Instance) -> None:
        """Journal it as it is. What is being restored stays there as what served, until it serves or fails.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        if not instance.restoring:
            await self._parts.store.put_instance(instance.record)

    async def drained_for(self, serving: Instance, reason: str | None) -> None:
        """An Active instance takes no jobs, for this reason; None: it does again."""
        serving.drained_for = reason
        serving.record = replace(serving.record, reason=reason, since=self._parts.clock.now())
        self.said(serving)
        with contextlib.suppress(StoreUnavailable):
            await self._parts.store.put_instance(serving.record)

    def said(self, instance: Instance) -> None:
        """Tell its state, without journaling it."""
        record = instance.record
        log = _log.warning if record.state is InstanceState.FAILED else _log.info
        log(
            "challenge_state",
            challenge_id=self._id,
            name=record.name,
            commit=record.commit,
            state=record.state.value,
            reason=record.reason,
            failures=record.failures,
        )
        self._parts.on_state(self._id, record.state.value)


def _shortened(reason: str | None) -> str | None:
    """Its head and its end: an import error says what happened in its last line."""
    if reason is None or len(reason) <= _MAX_REASON:
        return reason
    return f"{reason[:_KEPT_HEAD]} … {reason[_KEPT_HEAD - _MAX_REASON :]}"
