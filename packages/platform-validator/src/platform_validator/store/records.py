"""The rows of the store, as plain values: what the validator remembers of jobs, CVMs and challenges."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken, VmId, VmName
from platform_protocol.resources import Resources
from platform_validator.host_name import DEFAULT_HOST, HostName


class Stage(StrEnum):
    """Where a job is in its life, in the order in which a good one passes through."""

    PENDING = "pending"
    CLAIMED = "claimed"
    FETCHING = "fetching"
    CREATING = "creating"
    BOOTING = "booting"
    ATTESTING = "attesting"
    RUNNING = "running"
    COLLECTING = "collecting"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    DESTROYING = "destroying"
    DONE = "done"


class JobOutcome(StrEnum):
    """How a job ended. The first three are about the submission and are submitted; the rest are not."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    INFRA_ERROR = "infra_error"
    LEASE_LOST = "lease_lost"
    SANDBOX_DIED = "sandbox_died"


class Purpose(StrEnum):
    """What a CVM was made for."""

    JOB = "job"
    READY = "ready"
    SHARED = "shared"


class VmPhase(StrEnum):
    """What we have done to a CVM, written before it is done."""

    INTENDED = "intended"
    CREATED = "created"
    READY = "ready"
    DESTROYING = "destroying"
    GONE = "gone"


class InstanceState(StrEnum):
    """The usage guide's states of a challenge; each belongs to one instance."""

    CREATED = "Created"
    PROVISIONING = "Provisioning"
    PROBING = "Probing"
    ACTIVE = "Active"
    FAILED = "Failed"
    RECYCLING = "Recycling"


@dataclass(frozen=True, slots=True)
class StateIdentity:
    """A state directory: `state_id` (10 hex digits) names our CVMs, `instance` (uuid) signs requests."""

    state_id: str
    instance: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One claim and what became of it.

    `granted` is the API's claim answer as received (UTF-8 JSON), None until it came. `kit` is what a later
    process needs to finish it, None until it runs.
    """

    claim_id: ClaimId
    job_id: JobId
    challenge_id: ChallengeId
    instance_key: str
    resources: Resources
    stage: Stage
    claimed_at: datetime
    granted: bytes | None = None
    attempt: int | None = None
    token: LeaseToken | None = None
    vm: VmName | None = None
    outcome: JobOutcome | None = None
    reason: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    kit: bytes | None = None


@dataclass(frozen=True, slots=True)
class OutboxRecord:
    """A stored result on its way to the Platform API. `body` is the exact bytes that are sent."""

    claim_id: ClaimId
    job_id: JobId
    body: bytes
    stored_at: datetime
    tries: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class VmRecord:
    """One CVM of ours, from before it is made until the VMM has confirmed that it is gone.

    `sealed_secret` is the launch secret under the keyring; `sealed_with` is the VM's name. `os_image`: how
    its OS image came to be trusted, the JSON that its receipts tell.
    """

    name: VmName
    purpose: Purpose
    challenge_id: ChallengeId
    instance_key: str
    resources: Resources
    phase: VmPhase
    sealed_secret: bytes
    compose: bytes
    host_port: int
    session_id: str
    intended_at: datetime
    hard_deadline: datetime
    vm_id: VmId | None = None
    claim_id: ClaimId | None = None
    vm_instance: str | None = None
    attestation: str | None = None
    reason: str | None = None
    gone_at: datetime | None = None
    host: HostName = DEFAULT_HOST
    os_image: str | None = None


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """An instance = (challenge, commit, digest of its specification)."""

    key: str
    challenge_id: ChallengeId
    name: str
    repository: str
    commit: str
    spec_digest: str
    state: InstanceState
    since: datetime
    reason: str | None = None
    bundle_sha256: str | None = None
    compose_hash: str | None = None
    superseded_by: str | None = None
    failures: int = 0


class SealedText(NamedTuple):
    """Text as it is stored: sealed under the key of that id, or in clear (None: from an older version)."""

    text: str
    key_id: str | None


class Resealed(NamedTuple):
    """What one batch did: how many were sealed anew, and how many were left as they are."""

    done: int
    left: int


@dataclass(frozen=True, slots=True)
class InstanceEvent:
    """An instance entered a state, or left for good (state None)."""

    challenge_id: ChallengeId
    key: str
    commit: str
    state: InstanceState | None
    reason: str | None
    at: datetime


@dataclass(frozen=True, slots=True)
class ValueRecord:
    """A dynamic value of one challenge.

    `value` is JSON text, sealed under the key `key_id` (None: in clear). `version` counts the writes of its
    key from 1, deletions between them left out. `size`: bytes of key and JSON text in clear.
    """

    challenge_id: ChallengeId
    key: str
    value: str
    version: int
    updated_at: datetime
    key_id: str | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class ValueSlot:
    """What a change of a value is decided on.

    `last_version` is that of the key's last write, also where it was deleted since (0: never written).
    `keys` and `bytes` are what the challenge uses now.
    """

    present: ValueRecord | None
    last_version: int
    keys: int
    bytes: int


@dataclass(frozen=True, slots=True)
class EnvRecord:
    """A variable that an operator gave to a challenge, for the repository that it had then; sealed."""

    challenge_id: ChallengeId
    name: str
    repository: str
    sealed: bytes
    given_at: datetime


@dataclass(frozen=True, slots=True)
class ValueChange:
    """What a change does: `put` a new value of `size` bytes in clear, `remove` the key, or neither."""

    reply: SealedText
    put: SealedText | None = None
    size: int = 0
    remove: bool = False


@dataclass(frozen=True, slots=True)
class ValueReply:
    """What a write answered, kept under (session, request) so that a resent one is not applied again."""

    session_id: str
    request_id: str
    reply: str
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class ValueUsage:
    """What one challenge keeps: how many keys, and bytes of keys and JSON texts in clear."""

    challenge_id: ChallengeId
    keys: int
    bytes: int
