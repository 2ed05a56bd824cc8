"""A job that an earlier process ran, made whole again from the journal."""

from __future__ import annotations

from datetime import timedelta

from platform_protocol.platform_messages import Claim
from platform_validator.challenges.kit import KitUnreadable, unpack
from platform_validator.jobs.left_cvm import LeftCvm
from platform_validator.jobs.work import ClaimedJob
from platform_validator.store.records import JobRecord, VmRecord


def inherited_job(record: JobRecord, vm: VmRecord, left: LeftCvm, *, boottime: float) -> ClaimedJob:
    """The job, to be run on in its CVM.

    Raises:
        KitUnreadable: The journal does not hold what it takes, or another version wrote it.
        pydantic.ValidationError: The granted claim cannot be read.
    """
    if record.kit is None or record.granted is None:
        raise KitUnreadable("the journal holds no kit of this job")
    kit = unpack(record.kit, compose=vm.compose, resources=vm.resources)
    return ClaimedJob(
        claim_id=record.claim_id,
        claim=Claim.model_validate_json(record.granted),
        plan=kit.plan,
        spec=kit.spec,
        asked_at=0.0,
        claimed_at=record.claimed_at,
        adopts=left,
        ran=timedelta(seconds=max(boottime - kit.running_since, 0.0)),
        stage=record.stage,
        vm=vm.name,
    )
