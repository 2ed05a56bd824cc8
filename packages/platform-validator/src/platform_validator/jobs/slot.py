"""A job that occupies a slot of this validator, from just before its claim until its result is stored."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from platform_protocol.ids import ChallengeId, ClaimId, JobId
from platform_protocol.platform_messages import PendingJob
from platform_validator.challenges.instance import InstanceRef
from platform_validator.challenges.room import Guest
from platform_validator.cvm.placement import Wish
from platform_validator.cvm.quota import Reservation
from platform_validator.jobs.capacity import largest
from platform_validator.jobs.work import ClaimedJob


@dataclass(slots=True)
class Slot:
    """What was set aside for one job. `ref` None: an earlier process claimed it."""

    job_id: JobId
    challenge_id: ChallengeId
    claim_id: ClaimId
    created_at: datetime | None = None
    ref: InstanceRef | None = None
    cvm: Guest | None = None
    reservation: Reservation | None = None
    source: str = "poll"
    claimed: ClaimedJob | None = None


def wish_of(job: PendingJob, ref: InstanceRef | None) -> Wish:
    """The CVM that this job needs: of the challenge's size, or the job's where that is larger.

    A job that asks for what its challenge is listed with asks for nothing of its own: platform.toml decides.
    """
    if ref is None:
        return Wish(job.resources)
    own = ref.plan.resources if job.resources == ref.listed else job.resources
    return Wish(largest(ref.plan.resources, own), ref.plan.image)
