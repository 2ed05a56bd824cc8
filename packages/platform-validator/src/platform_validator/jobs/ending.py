"""How a job ended here, and whose failure it was: pure."""

from __future__ import annotations

from dataclasses import dataclass

from platform_protocol.platform_messages import ReleaseReason
from platform_validator.cvm.errors import AttestationUnavailable, NoCapacity, SessionLost
from platform_validator.cvm.vmm import VmmAtCapacity
from platform_validator.platform_client.port import LeaseRefused
from platform_validator.store.records import JobOutcome, Stage


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended here.

    `release` is None when a result was stored, or when the lease is not ours to give back. `stage` is
    where it happened.
    """

    outcome: JobOutcome
    reason: str | None = None
    release: ReleaseReason | None = None
    stage: Stage = Stage.DONE


def died(ending: Ending) -> bool:
    """Whether the job's CVM did not serve it to its end: one that is shared is not trusted with another."""
    broken = ending.outcome in {JobOutcome.SANDBOX_DIED, JobOutcome.INFRA_ERROR}
    return broken and ending.stage in {Stage.RUNNING, Stage.COLLECTING}


def lease_ended(code: str | None, stage: Stage) -> Ending:
    """A renewal was refused, or the lease given up: the token is dead, or soon will be."""
    reason = code or "lease_lost"
    outcome = JobOutcome.CANCELLED if reason == "job_cancelled" else JobOutcome.LEASE_LOST
    return Ending(outcome, reason, None, stage)


def blame(error: Exception, *, stage: Stage, started: bool, host: str | None = None) -> Ending:
    """Whose failure it is: never the submission's, or there would be a result.

    `host` is what is wrong with the host that its CVM is on, or None.
    """
    reason = f"{type(error).__name__}: {error}"[:500]
    # 1. The API said no while we worked: the lease is gone.
    if isinstance(error, LeaseRefused):
        return lease_ended(error.code, stage)
    # 2. The whole CVM died while the submission ran: with its host, or by itself.
    if isinstance(error, SessionLost) and started and host is not None:
        return Ending(JobOutcome.INFRA_ERROR, f"its host failed: {host}"[:500], ReleaseReason.INFRA, stage)
    if isinstance(error, SessionLost) and started:
        return Ending(JobOutcome.SANDBOX_DIED, reason, ReleaseReason.SANDBOX_DIED, stage)
    # 3. No room after all: says nothing about the job.
    if isinstance(error, NoCapacity | VmmAtCapacity):
        return Ending(JobOutcome.INFRA_ERROR, reason, ReleaseReason.CAPACITY, stage)
    # 4. Attestation could not be had.
    if isinstance(error, AttestationUnavailable):
        return Ending(JobOutcome.INFRA_ERROR, reason, ReleaseReason.ATTESTATION_UNAVAILABLE, stage)
    # 5. Anything else of the infrastructure.
    return Ending(JobOutcome.INFRA_ERROR, reason, ReleaseReason.INFRA, stage)
