"""A job's work under its lease: kept while the work goes on, and the work ended when it is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import structlog

from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import Clock
from platform_validator.jobs.ending import Ending, blame, lease_ended
from platform_validator.jobs.lease import Renewer
from platform_validator.jobs.logs import LogStream
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.port import (
    JobUnknown,
    LeaseRefused,
    PlatformClient,
    PlatformError,
)
from platform_validator.platform_client.retries import Kind, Over, decide
from platform_validator.store.records import JobOutcome

FEED_EVERY = 30.0
_ASSURED_POLL = 0.1
OUTAGE_GRACE = timedelta(hours=1)

_log = structlog.get_logger(__name__)


class Tenure:
    """Runs work under leases.

    Args:
        client: Renews once after a restart, and takes log lines.
        renewer: Keeps the leases.
        clock: Time.
        rng: Jitter.
        outage_grace: How long the first renewal after a restart may stay unanswered.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        renewer: Renewer,
        clock: Clock,
        rng: random.Random,
        outage_grace: timedelta = OUTAGE_GRACE,
    ) -> None:
        self._client = client
        self._renewer = renewer
        self._clock = clock
        self._rng = rng
        self.outage_grace = outage_grace

    async def run(self, job: ClaimedJob, work: Callable[[ClaimedJob], Coroutine[Any, Any, Ending]]) -> Ending:
        """Do the work for as long as the lease is ours.

        Returns:
            How the job ended: as the work says, or as whatever ended it says.
        """
        if job.adopts is None:
            return await self._with_lease(job, work, job.claim.lease.term_s)
        # After a restart only the answer to a renewal says that the lease is still ours.
        try:
            term = await self._renewed(job)
        except (LeaseRefused, JobUnknown) as error:
            return lease_ended(error.code, job.stage)
        except PlatformError as error:
            return blame(error, stage=job.stage, started=False)
        return job.ending or await self._with_lease(job, work, term)

    async def assured(self, job: ClaimedJob) -> None:
        """After a gap longer than the term, return only when a renewal was answered.

        What came out of the gap (a stopped process, a suspended machine) may be somebody else's job by now.
        A refusal ends the work, and silence does so after the outage's grace: both cancel the caller.
        """
        lease = job.lease
        if lease is None or not lease.in_doubt():
            return
        _log.warning("lease_in_doubt", remedy="it stood still for longer than the term: renewing first")
        lease.renew_now()
        while lease.in_doubt():
            await self._clock.sleep(_ASSURED_POLL)

    async def _renewed(self, job: ClaimedJob) -> float:
        """The term that a first renewal brings; it is waited for as long as an outage is borne.

        Nothing is waited for once the job was ended.
        """
        began, failures = self._clock.monotonic(), 0
        while True:
            job.asked_at = self._clock.boottime()
            try:
                term = await self._client.renew(job.job_id, job.claim.lease.token)
            except (LeaseRefused, JobUnknown):
                self._renewer.heard("refused")
                raise
            except PlatformError as error:
                self._renewer.heard("unanswered")
                failures += 1
                step = decide(
                    Kind.RENEWAL,
                    error,
                    failures=failures,
                    waited=self._clock.monotonic() - began,
                    rng=self._rng,
                    patience=self.outage_grace,
                )
                if isinstance(step, Over):
                    raise
                _log.warning("not_renewed_after_restart", tries=failures, error=str(error))
                if job.ending is not None:
                    return 0.0
                await self._clock.sleep(step.after)
            else:
                self._renewer.heard("granted")
                return term.total_seconds()

    async def _with_lease(
        self, job: ClaimedJob, work: Callable[[ClaimedJob], Coroutine[Any, Any, Ending]], term: float
    ) -> Ending:
        """The work in a task of their own, so that a refused renewal ends them and nothing else."""
        async with asyncio.TaskGroup() as group:
            working = group.create_task(work(job))

            def stop(ending: Ending) -> None:
                if not job.stored and job.ending is None:
                    job.ending = ending
                    working.cancel()

            job.stop = stop
            async with self._renewer.keep(
                job.job_id,
                job.claim.lease.token,
                term=term,
                asked_at=job.asked_at,
                on_lost=lambda reason: stop(lease_ended(reason, job.stage)),
            ) as lease:
                job.lease = lease
                job.stream = LogStream(
                    client=self._client, job_id=job.job_id, token=job.claim.lease.token, clock=self._clock
                )
                shipping = group.create_task(job.stream.run())
                while not working.done():
                    await asyncio.wait({working}, timeout=FEED_EVERY)
                    lease.feed()
                shipping.cancel()
            job.lease = None
        if working.cancelled():
            return job.ending or Ending(JobOutcome.CANCELLED, None, ReleaseReason.OPERATOR, job.stage)
        return working.result()
