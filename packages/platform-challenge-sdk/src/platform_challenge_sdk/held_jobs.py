"""The jobs that a CVM holds: one in its life (`per_job`), or several, so many at once (`shared`)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from platform_challenge_sdk.job import JobRun
from platform_protocol.ids import JobId
from platform_protocol.session.messages import (
    GuestJob,
    GuestState,
    JobCancel,
    JobExecute,
    JobResult,
    SubmissionChunk,
)

KEPT = 64
"""Ended jobs that are remembered, so that an order that comes twice is not run twice."""


@dataclass(slots=True)
class _Held:
    run: JobRun
    task: asyncio.Task[None]


@dataclass(slots=True)
class HeldJobs:
    """`per_job`: one job in the life of the CVM. Otherwise up to `concurrency` at once, one after another."""

    per_job: bool = True
    concurrency: int = 1
    _held: OrderedDict[JobId, _Held] = field(default_factory=OrderedDict)

    @property
    def busy(self) -> bool:
        """Whether no other job may begin."""
        if self.per_job:
            return bool(self._held)
        return self.running >= self.concurrency

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return sum(each.run.phase != "done" for each in self._held.values())

    @property
    def in_charge(self) -> bool:
        """Whether the CVM is here for a job now: it then ends when its validator stays silent."""
        return bool(self._held) if self.per_job else self.running > 0

    def knows(self, order: JobExecute) -> bool:
        """Whether this attempt is held already."""
        held = self._held.get(order.job_id)
        return held is not None and held.run.order.attempt == order.attempt

    def outruns(self, order: JobExecute) -> bool:
        """Whether an earlier attempt of it has not ended."""
        held = self._held.get(order.job_id)
        return held is not None and held.run.phase != "done"

    def begin(self, run: JobRun, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        """Run it."""
        self._held.pop(run.order.job_id, None)
        self._held[run.order.job_id] = _Held(run, spawn(run.run()))
        ended = [job_id for job_id, each in self._held.items() if each.run.phase == "done"]
        for job_id in ended[: max(len(ended) - KEPT, 0)]:
            del self._held[job_id]

    def chunk(self, message: SubmissionChunk) -> None:
        """More of a submission."""
        held = self._held.get(message.job_id)
        if held is not None:
            held.run.chunk(message)

    def cancel(self, message: JobCancel) -> None:
        """End a job."""
        held = self._held.get(message.job_id)
        if held is not None and held.run.cancel(message.reason):
            held.task.cancel()

    def end(self) -> None:
        """End them all: the CVM ends."""
        for held in self._held.values():
            held.task.cancel()

    def results(self) -> list[JobResult]:
        """What ended jobs have sent."""
        return [each.run.result for each in self._held.values() if each.run.result is not None]

    def state(self, *, configured: bool) -> GuestState:
        """What hello tells of them: the newest, and where there may be several, all of them."""
        newest = next(reversed(self._held.values())).run if self._held else None
        jobs = [
            GuestJob(
                job_id=each.run.order.job_id,
                attempt=each.run.order.attempt,
                job=each.run.phase,
                submission_bytes=each.run.received,
            )
            for each in self._held.values()
        ]
        return GuestState(
            configured=configured,
            job_id=None if newest is None else newest.order.job_id,
            job="none" if newest is None else newest.phase,
            submission_bytes=0 if newest is None else newest.received,
            jobs=None if self.per_job else jobs,
        )
