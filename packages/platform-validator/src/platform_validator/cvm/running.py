"""A job that a session carries: who is told of it, and when it began."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_protocol.session.messages import CHUNK_BYTES, JobError
from platform_validator.cvm.jobs import GuestResult, JobOrder


@dataclass(slots=True)
class RunningJob:
    """A job from its order to its result, over any number of connections."""

    order: JobOrder
    submission: Path | None
    on_started: Callable[[bool], None]
    on_progress: Callable[[float, str], None]
    on_log: Callable[[str, str], None]
    result: asyncio.Future[GuestResult]
    began: float | None = None
    given: bool = False

    def started(self) -> None:
        """The SDK acknowledged it; more calls change nothing.

        The port is told whether the SDK had it already: then an earlier process gave it.
        """
        if self.began is None:
            self.began = time.monotonic()
            self.on_started(not self.given)

    def finish(
        self,
        *,
        result: dict[str, Any] | None,
        error: JobError | None,
        evidence: dict[str, Any] | None,
        seq: int,
        result_bytes: int | None = None,
        session: int = 2,
    ) -> None:
        """Its result is here."""
        self.started()
        ran = time.monotonic() - (self.began or time.monotonic())
        self.result.set_result(
            GuestResult(
                job_id=self.order.job_id,
                attempt=self.order.attempt,
                result=result,
                error=error,
                evidence=evidence,
                execution_time_ms=int(ran * 1000),
                seq=seq,
                result_bytes=result_bytes,
                session=session,
            )
        )

    def fail(self, error: Exception) -> None:
        """The SDK will not run it."""
        if not self.result.done():
            self.result.set_exception(error)

    async def chunk(self, offset: int) -> tuple[bytes, bool]:
        """Up to 1 MiB of the submission at an offset, and whether it is the last."""
        if self.submission is None:
            return b"", True
        return await asyncio.to_thread(_read, self.submission, offset)


def _read(path: Path, offset: int) -> tuple[bytes, bool]:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(CHUNK_BYTES)
        return data, not file.read(1)
