"""What a later process needs to finish a running job: its instance's plan and specification, as bytes.

Journaled when the job begins to run. The operator's environment values are not in it: a CVM that runs a
job has been configured.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from pydantic import BaseModel, ValidationError

from platform_protocol.ids import ChallengeId
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.cvm.plan import CvmPlan
from platform_validator.errors import ValidatorError


class KitUnreadable(ValidatorError):
    """It was written by another version, or is damaged: the job cannot be adopted."""


class _Plan(BaseModel):
    challenge_id: ChallengeId
    instance_key: str
    commit: str
    image: str
    compose_hash: str
    bundle_sha256: str
    timeout_s: float


class _Kit(BaseModel):
    running_since_boot: float
    plan: _Plan
    spec: ChallengeSpec


@dataclass(frozen=True, slots=True)
class Kit:
    """An instance as a job needs it, and since when the job runs.

    `running_since` is CLOCK_BOOTTIME, in seconds: a wall clock that jumps must not use up a job's time,
    and one that was reset by a reboot can only give a job more of it.
    """

    running_since: float
    plan: CvmPlan
    spec: ChallengeSpec


def instance_part(plan: CvmPlan, spec: ChallengeSpec) -> str:
    """The part that all jobs of an instance share (JSON text), to be made once."""
    shown = _Plan(
        challenge_id=plan.challenge_id,
        instance_key=plan.instance_key,
        commit=plan.commit,
        image=plan.image,
        compose_hash=plan.compose_hash,
        bundle_sha256=plan.bundle_sha256,
        timeout_s=plan.timeout.total_seconds(),
    )
    return f'"plan":{shown.model_dump_json()},"spec":{spec.model_dump_json()}'


def pack(running_since: float, instance: str) -> bytes:
    """The kit of one job. `instance` is `instance_part`'s."""
    return f'{{"running_since_boot":{running_since!r},{instance}}}'.encode()


def unpack(kit: bytes, *, compose: bytes, resources: Resources) -> Kit:
    """The kit again, with what the CVM's own record holds.

    Raises:
        KitUnreadable: Not ours.
    """
    try:
        read = _Kit.model_validate_json(kit)
    except ValidationError as error:
        raise KitUnreadable(f"the journaled kit cannot be read: {error.error_count()} faults") from error
    plan = CvmPlan(
        challenge_id=read.plan.challenge_id,
        instance_key=read.plan.instance_key,
        commit=read.plan.commit,
        image=read.plan.image,
        compose=compose,
        compose_hash=read.plan.compose_hash,
        bundle_sha256=read.plan.bundle_sha256,
        resources=resources,
        timeout=timedelta(seconds=read.plan.timeout_s),
        network=read.spec.network,
    )
    return Kit(read.running_since_boot, plan, read.spec)
