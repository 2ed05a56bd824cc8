"""A running job's log lines on their way to the Platform API: in batches, capped, never in its way."""

from __future__ import annotations

import asyncio

import structlog

from platform_protocol.ids import JobId, LeaseToken
from platform_validator.clock import Clock
from platform_validator.jobs.result import last_lines
from platform_validator.platform_client.port import PlatformClient, PlatformError

EVERY = 2.0
MAX_BATCH = 200 * 1024
MAX_WAITING = 5000
MAX_JOB = 64 * 1024 * 1024

_log = structlog.get_logger(__name__)


class LogStream:
    """One job's lines. What cannot be sent is dropped; `seq` counts batches, so that a gap is seen.

    Args:
        client: Takes the lines.
        job_id: The job.
        token: Its lease.
        clock: Waits between batches.
    """

    def __init__(self, *, client: PlatformClient, job_id: JobId, token: LeaseToken, clock: Clock) -> None:
        self._client = client
        self._job_id = job_id
        self._token = token
        self._clock = clock
        self._waiting: list[str] = []
        self._some = asyncio.Event()
        self._seq = 0
        self._sent = 0

    def add(self, line: str) -> None:
        """Queue a line; when too many wait, the oldest are dropped."""
        if self._sent > MAX_JOB:
            return
        self._waiting.append(line)
        self._some.set()
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[: MAX_WAITING // 10]

    async def run(self) -> None:
        """Send what waits, until cancelled."""
        while True:
            await self._some.wait()
            await self._clock.sleep(EVERY)
            await self.flush()

    async def flush(self) -> None:
        """Send what waits now, once."""
        if not self._waiting:
            return
        lines, self._waiting = last_lines(self._waiting, MAX_BATCH), []
        self._some.clear()
        self._sent += sum(len(line) for line in lines)
        seq, self._seq = self._seq, self._seq + 1
        try:
            await self._client.send_logs(self._job_id, self._token, seq, lines)
        except PlatformError as error:
            _log.debug("logs_dropped", job_id=self._job_id, lines=len(lines), error=str(error))
