"""The Store port: what the validator writes before it acts, and reads after a crash.

Every method is one transaction and durable when it returns. Two implementations pass one conformance
suite: `sqlite.SqliteStore` in production, `memory.MemoryStore` in tests and simulations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from platform_protocol.ids import ChallengeId, ClaimId, LeaseToken, VmId, VmName
from platform_validator.errors import ValidatorError
from platform_validator.host_name import HostName
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


class StoreError(ValidatorError):
    """The store cannot be used."""


class StoreUnavailable(StoreError):
    """A write did not happen (disk full, read-only, I/O error): nothing changed; try again later."""


class StoreCorrupt(StoreError):
    """The database is damaged, or from a newer version: the daemon must not start on it."""


class UnknownRecord(StoreError):
    """A method named a record that is not there: a fault of the caller."""


class DuplicateRecord(StoreError):
    """A record of that key exists already: a fault of the caller."""


class Store(Protocol):
    """The journal of jobs, the outbox, the CVMs, the challenges' instances and their values.

    Raises:
        StoreUnavailable: From every method, when the write or read could not be done.
    """

    async def identity(self) -> StateIdentity:
        """The identity of this state directory, made at its first opening and never changed."""

    async def close(self) -> None:
        """Finish what was begun and close. Safe to call twice."""

    # Jobs

    async def open_claim(self, record: JobRecord) -> None:
        """Write a claim down before it is sent (stage pending, nothing granted).

        Raises:
            DuplicateRecord: The claim id is known.
        """

    async def claim_granted(
        self, claim_id: ClaimId, *, granted: bytes, attempt: int, token: LeaseToken, at: datetime
    ) -> None:
        """The API granted it: stage claimed.

        Raises:
            UnknownRecord: No such claim.
        """

    async def advance(
        self,
        claim_id: ClaimId,
        stage: Stage,
        *,
        at: datetime,
        vm: VmName | None = None,
        kit: bytes | None = None,
    ) -> None:
        """The job reached a stage; `vm` and `kit` are kept from then on when given.

        Raises:
            UnknownRecord: No such claim.
        """

    async def store_result(
        self, claim_id: ClaimId, outcome: JobOutcome, body: bytes, *, at: datetime
    ) -> None:
        """In one transaction: the outcome, stage submitting, and the body in the outbox.

        The first result stored for a claim stands: a second call changes nothing.

        Raises:
            UnknownRecord: No such claim.
        """

    async def end_job(
        self, claim_id: ClaimId, *, outcome: JobOutcome, reason: str | None, at: datetime
    ) -> None:
        """The job has ended (stage done). An outcome that was stored with a result is kept.

        Raises:
            UnknownRecord: No such claim.
        """

    async def job(self, claim_id: ClaimId) -> JobRecord | None:
        """One claim."""

    async def open_jobs(self) -> Sequence[JobRecord]:
        """Every claim whose stage is not done, oldest first."""

    async def recent_jobs(self, limit: int) -> Sequence[JobRecord]:
        """The newest claims, open or ended, newest first."""

    async def compact(self, *, ended_before: datetime, keep: int) -> int:
        """Forget what has ended, in batches; returns how many rows of jobs and CVMs went.

        Jobs that ended before that moment, but for the newest `keep` claims and those whose result is still
        to be delivered; CVMs gone before it, with the replies kept for their sessions; challenges' history
        from before it (not counted). Never anything open, and never a value.
        """

    # Outbox

    async def outbox(self) -> Sequence[OutboxRecord]:
        """Undelivered results, oldest first."""

    async def outbox_tried(self, claim_id: ClaimId, error: str) -> None:
        """Count a try that brought no answer."""

    async def outbox_delivered(self, claim_id: ClaimId, *, at: datetime) -> None:
        """The API acknowledged it: in one transaction the entry goes and the job is done."""

    async def outbox_refused(self, claim_id: ClaimId, code: str, *, at: datetime) -> None:
        """Refused for good: the entry goes, the job ends lease_lost (or cancelled) with the code."""

    # CVMs

    async def intend_vm(self, record: VmRecord) -> None:
        """Write a CVM down before CreateVm is sent.

        Raises:
            DuplicateRecord: The name is known.
        """

    async def vm_created(self, name: VmName, vm_id: VmId) -> None:
        """The VMM gave it an id."""

    async def vm_phase(
        self, name: VmName, phase: VmPhase, *, at: datetime, reason: str | None = None
    ) -> None:
        """It reached a phase; GONE stamps gone_at. A phase never goes back (a lower one changes nothing)."""

    async def vm_attested(
        self, name: VmName, *, attestation: str, vm_instance: str | None, os_image: str | None = None
    ) -> None:
        """The first handshake's finding. `vm_instance` is the event log's instance id, hex.

        `os_image` says how its OS image came to be trusted, as its receipts will.

        Raises:
            DuplicateRecord: Another CVM of our journal has that instance id.
        """

    async def vm_assigned(self, name: VmName, claim_id: ClaimId) -> None:
        """A ready CVM was taken by a job: its one claim. In the same transaction the job's `vm` is set.

        Raises:
            DuplicateRecord: It was taken before.
        """

    async def vm(self, name: VmName) -> VmRecord | None:
        """One CVM."""

    async def open_vms(self) -> Sequence[VmRecord]:
        """Every CVM that is not gone, oldest first."""

    # Hosts

    async def drain_host(self, name: HostName, *, at: datetime) -> None:
        """The operator wants no more CVMs there; the first time stands."""

    async def undrain_host(self, name: HostName) -> None:
        """It may have CVMs again. Unknown names are no error."""

    async def drained_hosts(self) -> Mapping[HostName, datetime]:
        """Hosts that are drained, and since when."""

    # Challenges

    async def put_instance(self, record: InstanceRecord) -> None:
        """Insert or replace an instance; another state or reason goes into the history, as of its `since`."""

    async def switch_instances(self, new: InstanceRecord, old: InstanceRecord | None) -> None:
        """Both in one transaction: the candidate becomes Active and the old one Recycling."""

    async def instances(self) -> Sequence[InstanceRecord]:
        """All instances, oldest first."""

    async def remove_instance(self, key: str, *, at: datetime, reason: str | None = None) -> None:
        """Forget an instance; the history keeps when and why. Unknown keys are no error."""

    async def challenge_history(self, challenge_id: ChallengeId, limit: int) -> Sequence[InstanceEvent]:
        """What became of a challenge's instances, newest first."""

    async def put_env(self, record: EnvRecord) -> None:
        """Keep a variable of a challenge; the one of that name before it is gone."""

    async def remove_env(self, challenge_id: ChallengeId, name: str) -> bool:
        """Forget a variable; False when there was none."""

    async def env(self, challenge_id: ChallengeId | None = None) -> Sequence[EnvRecord]:
        """The variables of a challenge, or of all, by challenge and name."""

    # Values

    async def values(
        self, challenge_id: ChallengeId, prefix: str = "", limit: int = 1000
    ) -> Sequence[ValueRecord]:
        """Values of a challenge by key order."""

    async def value(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """One value."""

    async def change_value(
        self,
        challenge_id: ChallengeId,
        key: str,
        *,
        change: Callable[[ValueSlot], ValueChange],
        request: tuple[str, str] | None,
        at: datetime,
    ) -> SealedText:
        """Apply a pure change atomically, once for a `request` (session id, request id; None: nobody's).

        Returns:
            Its reply. A request that was applied before returns its first reply and changes nothing.
        """

    async def reseal_values(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueRecord], SealedText | None]
    ) -> Resealed:
        """Seal anew up to `limit` values that are not under `key_id`, in one order; None leaves one as it is.

        `skip`: how many were left so far: those come first in that order, and are passed over.
        """

    async def reseal_replies(
        self, key_id: str, *, limit: int, skip: int, reseal: Callable[[ValueReply], SealedText | None]
    ) -> Resealed:
        """The same for replies."""

    async def values_used(self) -> Sequence[ValueUsage]:
        """What each challenge that keeps values uses, by challenge id."""
