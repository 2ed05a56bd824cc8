"""One claimed job from its code to its stored result: the usage guide's steps, under their names.

Whatever goes wrong is decided once, in `ending.blame`: a failure of the infrastructure is never scored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog

from platform_protocol.ids import VmName
from platform_protocol.platform_messages import ReleaseReason, ResourceUsage, ResultOutcome
from platform_validator.challenges.room import CvmFleet, Guest
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.errors import CvmError, NoCapacity, SessionLost
from platform_validator.cvm.jobs import GuestResult
from platform_validator.cvm.quota import Quota
from platform_validator.cvm.vmm import VmmError
from platform_validator.jobs.diary import Diary
from platform_validator.jobs.ending import Ending, blame
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.giving_back import GivingBack
from platform_validator.jobs.left_cvm import LeftCvm
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.receipts import ReceiptMaker
from platform_validator.jobs.recovery import RESTARTED
from platform_validator.jobs.result import Finding, judge, result_body
from platform_validator.jobs.submissions import Submissions
from platform_validator.jobs.tenure import Tenure
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.port import PlatformError
from platform_validator.scoring import ScoringRule
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, Purpose, Stage

ACKNOWLEDGED_WITHIN = timedelta(minutes=2)
LAST_WORD_WITHIN = timedelta(seconds=30)
CANCEL_GRACE = timedelta(seconds=3)

_STAGES = frozenset(Stage)

_log = structlog.get_logger(__name__)


class JobExecutor:
    """Runs claimed jobs; each in the task that calls `execute_job`.

    Args:
        store: The journal.
        fleet: Boots and destroys CVMs.
        quota: Gets back what was reserved and never used.
        tenure: Ends the work when the lease is lost.
        diary: Writes stages and results.
        submissions: Where submissions lie.
        giving_back: Releases claims.
        scoring: The operator's rule; a challenge's `[scoring]` wins over it.
        ends: Writes down how jobs without a result ended.
        metrics: Is told.
        receipts: Signs what is submitted; None: no receipts.
    """

    def __init__(
        self,
        *,
        store: Store,
        fleet: CvmFleet,
        quota: Quota,
        tenure: Tenure,
        diary: Diary,
        submissions: Submissions,
        giving_back: GivingBack,
        scoring: ScoringRule,
        ends: JobEnds,
        metrics: JobMetrics,
        receipts: ReceiptMaker | None = None,
    ) -> None:
        self._store = store
        self._receipts = receipts
        self._fleet = fleet
        self._quota = quota
        self.tenure = tenure
        self._diary = diary
        self.submissions = submissions
        self._giving_back = giving_back
        self._scoring = scoring
        self._ends = ends
        self._metrics = metrics

    async def execute_job(self, job: ClaimedJob) -> Ending:
        """Run a claimed job to its end. Whatever it held is given back when this returns or raises.

        Returns:
            How it ended; a stored result is on its way through the outbox by then.
        """
        structlog.contextvars.bind_contextvars(job_id=job.job_id, attempt=job.claim.attempt)
        self._diary.begin(job)
        try:
            ending = await self.tenure.run(job, self._steps)
        except asyncio.CancelledError:
            # A result that is stored by now is how it ended, whatever ends us.
            kept = job.ending if job.stored else None
            await self._finish(job, kept or Ending(JobOutcome.CANCELLED, "drained", ReleaseReason.DRAIN))
            raise
        else:
            await self._finish(job, ending)
            return ending
        finally:
            self.destroy_vm(job)
            self.submissions.forget(job)
            structlog.contextvars.unbind_contextvars("job_id", "attempt")

    async def _steps(self, job: ClaimedJob) -> Ending:
        try:
            submission = await self.download_challenge(job)
            cvm = await self.create_vm(job)
            finding, result = await self.evaluate_submission(job, cvm, submission)
            return await self.submit_results(job, cvm, finding, result)
        except (PlatformError, CvmError, VmmError, StoreUnavailable, OSError) as error:
            ending = blame(error, stage=job.stage, started=job.started, host=await self._trouble(job, error))
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
        await self._diary.enter(job, Stage.FETCHING)
        return await self.submissions.fetch(job)

    async def create_vm(self, job: ClaimedJob) -> Guest:
        """A CVM for this job alone: the ready one that was set aside for it, or one that boots now.

        In `shared` mode it is a seat in the challenge's CVM. A job that ran under an earlier process goes on
        in the CVM that it ran in.
        """
        if job.adopts is not None:
            job.cvm = adopted = await job.adopts.adopt(job.plan)
            return adopted
        await self._diary.enter(job, Stage.CREATING)
        if job.cvm is not None:
            job.vm = job.cvm.name
            if not job.shared:
                await self._store.vm_assigned(job.cvm.name, job.claim_id)
                self._fleet.assigned(job.cvm.name)
            return job.cvm
        reservation, job.reservation = job.reservation, None
        if reservation is None:
            raise NoCapacity("a job without a CVM and without a reservation")
        plan = replace(job.plan, resources=reservation.resources)
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
        await self._diary.enter(job, Stage.RUNNING)
        crashpoint("running")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN.total_seconds()) as deadline:

                def started(already: bool) -> None:
                    if not job.started:
                        job.started = True
                        job.ran = job.ran if already else timedelta(0)
                        deadline.reschedule(loop.time() + _time_left(job).total_seconds())

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
            return await self._timed_out(job, cvm), None
        crashpoint("result_received")
        await self._diary.enter(job, Stage.COLLECTING)
        return await asyncio.to_thread(self._judged, job, result), result

    async def submit_results(
        self, job: ClaimedJob, cvm: Guest, finding: Finding, result: GuestResult | None
    ) -> Ending:
        """Store the body that will be sent; the outbox delivers it. Then the SDK may forget it."""
        used = await self._used(job, cvm)
        await self.tenure.assured(job)
        limit_ms = _milliseconds(job.time_limit)
        body = await asyncio.to_thread(
            result_body,
            finding,
            claim=job.claim,
            logs=[*job.logs, *(result.logs if result else ())],
            execution_time_ms=_milliseconds(job.ran) + result.execution_time_ms if result else limit_ms,
            usage=used,
            commit=job.plan.commit,
            compose_hash=job.plan.compose_hash,
            isolation_level=cvm.isolation_level,
            attestation=cvm.attestation,
            receipt=lambda shown: (
                self._receipts.seal(job, shown, result, os_image=cvm.os_image) if self._receipts else None
            ),
        )
        outcome = _OUTCOMES[finding.outcome]
        await self._diary.keep_result(job, outcome, body)
        crashpoint("result_stored")
        if result is not None:
            await _briefly(cvm.session.acknowledge(result))
        return Ending(outcome, finding.error)

    def destroy_vm(self, job: ClaimedJob) -> None:
        """Hand its CVM to destruction, which never waits; give back a reservation that no CVM used.

        A shared CVM stays: the job's seat in it is given up with its reference on the instance.
        """
        cvm, job.cvm = job.cvm, None
        adopts, job.adopts = job.adopts, None
        if adopts is not None:
            adopts.let_go()
        elif cvm is not None and not job.shared:
            self._fleet.destroy(cvm.name)
        reservation, job.reservation = job.reservation, None
        if reservation is not None:
            self._quota.release(reservation)

    # Around them

    def _judged(self, job: ClaimedJob, result: GuestResult) -> Finding:
        if result.job_id != job.job_id or result.attempt != job.claim.attempt:
            raise SessionLost(f"the SDK sent a result for {result.job_id} attempt {result.attempt}")
        error = (result.error.code, result.error.message) if result.error is not None else None
        return judge(
            result.result,
            error,
            max_bytes=job.spec.result.max_bytes,
            rule=self._scoring.overridden(job.spec),
            size=result.result_bytes,
        )

    async def _used(self, job: ClaimedJob, cvm: Guest) -> ResourceUsage | None:
        """What the job's CVM used, if known. In a shared CVM nobody can tell whose it was."""
        used = None if job.shared else await self._fleet.usage(cvm.name)
        return None if used is None else used.reported()

    async def _trouble(self, job: ClaimedJob, error: Exception) -> str | None:
        """What is wrong with the host of a CVM that was lost."""
        if job.vm is None or not isinstance(error, SessionLost):
            return None
        return await self._fleet.trouble(job.vm)

    async def _timed_out(self, job: ClaimedJob, cvm: Guest) -> Finding:
        """The SDK ends it; a CVM that died beneath it ran out of nothing: only a living one times out."""
        try:
            await _briefly(cvm.session.cancel(job.job_id, "timeout"))
            await cvm.session.confirm()
        except asyncio.CancelledError:
            # In a shared CVM it would run on beside the next one.
            await self._take_leave(job, cvm)
            raise
        return Finding.timed_out(f"timeout: no result within {job.time_limit.total_seconds():.0f} s")

    async def _take_leave(self, job: ClaimedJob, cvm: Guest) -> None:
        """Cancelled while it runs: the SDK is told, and given a moment to end it in order."""
        if not job.started and not job.shared:
            return
        why = job.ending.reason if job.ending is not None else None
        with contextlib.suppress(CvmError, TimeoutError):
            async with asyncio.timeout(CANCEL_GRACE.total_seconds()):
                await cvm.session.cancel(job.job_id, why or "cancelled")
                await asyncio.Event().wait()

    def _enter(self, group: asyncio.TaskGroup, job: ClaimedJob, name: str) -> None:
        """A stage that the fleet reports while it boots; unknown ones are passed over."""
        if name in _STAGES:
            group.create_task(self._diary.enter(job, Stage(name)))

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
        self._metrics.job_ended(job.challenge_id, JobOutcome.INFRA_ERROR)
        _log.info("job_ended", job_id=job.job_id, outcome=JobOutcome.INFRA_ERROR, reason=RESTARTED)
        await self._ends.end(job.claim_id, JobOutcome.INFRA_ERROR, RESTARTED)

    def left_cvms(self, names: Iterable[VmName]) -> dict[VmName, LeftCvm]:
        """CVMs that jobs go on in, each held once for each time that it is named."""
        left: dict[VmName, LeftCvm] = {}
        for name in names:
            left.setdefault(name, LeftCvm(name, self._fleet)).hold()
        return left


_OUTCOMES = {
    ResultOutcome.SUCCEEDED: JobOutcome.SUCCEEDED,
    ResultOutcome.FAILED: JobOutcome.FAILED,
    ResultOutcome.TIMEOUT: JobOutcome.TIMEOUT,
}


def _time_left(job: ClaimedJob) -> timedelta:
    """All of it, or what an earlier process left of it."""
    if not job.ran:
        return job.time_limit
    # `ran` counts from before the SDK's acknowledgement: no submission is charged for a restart of ours.
    return min(job.time_limit, max(job.time_limit - job.ran, timedelta(0)) + ACKNOWLEDGED_WITHIN)


def _milliseconds(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)


async def _caught(boot: Awaitable[Guest]) -> Guest | Exception:
    try:
        return await boot
    except (CvmError, VmmError, StoreUnavailable) as error:
        return error


async def _briefly(act: Awaitable[object]) -> None:
    """A last word to a CVM that is about to be destroyed: tried, not insisted on."""
    with contextlib.suppress(CvmError, TimeoutError):
        async with asyncio.timeout(LAST_WORD_WITHIN.total_seconds()):
            await act
