"""The Store in memory, for tests and simulations: its disk can fail, and outlives a crash."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken, VmId, VmName
from platform_validator.store.port import DuplicateRecord, StoreUnavailable, UnknownRecord
from platform_validator.store.records import (
    InstanceRecord,
    JobOutcome,
    JobRecord,
    OutboxRecord,
    Stage,
    StateIdentity,
    ValueRecord,
    ValueReply,
    VmPhase,
    VmRecord,
)

_STAGES, _PHASES = list(Stage), list(VmPhase)
_DELETE = "!delete"
_MAX_ERROR = 1000


@dataclass(slots=True)
class _Disk:
    """What survives a crash. Dictionaries keep the order of insertion."""

    identity: StateIdentity
    jobs: dict[ClaimId, JobRecord] = field(default_factory=dict)
    outbox: dict[ClaimId, OutboxRecord] = field(default_factory=dict)
    vms: dict[VmName, VmRecord] = field(default_factory=dict)
    instances: dict[str, InstanceRecord] = field(default_factory=dict)
    values: dict[tuple[ChallengeId, str], ValueRecord] = field(default_factory=dict)
    replies: dict[tuple[str, str], str] = field(default_factory=dict)


class MemoryStore:
    """Every method yields to the loop once, then happens wholly.

    Args:
        identity: Of this state directory; made up when not given.

    Attributes:
        unwritable: While set, every write raises StoreUnavailable with this reason, as a full disk does.
    """

    def __init__(self, identity: StateIdentity | None = None) -> None:
        self._disk = _Disk(identity or StateIdentity(secrets.token_hex(5), str(uuid.uuid4())))
        self._open = True
        self.unwritable: str | None = None

    def reopened(self) -> MemoryStore:
        """The store as the next process finds it; this one answers no more, as after `kill -9`."""
        self._open = False
        other = MemoryStore(self._disk.identity)
        other._disk = self._disk
        return other

    async def identity(self) -> StateIdentity:
        """See the port."""
        await self._reading()
        return self._disk.identity

    async def close(self) -> None:
        """See the port."""
        self._open = False

    # Jobs

    async def open_claim(self, record: JobRecord) -> None:
        """See the port."""
        await self._writing()
        if record.claim_id in self._disk.jobs:
            raise DuplicateRecord(f"claim {record.claim_id} is known")
        self._disk.jobs[record.claim_id] = JobRecord(
            claim_id=record.claim_id,
            job_id=record.job_id,
            challenge_id=record.challenge_id,
            instance_key=record.instance_key,
            resources=record.resources,
            stage=Stage.PENDING,
            claimed_at=record.claimed_at,
        )

    async def claim_granted(
        self, claim_id: ClaimId, *, granted: bytes, attempt: int, token: LeaseToken, at: datetime
    ) -> None:
        """See the port."""
        await self._writing()
        self._disk.jobs[claim_id] = replace(
            self._job(claim_id),
            stage=Stage.CLAIMED,
            granted=granted,
            attempt=attempt,
            token=token,
            started_at=at,
        )

    async def advance(
        self, claim_id: ClaimId, stage: Stage, *, at: datetime, vm: VmName | None = None
    ) -> None:
        """See the port."""
        del at
        await self._writing()
        job = self._job(claim_id)
        if _STAGES.index(stage) >= _STAGES.index(job.stage):
            self._disk.jobs[claim_id] = replace(job, stage=stage, vm=vm or job.vm)

    async def store_result(
        self, claim_id: ClaimId, outcome: JobOutcome, body: bytes, *, at: datetime
    ) -> None:
        """See the port."""
        await self._writing()
        job = self._job(claim_id)
        if job.outcome is None:
            self._disk.jobs[claim_id] = replace(job, stage=Stage.SUBMITTING, outcome=outcome)
            self._disk.outbox[claim_id] = OutboxRecord(claim_id, JobId(job.job_id), body, at)

    async def end_job(
        self, claim_id: ClaimId, *, outcome: JobOutcome, reason: str | None, at: datetime
    ) -> None:
        """See the port."""
        await self._writing()
        job = self._job(claim_id)
        self._disk.jobs[claim_id] = replace(
            job,
            stage=Stage.DONE,
            outcome=job.outcome or outcome,
            reason=job.reason if reason is None else reason,
            ended_at=job.ended_at or at,
        )

    async def job(self, claim_id: ClaimId) -> JobRecord | None:
        """See the port."""
        await self._reading()
        return self._disk.jobs.get(claim_id)

    async def open_jobs(self) -> Sequence[JobRecord]:
        """See the port."""
        await self._reading()
        return [job for job in self._disk.jobs.values() if job.stage is not Stage.DONE]

    async def recent_jobs(self, limit: int) -> Sequence[JobRecord]:
        """See the port."""
        await self._reading()
        return list(reversed(self._disk.jobs.values()))[:limit]

    # Outbox

    async def outbox(self) -> Sequence[OutboxRecord]:
        """See the port."""
        await self._reading()
        return list(self._disk.outbox.values())

    async def outbox_tried(self, claim_id: ClaimId, error: str) -> None:
        """See the port."""
        await self._writing()
        entry = self._disk.outbox.get(claim_id)
        if entry is not None:
            self._disk.outbox[claim_id] = replace(entry, tries=entry.tries + 1, last_error=error[:_MAX_ERROR])

    async def outbox_delivered(self, claim_id: ClaimId, *, at: datetime) -> None:
        """See the port."""
        del at
        await self._writing()
        if self._disk.outbox.pop(claim_id, None) is not None:
            job = self._job(claim_id)
            if job.stage is not Stage.DONE:
                self._disk.jobs[claim_id] = replace(job, stage=Stage.SUBMITTED)

    async def outbox_refused(self, claim_id: ClaimId, code: str, *, at: datetime) -> None:
        """See the port."""
        await self._writing()
        if self._disk.outbox.pop(claim_id, None) is not None:
            outcome = JobOutcome.CANCELLED if code == "job_cancelled" else JobOutcome.LEASE_LOST
            self._disk.jobs[claim_id] = replace(
                self._job(claim_id), stage=Stage.DONE, outcome=outcome, reason=code, ended_at=at
            )

    # CVMs

    async def intend_vm(self, record: VmRecord) -> None:
        """See the port."""
        await self._writing()
        if record.name in self._disk.vms:
            raise DuplicateRecord(f"CVM {record.name} is known")
        self._disk.vms[record.name] = replace(
            record, vm_id=None, vm_instance=None, attestation=None, reason=None, gone_at=None
        )

    async def vm_created(self, name: VmName, vm_id: VmId) -> None:
        """See the port."""
        await self._writing()
        vm = self._vm(name)
        phase = VmPhase.CREATED if vm.phase is VmPhase.INTENDED else vm.phase
        self._disk.vms[name] = replace(vm, vm_id=vm_id, phase=phase)

    async def vm_phase(
        self, name: VmName, phase: VmPhase, *, at: datetime, reason: str | None = None
    ) -> None:
        """See the port."""
        await self._writing()
        vm = self._vm(name)
        if _PHASES.index(phase) > _PHASES.index(vm.phase):
            self._disk.vms[name] = replace(
                vm,
                phase=phase,
                reason=vm.reason if reason is None else reason,
                gone_at=at if phase is VmPhase.GONE else vm.gone_at,
            )

    async def vm_attested(self, name: VmName, *, attestation: str, vm_instance: str | None) -> None:
        """See the port."""
        await self._writing()
        vm = self._vm(name)
        others = {each.vm_instance for each in self._disk.vms.values() if each.name != name}
        if vm_instance is not None and vm_instance in others:
            raise DuplicateRecord(f"another CVM has the instance id {vm_instance}")
        self._disk.vms[name] = replace(vm, attestation=attestation, vm_instance=vm_instance)

    async def vm_assigned(self, name: VmName, claim_id: ClaimId) -> None:
        """See the port."""
        await self._writing()
        vm, job = self._vm(name), self._job(claim_id)
        if vm.claim_id is not None:
            raise DuplicateRecord(f"CVM {name} was taken by {vm.claim_id}")
        self._disk.vms[name] = replace(vm, claim_id=claim_id)
        self._disk.jobs[claim_id] = replace(job, vm=name)

    async def vm(self, name: VmName) -> VmRecord | None:
        """See the port."""
        await self._reading()
        return self._disk.vms.get(name)

    async def open_vms(self) -> Sequence[VmRecord]:
        """See the port."""
        await self._reading()
        return [vm for vm in self._disk.vms.values() if vm.phase is not VmPhase.GONE]

    # Challenges

    async def put_instance(self, record: InstanceRecord) -> None:
        """See the port."""
        await self._writing()
        self._disk.instances[record.key] = record

    async def switch_instances(self, new: InstanceRecord, old: InstanceRecord | None) -> None:
        """See the port."""
        await self._writing()
        for record in (new, old):
            if record is not None:
                self._disk.instances[record.key] = record

    async def instances(self) -> Sequence[InstanceRecord]:
        """See the port."""
        await self._reading()
        return list(self._disk.instances.values())

    async def remove_instance(self, key: str) -> None:
        """See the port."""
        await self._writing()
        self._disk.instances.pop(key, None)

    # Values

    async def values(
        self, challenge_id: ChallengeId, prefix: str = "", limit: int = 1000
    ) -> Sequence[ValueRecord]:
        """See the port."""
        await self._reading()
        found = [
            record
            for (owner, key), record in self._disk.values.items()
            if owner == challenge_id and key.startswith(prefix)
        ]
        return sorted(found, key=lambda record: record.key)[:limit]

    async def value(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """See the port."""
        await self._reading()
        return self._disk.values.get((challenge_id, key))

    async def change_value(
        self,
        challenge_id: ChallengeId,
        key: str,
        *,
        change: Callable[[ValueRecord | None], tuple[str | None, str]],
        session_id: str,
        request_id: str,
        at: datetime,
    ) -> ValueReply:
        """See the port."""
        await self._writing()
        request, place = (session_id, request_id), (challenge_id, key)
        if request not in self._disk.replies:
            present = self._disk.values.get(place)
            value, reply = change(present)
            if reply.startswith(_DELETE):
                self._disk.values.pop(place, None)
            elif value is not None:
                version = 1 if present is None else present.version + 1
                self._disk.values[place] = ValueRecord(challenge_id, key, value, version, at)
            self._disk.replies[request] = reply.removeprefix(_DELETE)
        return ValueReply(session_id, request_id, self._disk.replies[request])

    # The disk

    async def _reading(self) -> None:
        await asyncio.sleep(0)
        if not self._open:
            raise StoreUnavailable("the store is closed")

    async def _writing(self) -> None:
        await self._reading()
        if self.unwritable is not None:
            raise StoreUnavailable(f"the database cannot be written: {self.unwritable}")

    def _job(self, claim_id: ClaimId) -> JobRecord:
        job = self._disk.jobs.get(claim_id)
        if job is None:
            raise UnknownRecord(f"no claim {claim_id}")
        return job

    def _vm(self, name: VmName) -> VmRecord:
        vm = self._disk.vms.get(name)
        if vm is None:
            raise UnknownRecord(f"no CVM {name}")
        return vm
