"""The Store over SQLite: one writer thread, WAL, every commit synced before a method returns."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from platform_protocol.ids import ChallengeId, ClaimId, LeaseToken, VmId, VmName
from platform_validator.host_name import HostName
from platform_validator.store.port import DuplicateRecord, StoreCorrupt, UnknownRecord
from platform_validator.store.records import (
    EnvRecord,
    InstanceEvent,
    InstanceRecord,
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
from platform_validator.store.rows import (
    GONE,
    env_of,
    event_of,
    instance_of,
    instance_row,
    job_of,
    moment,
    outbox_of,
    stamp,
    vm_of,
    vm_row,
)
from platform_validator.store.transactions import Transactions
from platform_validator.store.value_table import ValueTable

_STAGES, _PHASES = list(Stage), list(VmPhase)
_BATCH = 200


class SqliteStore:
    """Made by `open`. Each method is one transaction, in the order in which they were called."""

    def __init__(self, database: Transactions) -> None:
        self._db = database
        self._values = ValueTable(database)
        self.trouble = database.trouble

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Open or create the database (0600) and bring it to this program's version.

        Raises:
            StoreCorrupt: Damaged, or from a newer version.
            StoreUnavailable: It cannot be opened or written.
        """
        return cls(await Transactions.open(path))

    async def close(self) -> None:
        """See the port."""
        await self._db.close()

    async def identity(self) -> StateIdentity:
        """See the port."""

        def work() -> StateIdentity:
            row = self._db.one("meta_get", key="state_id")
            if row is None:
                self._db.run("meta_put", key="state_id", value=secrets.token_hex(5))
                self._db.run("meta_put", key="instance", value=str(uuid.uuid4()))
            state_id, instance = (
                self._db.one("meta_get", key="state_id"),
                self._db.one("meta_get", key="instance"),
            )
            if state_id is None or instance is None:
                raise StoreCorrupt("the database has no identity: restore it from a backup")
            return StateIdentity(state_id[0], instance[0])

        return await self._db.do(work)

    # Jobs

    async def open_claim(self, record: JobRecord) -> None:
        """See the port."""
        await self._db.do(
            lambda: self._db.run(
                "job_insert",
                claim_id=record.claim_id,
                job_id=record.job_id,
                challenge_id=record.challenge_id,
                instance_key=record.instance_key,
                resources=record.resources.model_dump_json(),
                claimed_at=stamp(record.claimed_at),
            )
        )

    async def claim_granted(
        self, claim_id: ClaimId, *, granted: bytes, attempt: int, token: LeaseToken, at: datetime
    ) -> None:
        """See the port."""
        await self._db.do(
            lambda: self._db.known(
                "job_granted", claim_id=claim_id, granted=granted, attempt=attempt, token=token, at=stamp(at)
            )
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

        def work() -> None:
            row = self._db.one("job_one", claim_id=claim_id)
            if row is None:
                raise UnknownRecord(f"no claim {claim_id}")
            if _STAGES.index(stage) >= _STAGES.index(Stage(row["stage"])):
                self._db.run("job_advance", claim_id=claim_id, stage=stage.value, vm=vm, kit=kit)

        await self._db.do(work)

    async def store_result(
        self, claim_id: ClaimId, outcome: JobOutcome, body: bytes, *, at: datetime
    ) -> None:
        """See the port."""

        def work() -> None:
            if self._db.one("job_one", claim_id=claim_id) is None:
                raise UnknownRecord(f"no claim {claim_id}")
            if self._db.run("job_result", claim_id=claim_id, outcome=outcome.value):
                self._db.run("outbox_insert", claim_id=claim_id, body=body, at=stamp(at))

        await self._db.do(work)

    async def end_job(
        self, claim_id: ClaimId, *, outcome: JobOutcome, reason: str | None, at: datetime
    ) -> None:
        """See the port."""
        await self._db.do(
            lambda: self._db.known(
                "job_end", claim_id=claim_id, outcome=outcome.value, reason=reason, at=stamp(at)
            )
        )

    async def job(self, claim_id: ClaimId) -> JobRecord | None:
        """See the port."""
        row = await self._db.read(lambda: self._db.one("job_one", claim_id=claim_id))
        return None if row is None else job_of(row)

    async def open_jobs(self) -> Sequence[JobRecord]:
        """See the port."""
        return [job_of(row) for row in await self._db.read(lambda: self._db.all("jobs_open"))]

    async def recent_jobs(self, limit: int) -> Sequence[JobRecord]:
        """See the port."""
        return [job_of(row) for row in await self._db.read(lambda: self._db.all("jobs_recent", limit=limit))]

    async def compact(self, *, ended_before: datetime, keep: int) -> int:
        """See the port."""
        before, removed = stamp(ended_before), 0
        last = await self._db.read(lambda: self._db.one("jobs_newest_to_go", keep=keep))
        newest = 0 if last is None else last[0]

        def work() -> tuple[int, int]:
            gone = self._db.run("jobs_compact", before=before, newest=newest, batch=_BATCH)
            self._db.run("replies_compact", before=before, batch=_BATCH)
            self._db.run("values_compact", before=before)
            gone += self._db.run("vms_compact", before=before, batch=_BATCH)
            return gone, self._db.run("history_compact", before=before, batch=_BATCH)

        # One transaction a batch: jobs that write meanwhile wait for one at most.
        while any(batch := await self._db.do(work)):
            removed += batch[0]
        return removed

    # Outbox

    async def outbox(self) -> Sequence[OutboxRecord]:
        """See the port."""
        return [outbox_of(row) for row in await self._db.read(lambda: self._db.all("outbox_all"))]

    async def outbox_tried(self, claim_id: ClaimId, error: str) -> None:
        """See the port."""
        await self._db.do(lambda: self._db.run("outbox_tried", claim_id=claim_id, error=error[:1000]))

    async def outbox_delivered(self, claim_id: ClaimId, *, at: datetime) -> None:
        """See the port."""

        def work() -> None:
            if self._db.run("outbox_delete", claim_id=claim_id):
                self._db.run("job_submitted", claim_id=claim_id, at=stamp(at))

        await self._db.do(work)

    async def outbox_refused(self, claim_id: ClaimId, code: str, *, at: datetime) -> None:
        """See the port."""
        outcome = JobOutcome.CANCELLED if code == "job_cancelled" else JobOutcome.LEASE_LOST

        def work() -> None:
            if self._db.run("outbox_delete", claim_id=claim_id):
                self._db.run("job_refused", claim_id=claim_id, outcome=outcome.value, code=code, at=stamp(at))

        await self._db.do(work)

    # CVMs

    async def intend_vm(self, record: VmRecord) -> None:
        """See the port."""
        await self._db.do(lambda: self._db.run("vm_insert", **vm_row(record)))

    async def vm_created(self, name: VmName, vm_id: VmId) -> None:
        """See the port."""
        await self._db.do(lambda: self._db.known("vm_created", name=name, vm_id=vm_id))

    async def vm_phase(
        self, name: VmName, phase: VmPhase, *, at: datetime, reason: str | None = None
    ) -> None:
        """See the port."""

        def work() -> None:
            row = self._db.one("vm_one", name=name)
            if row is None:
                raise UnknownRecord(f"no CVM {name}")
            if _PHASES.index(phase) > _PHASES.index(VmPhase(row["phase"])):
                self._db.run("vm_phase", name=name, phase=phase.value, reason=reason, at=stamp(at))

        await self._db.do(work)

    async def vm_attested(
        self, name: VmName, *, attestation: str, vm_instance: str | None, os_image: str | None = None
    ) -> None:
        """See the port."""
        await self._db.do(
            lambda: self._db.known(
                "vm_attested",
                name=name,
                attestation=attestation,
                vm_instance=vm_instance,
                os_image=os_image,
            )
        )

    async def vm_assigned(self, name: VmName, claim_id: ClaimId) -> None:
        """See the port."""

        def work() -> None:
            row = self._db.one("vm_one", name=name)
            if row is None:
                raise UnknownRecord(f"no CVM {name}")
            if row["claim_id"] is not None:
                raise DuplicateRecord(f"CVM {name} was taken by {row['claim_id']}")
            self._db.run("vm_assigned", name=name, claim_id=claim_id)
            self._db.known("job_vm", claim_id=claim_id, vm=name)

        await self._db.do(work)

    async def vm(self, name: VmName) -> VmRecord | None:
        """See the port."""
        row = await self._db.read(lambda: self._db.one("vm_one", name=name))
        return None if row is None else vm_of(row)

    async def open_vms(self) -> Sequence[VmRecord]:
        """See the port."""
        return [vm_of(row) for row in await self._db.read(lambda: self._db.all("vms_open"))]

    # Hosts

    async def drain_host(self, name: HostName, *, at: datetime) -> None:
        """See the port."""
        await self._db.do(lambda: self._db.run("host_drain", host=name, at=stamp(at)))

    async def undrain_host(self, name: HostName) -> None:
        """See the port."""
        await self._db.do(lambda: self._db.run("host_undrain", host=name))

    async def drained_hosts(self) -> Mapping[HostName, datetime]:
        """See the port."""
        rows = await self._db.read(lambda: self._db.all("hosts_drained"))
        return {HostName(row["name"]): moment(row["drained_at"]) for row in rows}

    # Challenges

    async def put_instance(self, record: InstanceRecord) -> None:
        """See the port."""
        await self._db.do(lambda: self._put_instance(record))

    async def switch_instances(self, new: InstanceRecord, old: InstanceRecord | None) -> None:
        """See the port."""

        def work() -> None:
            for record in (new, old):
                if record is not None:
                    self._put_instance(record)

        await self._db.do(work)

    def _put_instance(self, record: InstanceRecord) -> None:
        row, before = instance_row(record), self._db.one("instance_one", key=record.key)
        self._db.run("instance_put", **row)
        if before is None or (before["state"], before["reason"]) != (row["state"], row["reason"]):
            self._db.run("instance_noted", key=record.key, left=None, reason=None, at=row["since"])

    async def instances(self) -> Sequence[InstanceRecord]:
        """See the port."""
        return [instance_of(row) for row in await self._db.read(lambda: self._db.all("instances_all"))]

    async def remove_instance(self, key: str, *, at: datetime, reason: str | None = None) -> None:
        """See the port."""

        def work() -> None:
            self._db.run("instance_noted", key=key, left=GONE, reason=reason, at=stamp(at))
            self._db.run("instance_delete", key=key)

        await self._db.do(work)

    async def challenge_history(self, challenge_id: ChallengeId, limit: int) -> Sequence[InstanceEvent]:
        """See the port."""
        rows = await self._db.read(
            lambda: self._db.all("history_newest", challenge_id=challenge_id, limit=limit)
        )
        return [event_of(row) for row in rows]

    async def put_env(self, record: EnvRecord) -> None:
        """See the port."""
        row = {name: getattr(record, name) for name in ("challenge_id", "name", "repository", "sealed")}
        await self._db.do(lambda: self._db.run("env_put", **row, at=stamp(record.given_at)))

    async def remove_env(self, challenge_id: ChallengeId, name: str) -> bool:
        """See the port."""
        return bool(
            await self._db.do(lambda: self._db.run("env_delete", challenge_id=challenge_id, name=name))
        )

    async def env(self, challenge_id: ChallengeId | None = None) -> Sequence[EnvRecord]:
        """See the port."""
        rows = await self._db.read(lambda: self._db.all("env_all", challenge_id=challenge_id))
        return [env_of(row) for row in rows]

    # Values

    async def values(
        self, challenge_id: ChallengeId, prefix: str = "", limit: int = 1000
    ) -> Sequence[ValueRecord]:
        """See the port."""
        return await self._db.read(lambda: self._values.prefixed(challenge_id, prefix, limit))

    async def value(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """See the port."""
        return await self._db.read(lambda: self._values.one(challenge_id, key))

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
        return await self._db.do(lambda: self._values.change(challenge_id, key, change, request, at))

    async def reseal_values(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueRecord], SealedText | None]
    ) -> Resealed:
        """See the port."""
        return await self._db.do(lambda: self._values.reseal_values(key_id, limit, skip, reseal))

    async def reseal_replies(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueReply], SealedText | None]
    ) -> Resealed:
        """See the port."""
        return await self._db.do(lambda: self._values.reseal_replies(key_id, limit, skip, reseal))

    async def values_used(self) -> Sequence[ValueUsage]:
        """See the port."""
        return await self._db.read(self._values.used)
