"""Writing down how a job ended; what the disk does not take now is written later, and forgotten never."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from platform_protocol.ids import ClaimId
from platform_validator.clock import Clock
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _End:
    outcome: JobOutcome
    reason: str | None


class JobEnds:
    """The ends of jobs that have no result.

    Args:
        store: The journal.
        clock: Time.
    """

    def __init__(self, *, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: dict[ClaimId, _End] = {}

    async def end(self, claim_id: ClaimId, outcome: JobOutcome, reason: str | None) -> None:
        """Write it down, now or at a later `retry`. Until then the journal holds the job."""
        self._waiting[claim_id] = _End(outcome, reason)
        try:
            await self._write(claim_id)
        except StoreUnavailable as error:
            _log.error("job_end_not_stored", claim_id=claim_id, error=str(error))

    async def retry(self) -> None:
        """Write down what waits.

        Raises:
            StoreUnavailable: Still not.
        """
        for claim_id in list(self._waiting):
            await self._write(claim_id)

    async def _write(self, claim_id: ClaimId) -> None:
        end = self._waiting.get(claim_id)
        if end is not None:
            await self._store.end_job(claim_id, outcome=end.outcome, reason=end.reason, at=self._clock.now())
            self._waiting.pop(claim_id, None)
