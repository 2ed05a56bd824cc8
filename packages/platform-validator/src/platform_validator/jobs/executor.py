"""One claimed job from its code to its stored result: the usage guide's steps, under their names.

Whatever goes wrong is decided once, in `ending.blame`: a failure of the infrastructure is never scored.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog

from platform_protocol.platform_messages import ReleaseReason, ResultOutcome
from platform_validator.challenges.room import CvmFleet, Guest
from platform_validator.clock import Clock
from platform_validator.cvm.errors import CvmError, NoCapacity, SessionLost
from platform_validator.cvm.quota import Quota
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.vmm import VmmError
from platform_validator.jobs.capacity import largest
from platform_validator.jobs.ending import Ending, blame, lease_ended
from platform_validator.jobs.lease import Renewer
from platform_validator.jobs.logs import LogStream
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.result import Finding, judge, result_body
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import PlatformClient, PlatformError, PlatformUnavailable
from platform_validator.scoring import ScoringRule, UnknownScoring
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, Purpose, Stage

FEED_EVERY = 30.0
ACKNOWLEDGED_WITHIN = timedelta(minutes=2)
COLLECTED_WITHIN = timedelta(seconds=30)
MAX_LOG_LINES = 10_000
_STORE_RETRY = 2.0
_FETCH_RETRY = Backoff(timedelta(milliseconds=500), timedelta(seconds=10))
_JITTER = random.SystemRandom()
_ORDER = list(Stage)

_log = structlog.get_logger(__name__)


class JobExecutor:
    """Runs claimed jobs; each in the task that calls `execute_job`.

    Args:
        client: Submissions and releases.
        store: The journal.
        fleet: Boots and destroys CVMs.
        quota: Gets back what was reserved and never used.
        renewer: Keeps the leases.
        outbox: Woken when a result was stored.
        scoring: The operator's rule; a challenge's `[scoring]` wins over it.
        cache: The cache folder; `submissions/` is made below it.
        clock: Time.
        metrics: Is told.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        store: Store,
        fleet: CvmFleet,
        quota: Quota,
        renewer: Renewer,
        outbox: Outbox,
        scoring: ScoringRule,
        cache: Path,
        clock: Clock,
        metrics: JobMetrics,
    ) -> None:
        self._client = client
        self._store = store
        self._fleet = fleet
        self._quota = quota
        self._renewer = renewer
        self._outbox = outbox
        self._scoring = scoring
        self._submissions = cache / "submissions"
        self._clock = clock
        self._metrics = metrics

    async def execute_job(self, job: ClaimedJob) -> Ending:
        """Run a claimed job to its end. Whatever it held is given back when this returns or raises.

        Returns:
            How it ended; a stored result is on its way through the outbox by then.
        """
        structlog.contextvars.bind_contextvars(job_id=job.job_id, attempt=job.claim.attempt)
        job.stage_since = self._clock.monotonic()
        try:
            ending = await self._with_lease(job)
        except asyncio.CancelledError:
            if not job.stored:
                await self._finish(job, Ending(JobOutcome.CANCELLED, "drained", ReleaseReason.DRAIN))
            raise
        else:
            await self._finish(job, ending)
            return ending
        finally:
            self.destroy_vm(job)
            self._submission_path(job).unlink(missing_ok=True)
            structlog.contextvars.unbind_contextvars("job_id", "attempt")

    async def _with_lease(self, job: ClaimedJob) -> Ending:
        """The steps in a task of their own, so that a refused renewal ends them and nothing else."""
        async with asyncio.TaskGroup() as group:
            steps = group.create_task(self._steps(job))

            def lost(reason: str) -> None:
                if not job.stored:
                    job.lost = reason
                    steps.cancel()

            async with self._renewer.keep(
                job.job_id,
                job.claim.lease.token,
                term=job.claim.lease.term_s,
                asked_at=job.asked_at,
                on_lost=lost,
            ) as lease:
                job.lease = lease
                job.stream = LogStream(
                    client=self._client, job_id=job.job_id, token=job.claim.lease.token, clock=self._clock
                )
                shipping = group.create_task(job.stream.run())
                while not steps.done():
                    await asyncio.wait({steps}, timeout=FEED_EVERY)
                    lease.feed()
                shipping.cancel()
            job.lease = None
        if steps.cancelled():
            return lease_ended(job.lost, job.stage)
        return steps.result()

    async def _steps(self, job: ClaimedJob) -> Ending:
        try:
            submission = await self.download_challenge(job)
            cvm = await self.create_vm(job)
            finding, result = await self.evaluate_submission(job, cvm, submission)
            return await self.submit_results(job, cvm, finding, result)
        except (PlatformError, CvmError, VmmError, StoreUnavailable, OSError) as error:
            ending = blame(error, stage=job.stage, started=job.started)
            _log.warning("job_not_finished", stage=ending.stage, reason=ending.reason, outcome=ending.outcome)
            return ending
        except Exception as error:  # noqa: BLE001 - a fault of ours ends this job and no other, loudly
            _log.exception("job_fault", stage=job.stage)
            return Ending(
                JobOutcome.INFRA_ERROR, f"internal: {error!r}"[:500], ReleaseReason.INFRA, job.stage
            )

    # The guide's steps

    async def download_challenge(self, job: ClaimedJob) -> Path | None:
        """The challenge's code is pinned in the cache by the job's reference; the submission is fetched.

        Returns:
            Where the submission is, or None for a job without one.
        """
        await self._stage(job, Stage.FETCHING)
        submission = job.claim.submission
        if submission is None:
            return None
        await asyncio.to_thread(self._submissions.mkdir, parents=True, exist_ok=True, mode=0o700)
        target = self._submission_path(job)
        failures = 0
        while True:
            try:
                await self._client.fetch_submission(submission, target)
            except PlatformUnavailable as error:
                # The lease lives through an outage, and so does the fetch; a refused renewal ends both.
                failures += 1
                _log.warning("submission_not_fetched", tries=failures, error=str(error))
                await self._clock.sleep(_FETCH_RETRY.wait(failures, _JITTER, error.retry_after))
            else:
                return target

    async def create_vm(self, job: ClaimedJob) -> Guest:
        """A CVM for this job alone: the ready one that was set aside for it, or one that boots now."""
        await self._stage(job, Stage.CREATING)
        if job.cvm is not None:
            job.vm = job.cvm.name
            await self._store.vm_assigned(job.cvm.name, job.claim_id)
            return job.cvm
        reservation, job.reservation = job.reservation, None
        if reservation is None:
            raise NoCapacity("a job without a CVM and without a reservation")
        plan = replace(job.ref.plan, resources=largest(job.ref.plan.resources, job.claim.resources))
        async with asyncio.TaskGroup() as group:
            boot = group.create_task(
                _caught(
                    self._fleet.boot(
                        plan,
                        purpose=Purpose.JOB,
                        reservation=reservation,
                        claim_id=job.claim_id,
                        on_stage=lambda name: self._enter(group, job, name),
                    )
                )
            )
        booted = boot.result()
        if isinstance(booted, Exception):
            raise booted
        job.cvm, job.vm = booted, booted.name
        return booted

    async def evaluate_submission(
        self, job: ClaimedJob, cvm: Guest, submission: Path | None
    ) -> tuple[Finding, GuestResult | None]:
        """Have the SDK run it, within the job's time, counted from the SDK's acknowledgement."""
        await self._stage(job, Stage.RUNNING)
        limit = self._time_limit(job)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN.total_seconds()) as deadline:

                def started() -> None:
                    if not job.started:
                        job.started = True
                        deadline.reschedule(loop.time() + limit.total_seconds())

                result = await cvm.session.execute(
                    _order(job),
                    submission,
                    on_started=started,
                    on_progress=lambda percent, message: _progress(job, percent, message),
                    on_log=lambda level, message: _logged(job, level, message),
                )
        except TimeoutError:
            if not job.started:
                raise SessionLost("the SDK did not acknowledge the job in time") from None
            await _briefly(cvm.session.cancel(job.job_id, "timeout"))
            seconds = limit.total_seconds()
            return Finding.timed_out(f"timeout: no result within {seconds:.0f} s"), None
        await self._stage(job, Stage.COLLECTING)
        return await asyncio.to_thread(self._judged, job, result), result

    async def submit_results(
        self, job: ClaimedJob, cvm: Guest, finding: Finding, result: GuestResult | None
    ) -> Ending:
        """Store the body that will be sent; the outbox delivers it. Then the SDK may forget it."""
        limit_ms = int(self._time_limit(job).total_seconds() * 1000)
        body = result_body(
            finding,
            claim=job.claim,
            logs=[*job.logs, *(result.logs if result else ())],
            execution_time_ms=result.execution_time_ms if result else limit_ms,
            usage=None,
            commit=job.ref.commit,
            compose_hash=job.ref.plan.compose_hash,
            isolation_level=cvm.isolation_level,
            attestation=cvm.attestation,
        )
        outcome = _OUTCOMES[finding.outcome]
        await self._stored(job, outcome, body)
        self._outbox.wake()
        if result is not None:
            await _briefly(cvm.session.acknowledge(result))
        return Ending(outcome, finding.error)

    def destroy_vm(self, job: ClaimedJob) -> None:
        """Hand its CVM to destruction, which never waits; give back a reservation that no CVM used."""
        cvm, job.cvm = job.cvm, None
        if cvm is not None:
            self._fleet.destroy(cvm.name)
        reservation, job.reservation = job.reservation, None
        if reservation is not None:
            self._quota.release(reservation)

    # Around them

    def _judged(self, job: ClaimedJob, result: GuestResult) -> Finding:
        if result.job_id != job.job_id or result.attempt != job.claim.attempt:
            raise SessionLost(f"the SDK sent a result for {result.job_id} attempt {result.attempt}")
        error = (result.error.code, result.error.message) if result.error is not None else None
        return judge(result.result, error, max_bytes=job.ref.spec.result.max_bytes, rule=self._rule(job))

    def _rule(self, job: ClaimedJob) -> ScoringRule:
        spec = job.ref.spec
        try:
            return self._scoring.overridden(
                spec.scoring, low=spec.result.score_min, high=spec.result.score_max
            )
        except UnknownScoring as error:
            _log.warning("challenge_scoring_ignored", error=str(error))
            return self._scoring

    def _time_limit(self, job: ClaimedJob) -> timedelta:
        asked = timedelta(seconds=job.claim.timeout_s)
        declared = job.ref.spec.execution.timeout_s
        return asked if declared is None else min(asked, timedelta(seconds=declared))

    async def _stage(self, job: ClaimedJob, stage: Stage) -> None:
        """Enter a stage: shown at once, then journaled; never backwards."""
        if _ORDER.index(stage) <= _ORDER.index(job.stage):
            return
        now = self._clock.monotonic()
        self._metrics.stage_took(job.stage, now - job.stage_since)
        job.stage, job.stage_since = stage, now
        _log.info("job_stage", stage=stage)
        async with job.journal:
            if job.stage is stage and not job.stored:
                try:
                    await self._store.advance(job.claim_id, stage, at=self._clock.now(), vm=job.vm)
                except StoreUnavailable as error:
                    # A stage is for people and for recovery, which reads a lost one as the one before.
                    _log.error("stage_not_stored", stage=stage, error=str(error))

    def _enter(self, group: asyncio.TaskGroup, job: ClaimedJob, name: str) -> None:
        """A stage that the fleet reports while it boots; unknown ones are passed over."""
        if name in _ORDER:
            group.create_task(self._stage(job, Stage(name)))

    async def _stored(self, job: ClaimedJob, outcome: JobOutcome, body: bytes) -> None:
        """Durable, or tried again while the lease is kept: a full disk loses no result."""
        while True:
            try:
                async with job.journal:
                    # Shielded: what was begun is finished, or the outcome would depend on the moment.
                    await asyncio.shield(
                        self._store.store_result(job.claim_id, outcome, body, at=self._clock.now())
                    )
                    job.stored = True
                job.stage = Stage.SUBMITTING
                _log.info("result_stored", outcome=outcome)
            except StoreUnavailable as error:
                _log.error("result_not_stored", error=str(error))
                await self._clock.sleep(_STORE_RETRY)
            else:
                return

    async def _finish(self, job: ClaimedJob, ending: Ending) -> None:
        self._metrics.job_ended(job.claim.challenge_id, ending.outcome)
        _log.info("job_ended", outcome=ending.outcome, reason=ending.reason)
        if job.stored:
            return
        self.destroy_vm(job)
        if ending.release is not None:
            await self._release(job, ending.release)
        try:
            await self._store.end_job(
                job.claim_id, outcome=ending.outcome, reason=ending.reason, at=self._clock.now()
            )
        except StoreUnavailable as error:
            _log.error("job_end_not_stored", error=str(error))

    async def _release(self, job: ClaimedJob, reason: ReleaseReason) -> None:
        """Until it is answered, or the lease has lapsed by itself: an absent API gives out no jobs anyway."""
        gives_up_at = self._clock.monotonic() + job.claim.lease.term_s
        failures = 0
        while True:
            try:
                await self._client.release(job.job_id, job.claim.lease.token, reason)
            except PlatformUnavailable as error:
                failures += 1
                _log.warning("not_released", error=str(error), tries=failures)
                if self._clock.monotonic() >= gives_up_at:
                    return
                await self._clock.sleep(_FETCH_RETRY.wait(failures, _JITTER, error.retry_after))
            except PlatformError as error:
                _log.info("release_refused", error=str(error))
                return
            else:
                return

    def _submission_path(self, job: ClaimedJob) -> Path:
        # Named by our own id: nothing of the submission's name reaches the file system.
        return self._submissions / job.claim_id


_OUTCOMES = {
    ResultOutcome.SUCCEEDED: JobOutcome.SUCCEEDED,
    ResultOutcome.FAILED: JobOutcome.FAILED,
    ResultOutcome.TIMEOUT: JobOutcome.TIMEOUT,
}


def _order(job: ClaimedJob) -> JobOrder:
    claim = job.claim
    return JobOrder(
        job_id=claim.id,
        attempt=claim.attempt,
        challenge_id=claim.challenge_id,
        job_name=claim.job_name,
        payload=claim.payload,
        submission_sha256=claim.submission.sha256 if claim.submission else None,
    )


def _progress(job: ClaimedJob, percent: float, message: str) -> None:
    job.progress, job.message = percent, message[:500]


def _logged(job: ClaimedJob, level: str, message: str) -> None:
    if len(job.logs) >= MAX_LOG_LINES:
        del job.logs[: MAX_LOG_LINES // 10]
    job.logs.append(f"{level}: {message}")
    if job.stream is not None:
        job.stream.add(job.logs[-1])


async def _caught(boot: Awaitable[Guest]) -> Guest | Exception:
    try:
        return await boot
    except (CvmError, VmmError, StoreUnavailable) as error:
        return error


async def _briefly(act: Awaitable[object]) -> None:
    """A last word to a CVM that is about to be destroyed: tried, not insisted on."""
    with contextlib.suppress(CvmError, TimeoutError):
        async with asyncio.timeout(COLLECTED_WITHIN.total_seconds()):
            await act
