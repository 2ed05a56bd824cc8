"""The jobs that a session carries: given to the SDK, heard of, found again after a break."""

from __future__ import annotations

import structlog

from platform_protocol.ids import JobId, VmName
from platform_protocol.session.messages import (
    GuestState,
    JobCancel,
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    SubmissionChunk,
)
from platform_validator.cvm.errors import SessionRefused
from platform_validator.cvm.running import RunningJob
from platform_validator.cvm.session_link import SessionLink

_log = structlog.get_logger(__name__)


class SessionJobs:
    """What runs in one CVM, over any number of connections.

    Args:
        link: The connection of the moment.
        vm: For the log.
    """

    def __init__(self, link: SessionLink, vm: VmName) -> None:
        self._link = link
        self._vm = vm
        self._running: dict[JobId, RunningJob] = {}
        self._left: set[JobId] = set()
        self._early: dict[JobId, tuple[JobResult, int | None]] = {}
        self._state: GuestState | None = None

    def __len__(self) -> int:
        """How many are waited for."""
        return len(self._running)

    def __contains__(self, job_id: JobId) -> bool:
        """Whether this one is."""
        return job_id in self._running

    def add(self, running: RunningJob) -> None:
        """It is waited for from now on, until `remove`."""
        self._running[running.order.job_id] = running
        self._left.discard(running.order.job_id)

    def remove(self, running: RunningJob) -> None:
        """Nobody waits for it any more."""
        del self._running[running.order.job_id]

    def adopt(self, state: GuestState) -> None:
        """What the SDK holds was given by an earlier process: whoever takes the jobs over asks for them."""
        held = [each.job_id for each in state.jobs or ()]
        self._left = {*held, *([state.job_id] if state.job_id else [])}

    async def begin(self, running: RunningJob) -> None:
        """Give a job that was added; without a connection that is `pick_up`'s part."""
        if (early := self._early.pop(running.order.job_id, None)) is not None:
            result, result_bytes = early
            if not self.finish(result, result_bytes):
                await self._link.acknowledge(result.seq)
        elif self._state is not None:
            await self._give(running, self._state)

    async def pick_up(self, state: GuestState) -> None:
        """Go on where the SDK is."""
        # From here on `begin` gives its job itself; one that is waiting already is given now.
        self._state = state
        for running in list(self._running.values()):
            await self._give(running, state)
        for held in state.jobs or ():
            # A cancellation that was lost with its connection.
            if held.job != "done" and held.job_id not in self._running and held.job_id not in self._left:
                await self.cancel(held.job_id, "nobody waits for it")

    def down(self) -> None:
        """The connection is gone."""
        self._state = None

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end a job; a lost connection is no error."""
        await self._link.send(JobCancel(job_id=job_id, reason=reason[:1000]))

    def tell(self, message: JobProgress | Log) -> None:
        """Hand progress and logs to the job that they are about."""
        named = self._running.get(message.job_id) if message.job_id is not None else None
        if named is not None:
            named.started()
        if isinstance(message, JobProgress):
            if named is not None:
                named.on_progress(message.percent, message.message)
        elif named is not None:
            named.on_log(message.level, message.message)
        elif len(self._running) == 1:
            # What the challenge says by itself belongs to the one job that runs.
            next(iter(self._running.values())).on_log(message.level, message.message)

    def finish(self, message: JobResult, result_bytes: int | None) -> bool:
        """Take a result; False for one that nobody waits for: it must not hold up the others."""
        running = self._running.get(message.job_id)
        if running is None and message.job_id in self._left:
            # Of a job that an earlier process gave: whoever adopts it will ask for it.
            self._early[message.job_id] = message, result_bytes
            return True
        other = running is not None and message.attempt not in {None, running.order.attempt}
        if running is None or other or running.result.done():
            # Cancelled, timed out, a second one.
            _log.info("result_unwanted", vm=self._vm, job_id=message.job_id)
            return False
        running.finish(
            result=message.result,
            error=message.error,
            evidence=message.evidence,
            seq=message.seq,
            result_bytes=result_bytes,
        )
        return True

    def refuse(self, job_id: str | None, error: SessionRefused) -> None:
        """The SDK will not run this one; or it names none, and then none of them."""
        named = self._running.get(JobId(job_id or ""))
        for running in self._running.values() if named is None else (named,):
            running.fail(error)

    async def _give(self, running: RunningJob, state: GuestState) -> None:
        socket, order = self._link.socket, running.order
        there = state.of(order.job_id, order.attempt)
        if there is not None and there.job in ("running", "done"):
            running.started()
            return
        if there is None:
            running.given = True
            await self._link.send(
                JobExecute(
                    job_id=order.job_id,
                    attempt=order.attempt,
                    challenge_id=order.challenge_id,
                    job_name=order.job_name,
                    payload=order.payload,
                    submission_sha256=order.submission_sha256,
                )
            )
        offset, last = 0 if there is None else there.submission_bytes, running.submission is None
        # A new connection picks up by itself, at the offset that the SDK tells.
        while not last and self._link.socket is socket:
            data, last = await running.chunk(offset)
            await self._link.send(SubmissionChunk(job_id=order.job_id, offset=offset, last=last, data=data))
            offset += len(data)
