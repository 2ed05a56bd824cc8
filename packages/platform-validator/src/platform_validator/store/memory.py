"""The Store in memory: the same rules as SQLite's, for tests and simulations. Forgets all when it goes."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from platform_protocol.ids import ChallengeId, ClaimId, LeaseToken, VmId, VmName
from platform_validator.host_name import HostName
from platform_validator.store.port import DuplicateRecord, StoreUnavailable, UnknownRecord
from platform_validator.store.records import (
    EnvRecord,
    InstanceEvent,
    InstanceRecord,
    InstanceState,
    JobOutcome,
    JobRecord,
    OutboxRecord,
    Resealed,
    SealedText,
    Stage,
    StateIdentity,
    ValueChange,
    ValueRecord,
    ValueReply,
    ValueSlot,
    ValueUsage,
    VmPhase,
    VmRecord,
)
from platform_validator.store.value_memory import ValueMemory
from platform_validator.store.vm_memory import VmMemory

_STAGES = list(Stage)


class MemoryStore:
    """`fail` is asked before each call by its name; where it is true the call raises StoreUnavailable."""

    def __init__(
        self, fail: Callable[[str], bool] = lambda _: False, identity: StateIdentity | None = None
    ) -> None:
        self.fail = fail
        self._identity = identity or StateIdentity(secrets.token_hex(5), str(uuid.uuid4()))
        self._jobs: dict[ClaimId, JobRecord] = {}
        self._outbox: dict[ClaimId, OutboxRecord] = {}
        self._vms = VmMemory()
        self._instances: dict[str, InstanceRecord] = {}
        self._history: list[InstanceEvent] = []
        self._drained: dict[HostName, datetime] = {}
        self._env: dict[tuple[ChallengeId, str], EnvRecord] = {}
        self._values = ValueMemory()
        self._closed = False

    async def identity(self) -> StateIdentity:
        """See the port."""
        self._check("identity")
        return self._identity

    async def close(self) -> None:
        """See the port."""
        self._closed = True

    # Jobs

    async def open_claim(self, record: JobRecord) -> None:
        """See the port."""
        self._check("open_claim")
        if record.claim_id in self._jobs:
            raise DuplicateRecord(f"claim {record.claim_id} is there")
        fresh = JobRecord(
            claim_id=record.claim_id,
            job_id=record.job_id,
            challenge_id=record.challenge_id,
            instance_key=record.instance_key,
            resources=record.resources,
            stage=Stage.PENDING,
            claimed_at=record.claimed_at,
        )
        self._jobs[record.claim_id] = fresh

    async def claim_granted(
        self, claim_id: ClaimId, *, granted: bytes, attempt: int, token: LeaseToken, at: datetime
    ) -> None:
        """See the port."""
        self._check("claim_granted")
        self._jobs[claim_id] = replace(
            self._job(claim_id),
            stage=Stage.CLAIMED,
            granted=granted,
            attempt=attempt,
            token=token,
            started_at=at,
        )

    async def advance(
        self,
        claim_id: ClaimId,
        stage: Stage,
        *,
        at: datetime,
        vm: VmName | None = None,
        kit: bytes | None = None,
    ) -> None:
        """See the port."""
        del at
        self._check("advance")
        job = self._job(claim_id)
        if _STAGES.index(stage) >= _STAGES.index(job.stage):
            self._jobs[claim_id] = replace(job, stage=stage, vm=vm or job.vm, kit=kit or job.kit)

    async def store_result(
        self, claim_id: ClaimId, outcome: JobOutcome, body: bytes, *, at: datetime
    ) -> None:
        """See the port."""
        self._check("store_result")
        job = self._job(claim_id)
        if job.outcome is None:
            self._jobs[claim_id] = replace(job, stage=Stage.SUBMITTING, outcome=outcome)
            self._outbox[claim_id] = OutboxRecord(claim_id, job.job_id, body, at)

    async def end_job(
        self, claim_id: ClaimId, *, outcome: JobOutcome, reason: str | None, at: datetime
    ) -> None:
        """See the port."""
        self._check("end_job")
        job = self._job(claim_id)
        self._jobs[claim_id] = replace(
            job,
            stage=Stage.DONE,
            outcome=job.outcome or outcome,
            reason=job.reason if reason is None else reason,
            ended_at=job.ended_at or at,
        )

    async def job(self, claim_id: ClaimId) -> JobRecord | None:
        """See the port."""
        self._check("job")
        return self._jobs.get(claim_id)

    async def open_jobs(self) -> Sequence[JobRecord]:
        """See the port."""
        self._check("open_jobs")
        return [job for job in self._jobs.values() if job.stage is not Stage.DONE]

    def now_open(self) -> Sequence[JobRecord]:
        """What `open_jobs` answers, for whoever looks from outside."""
        return [job for job in self._jobs.values() if job.stage is not Stage.DONE]

    async def recent_jobs(self, limit: int) -> Sequence[JobRecord]:
        """See the port."""
        self._check("recent_jobs")
        return list(reversed(self._jobs.values()))[:limit]

    async def compact(self, *, ended_before: datetime, keep: int) -> int:
        """See the port."""
        self._check("compact")
        old = list(self._jobs.values())[: max(len(self._jobs) - keep, 0)]
        jobs = [
            job
            for job in old
            if job.stage is Stage.DONE
            and _before(job.ended_at, ended_before)
            and job.claim_id not in self._outbox
        ]
        for job in jobs:
            del self._jobs[job.claim_id]
        vms = self._vms.forget(gone_before=ended_before)
        self._history = [event for event in self._history if event.at >= ended_before]
        self._values.forget(sessions={vm.session_id for vm in vms}, deleted_before=ended_before)
        return len(jobs) + len(vms)

    # Outbox

    async def outbox(self) -> Sequence[OutboxRecord]:
        """See the port."""
        self._check("outbox")
        return list(self._outbox.values())

    async def outbox_tried(self, claim_id: ClaimId, error: str) -> None:
        """See the port."""
        self._check("outbox_tried")
        entry = self._outbox.get(claim_id)
        if entry is not None:
            self._outbox[claim_id] = replace(entry, tries=entry.tries + 1, last_error=error[:1000])

    async def outbox_delivered(self, claim_id: ClaimId, *, at: datetime) -> None:
        """See the port."""
        self._check("outbox_delivered")
        if self._outbox.pop(claim_id, None) is not None:
            job = self._job(claim_id)
            if job.stage is not Stage.DONE:
                self._jobs[claim_id] = replace(job, stage=Stage.DONE, ended_at=at)

    async def outbox_refused(self, claim_id: ClaimId, code: str, *, at: datetime) -> None:
        """See the port."""
        self._check("outbox_refused")
        if self._outbox.pop(claim_id, None) is not None:
            outcome = JobOutcome.CANCELLED if code == "job_cancelled" else JobOutcome.LEASE_LOST
            job = self._job(claim_id)
            self._jobs[claim_id] = replace(job, stage=Stage.DONE, outcome=outcome, reason=code, ended_at=at)

    # CVMs

    async def intend_vm(self, record: VmRecord) -> None:
        """See the port."""
        self._check("intend_vm")
        self._vms.intend(record)

    async def vm_created(self, name: VmName, vm_id: VmId) -> None:
        """See the port."""
        self._check("vm_created")
        self._vms.created(name, vm_id)

    async def vm_phase(
        self, name: VmName, phase: VmPhase, *, at: datetime, reason: str | None = None
    ) -> None:
        """See the port."""
        self._check("vm_phase")
        self._vms.enter(name, phase, reason, at)

    async def vm_attested(
        self, name: VmName, *, attestation: str, vm_instance: str | None, os_image: str | None = None
    ) -> None:
        """See the port."""
        self._check("vm_attested")
        self._vms.attested(name, attestation, vm_instance, os_image)

    async def vm_assigned(self, name: VmName, claim_id: ClaimId) -> None:
        """See the port."""
        self._check("vm_assigned")
        job = self._job(claim_id)
        self._vms.assign(name, claim_id)
        self._jobs[claim_id] = replace(job, vm=name)

    async def vm(self, name: VmName) -> VmRecord | None:
        """See the port."""
        self._check("vm")
        return self._vms.one(name)

    async def open_vms(self) -> Sequence[VmRecord]:
        """See the port."""
        self._check("open_vms")
        return self._vms.open()

    # Hosts

    async def drain_host(self, name: HostName, *, at: datetime) -> None:
        """See the port."""
        self._check("drain_host")
        self._drained.setdefault(name, at)

    async def undrain_host(self, name: HostName) -> None:
        """See the port."""
        self._check("undrain_host")
        self._drained.pop(name, None)

    async def drained_hosts(self) -> Mapping[HostName, datetime]:
        """See the port."""
        self._check("drained_hosts")
        return dict(sorted(self._drained.items()))

    # Challenges

    async def put_instance(self, record: InstanceRecord) -> None:
        """See the port."""
        self._check("put_instance")
        self._put_instance(record)

    async def switch_instances(self, new: InstanceRecord, old: InstanceRecord | None) -> None:
        """See the port."""
        self._check("switch_instances")
        for record in (new, old):
            if record is not None:
                self._put_instance(record)

    def _put_instance(self, record: InstanceRecord) -> None:
        before = self._instances.get(record.key)
        self._instances[record.key] = record
        if before is None or (before.state, before.reason) != (record.state, record.reason):
            self._note(record, record.state, record.reason, record.since)

    def _note(
        self, record: InstanceRecord, state: InstanceState | None, reason: str | None, at: datetime
    ) -> None:
        event = InstanceEvent(record.challenge_id, record.key, record.commit, state, reason, at)
        self._history.append(event)

    async def instances(self) -> Sequence[InstanceRecord]:
        """See the port."""
        self._check("instances")
        return list(self._instances.values())

    async def remove_instance(self, key: str, *, at: datetime, reason: str | None = None) -> None:
        """See the port."""
        self._check("remove_instance")
        record = self._instances.pop(key, None)
        if record is not None:
            self._note(record, None, reason or record.reason, at)

    async def challenge_history(self, challenge_id: ChallengeId, limit: int) -> Sequence[InstanceEvent]:
        """See the port."""
        self._check("challenge_history")
        return self.now_history(challenge_id)[:limit]

    def now_history(self, challenge_id: ChallengeId) -> list[InstanceEvent]:
        """What became of a challenge's instances, newest first; at once, for whoever looks on."""
        return [each for each in reversed(self._history) if each.challenge_id == challenge_id]

    async def put_env(self, record: EnvRecord) -> None:
        """See the port."""
        self._check("put_env")
        self._env[record.challenge_id, record.name] = record

    async def remove_env(self, challenge_id: ChallengeId, name: str) -> bool:
        """See the port."""
        self._check("remove_env")
        return self._env.pop((challenge_id, name), None) is not None

    async def env(self, challenge_id: ChallengeId | None = None) -> Sequence[EnvRecord]:
        """See the port."""
        self._check("env")
        return [self._env[key] for key in sorted(self._env) if challenge_id in (None, key[0])]

    # Values

    async def values(
        self, challenge_id: ChallengeId, prefix: str = "", limit: int = 1000
    ) -> Sequence[ValueRecord]:
        """See the port."""
        self._check("values")
        return self._values.prefixed(challenge_id, prefix, limit)

    async def value(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """See the port."""
        self._check("value")
        return self._values.one(challenge_id, key)

    async def change_value(
        self,
        challenge_id: ChallengeId,
        key: str,
        *,
        change: Callable[[ValueSlot], ValueChange],
        request: tuple[str, str] | None,
        at: datetime,
    ) -> SealedText:
        """See the port."""
        self._check("change_value")
        return self._values.change(challenge_id, key, change, request, at)

    async def reseal_values(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueRecord], SealedText | None]
    ) -> Resealed:
        """See the port."""
        self._check("reseal_values")
        return self._values.reseal_values(key_id, limit, skip, reseal)

    async def reseal_replies(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueReply], SealedText | None]
    ) -> Resealed:
        """See the port."""
        self._check("reseal_replies")
        return self._values.reseal_replies(key_id, limit, skip, reseal)

    async def values_used(self) -> Sequence[ValueUsage]:
        """See the port."""
        self._check("values_used")
        return self._values.used()

    def _check(self, name: str) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if self.fail(name):
            raise StoreUnavailable(f"{name}: made to fail")

    def _job(self, claim_id: ClaimId) -> JobRecord:
        if claim_id not in self._jobs:
            raise UnknownRecord(f"no claim {claim_id}")
        return self._jobs[claim_id]


def _before(moment: datetime | None, limit: datetime) -> bool:
    return moment is not None and moment < limit
