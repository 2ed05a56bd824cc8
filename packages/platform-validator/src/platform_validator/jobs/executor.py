"""One claimed job from its code to its stored result: the usage guide's steps, under their names.

Whatever goes wrong is decided once, in `ending.blame`: a failure of the infrastructure is never scored.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Collection
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog

from platform_protocol.ids import ClaimId, VmName
from platform_protocol.platform_messages import ReleaseReason, ResultOutcome
from platform_validator.challenges.room import CvmFleet, Guest
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.errors import CvmError, NoCapacity, SessionLost
from platform_validator.cvm.jobs import GuestResult
from platform_validator.cvm.quota import Quota
from platform_validator.cvm.vmm import VmmError
from platform_validator.jobs.capacity import largest
from platform_validator.jobs.ending import Ending, blame, lease_ended
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.giving_back import GivingBack
from platform_validator.jobs.lease import Renewer
from platform_validator.jobs.logs import LogStream
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.recovery import RESTARTED
from platform_validator.jobs.result import Finding, judge, result_body
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import (
    JobUnknown,
    LeaseRefused,
    PlatformClient,
    PlatformError,
    PlatformUnavailable,
)
from platform_validator.scoring import ScoringRule, UnknownScoring
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, Purpose, Stage

FEED_EVERY = 30.0
OUTAGE_GRACE = timedelta(hours=1)
ACKNOWLEDGED_WITHIN = timedelta(minutes=2)
COLLECTED_WITHIN = timedelta(seconds=30)
CANCEL_GRACE = timedelta(seconds=3)
_STORE_RETRY = 2.0
_FETCH_RETRY = Backoff(timedelta(milliseconds=500), timedelta(seconds=10))
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
        rng: Jitter.
        cache: The cache folder; `submissions/` is made below it.
        clock: Time.
        rng: Jitter.
        ends: Writes down how jobs without a result ended.
        metrics: Is told.
        outage_grace: How long the first renewal after a restart may stay unanswered.
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
        rng: random.Random,
        ends: JobEnds,
        metrics: JobMetrics,
        outage_grace: timedelta = OUTAGE_GRACE,
    ) -> None:
        self.outage_grace = outage_grace
        self._ends = ends
        self._rng = rng
        self._giving_back = GivingBack(client=client, clock=clock, rng=rng, retry=_FETCH_RETRY)
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
            ending = await self._run(job)
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

    async def _run(self, job: ClaimedJob) -> Ending:
        if job.adopts is None:
            return await self._with_lease(job, job.claim.lease.term_s)
        # After a restart only the answer to a renewal says that the lease is still ours.
        try:
            term = await self._renewed(job)
        except (LeaseRefused, JobUnknown) as error:
            return lease_ended(error.code, job.stage)
        except PlatformError as error:
            return blame(error, stage=job.stage, started=False)
        return job.ending or await self._with_lease(job, term)

    async def _renewed(self, job: ClaimedJob) -> float:
        """The term that a first renewal brings; it is waited for as long as an outage is borne.

        Nothing is waited for once the job was ended.
        """
        failures = 0
        gives_up_at = self._clock.monotonic() + self.outage_grace.total_seconds()
        while True:
            job.asked_at = self._clock.boottime()
            try:
                term = await self._client.renew(job.job_id, job.claim.lease.token)
            except PlatformUnavailable as error:
                failures += 1
                _log.warning("not_renewed_after_restart", tries=failures, error=str(error))
                if self._clock.monotonic() >= gives_up_at:
                    raise
                if job.ending is not None:
                    return 0.0
                await self._clock.sleep(_FETCH_RETRY.wait(failures, self._rng, error.retry_after))
            else:
                return term.total_seconds()

    async def _with_lease(self, job: ClaimedJob, term: float) -> Ending:
        """The steps in a task of their own, so that a refused renewal ends them and nothing else."""
        async with asyncio.TaskGroup() as group:
            steps = group.create_task(self._steps(job))

            def stop(ending: Ending) -> None:
                if not job.stored and job.ending is None:
                    job.ending = ending
                    steps.cancel()

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
                while not steps.done():
                    await asyncio.wait({steps}, timeout=FEED_EVERY)
                    lease.feed()
                shipping.cancel()
            job.lease = None
        if steps.cancelled():
            return job.ending or Ending(JobOutcome.CANCELLED, None, ReleaseReason.OPERATOR, job.stage)
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
        if job.adopts is not None and target.exists():
            return target
        failures = 0
        while True:
            try:
                await self._client.fetch_submission(submission, target)
            except PlatformUnavailable as error:
                # The lease lives through an outage, and so does the fetch; a refused renewal ends both.
                failures += 1
                _log.warning("submission_not_fetched", tries=failures, error=str(error))
                await self._clock.sleep(_FETCH_RETRY.wait(failures, self._rng, error.retry_after))
            else:
                return target

    async def create_vm(self, job: ClaimedJob) -> Guest:
        """A CVM for this job alone: the ready one that was set aside for it, or one that boots now.

        A job that ran under an earlier process goes on in the CVM that it ran in.
        """
        if job.adopts is not None:
            job.cvm = adopted = await self._fleet.adopt(job.adopts, job.plan)
            return adopted
        await self._stage(job, Stage.CREATING)
        if job.cvm is not None:
            job.vm = job.cvm.name
            await self._store.vm_assigned(job.cvm.name, job.claim_id)
            return job.cvm
        reservation, job.reservation = job.reservation, None
        if reservation is None:
            raise NoCapacity("a job without a CVM and without a reservation")
        plan = replace(job.plan, resources=largest(job.plan.resources, job.claim.resources))
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
        crashpoint("running")
        limit = job.time_limit
        if job.adopts is not None:
            limit = max(limit - job.ran, COLLECTED_WITHIN)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN.total_seconds()) as deadline:

                def started() -> None:
                    if not job.started:
                        job.started = True
                        deadline.reschedule(loop.time() + limit.total_seconds())

                result = await cvm.session.execute(
                    job.order(),
                    submission,
                    on_started=started,
                    on_progress=job.progressed,
                    on_log=job.logged,
                )
        except asyncio.CancelledError:
            await self._take_leave(job, cvm)
            raise
        except TimeoutError:
            if not job.started:
                raise SessionLost("the SDK did not acknowledge the job in time") from None
            await _briefly(cvm.session.cancel(job.job_id, "timeout"))
            # A CVM that died beneath the submission ran out of nothing: only a living one times out.
            await cvm.session.confirm()
            seconds = job.time_limit.total_seconds()
            return Finding.timed_out(f"timeout: no result within {seconds:.0f} s"), None
        crashpoint("result_received")
        await self._stage(job, Stage.COLLECTING)
        return await asyncio.to_thread(self._judged, job, result), result

    async def submit_results(
        self, job: ClaimedJob, cvm: Guest, finding: Finding, result: GuestResult | None
    ) -> Ending:
        """Store the body that will be sent; the outbox delivers it. Then the SDK may forget it."""
        limit_ms = int(job.time_limit.total_seconds() * 1000)
        body = result_body(
            finding,
            claim=job.claim,
            logs=[*job.logs, *(result.logs if result else ())],
            execution_time_ms=result.execution_time_ms if result else limit_ms,
            usage=None,
            commit=job.plan.commit,
            compose_hash=job.plan.compose_hash,
            isolation_level=cvm.isolation_level,
            attestation=cvm.attestation,
        )
        outcome = _OUTCOMES[finding.outcome]
        await self._stored(job, outcome, body)
        crashpoint("result_stored")
        if result is not None:
            await _briefly(cvm.session.acknowledge(result))
        return Ending(outcome, finding.error)

    def destroy_vm(self, job: ClaimedJob) -> None:
        """Hand its CVM to destruction, which never waits; give back a reservation that no CVM used."""
        cvm, job.cvm = job.cvm, None
        adopts, job.adopts = job.adopts, None
        name = cvm.name if cvm is not None else adopts
        if name is not None:
            self._fleet.destroy(name)
        reservation, job.reservation = job.reservation, None
        if reservation is not None:
            self._quota.release(reservation)

    # Around them

    def _judged(self, job: ClaimedJob, result: GuestResult) -> Finding:
        if result.job_id != job.job_id or result.attempt != job.claim.attempt:
            raise SessionLost(f"the SDK sent a result for {result.job_id} attempt {result.attempt}")
        error = (result.error.code, result.error.message) if result.error is not None else None
        return judge(result.result, error, max_bytes=job.spec.result.max_bytes, rule=self._rule(job))

    def _rule(self, job: ClaimedJob) -> ScoringRule:
        spec = job.spec
        try:
            return self._scoring.overridden(
                spec.scoring, low=spec.result.score_min, high=spec.result.score_max
            )
        except UnknownScoring as error:
            _log.warning("challenge_scoring_ignored", error=str(error))
            return self._scoring

    async def _take_leave(self, job: ClaimedJob, cvm: Guest) -> None:
        """Cancelled while it runs: the SDK is told, and given a moment to end it in order."""
        if not job.started:
            return
        why = job.ending.reason if job.ending is not None else None
        with contextlib.suppress(CvmError, TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE.total_seconds()):
                await cvm.session.cancel(job.job_id, why or "cancelled")
                await asyncio.Event().wait()

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
                    now_is = self._clock.now()
                    kit = job.kit(now_is) if stage is Stage.RUNNING and job.kit is not None else None
                    await self._store.advance(job.claim_id, stage, at=now_is, vm=job.vm, kit=kit)
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
                    await self._store_once(job, outcome, body)
            except StoreUnavailable as error:
                _log.error("result_not_stored", error=str(error))
                await self._clock.sleep(_STORE_RETRY)
            else:
                return

    async def _store_once(self, job: ClaimedJob, outcome: JobOutcome, body: bytes) -> None:
        """What was begun is finished even when the job is cancelled meanwhile: stored, it is submitted."""
        writing = asyncio.ensure_future(
            self._store.store_result(job.claim_id, outcome, body, at=self._clock.now())
        )
        try:
            await asyncio.shield(writing)
        finally:
            while not writing.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({writing})
            if not writing.cancelled() and writing.exception() is None:
                job.stored, job.stage = True, Stage.SUBMITTING
                job.ending = Ending(outcome)
                self._outbox.wake()
                _log.info("result_stored", outcome=outcome)

    async def _finish(self, job: ClaimedJob, ending: Ending) -> None:
        self._metrics.job_ended(job.claim.challenge_id, ending.outcome)
        _log.info("job_ended", outcome=ending.outcome, reason=ending.reason)
        if job.stored:
            return
        self.destroy_vm(job)
        if ending.release is not None:
            # An absent API gives out no jobs: once the term is over, the lease has lapsed by itself.
            await self._giving_back.release(
                job.job_id, job.claim.lease.token, ending.release, patience=job.claim.lease.term_s
            )
        await self._ends.end(job.claim_id, ending.outcome, ending.reason)

    async def release_inherited(self, job: JobRecord) -> None:
        """Give back what an earlier process held, until that is answered; then the journal forgets it."""
        if job.token is not None:
            await self._giving_back.release(job.job_id, job.token, ReleaseReason.INFRA, patience=None)
        await self._ends.end(job.claim_id, JobOutcome.INFRA_ERROR, RESTARTED)

    def abandon(self, name: VmName) -> None:
        """Hand a CVM to destruction that no job can go on in."""
        self._fleet.destroy(name)

    def keep_submissions_of(self, claims: Collection[ClaimId]) -> None:
        """At start: remove the submissions that an earlier process left for other claims."""
        with contextlib.suppress(FileNotFoundError):
            for path in self._submissions.iterdir():
                if path.name not in claims:
                    path.unlink(missing_ok=True)

    def _submission_path(self, job: ClaimedJob) -> Path:
        # Named by our own id: nothing of the submission's name reaches the file system.
        return self._submissions / job.claim_id


_OUTCOMES = {
    ResultOutcome.SUCCEEDED: JobOutcome.SUCCEEDED,
    ResultOutcome.FAILED: JobOutcome.FAILED,
    ResultOutcome.TIMEOUT: JobOutcome.TIMEOUT,
}


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
