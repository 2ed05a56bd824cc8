"""Records to rows and back."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import Any

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken, VmId, VmName
from platform_protocol.resources import Resources
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.records import (
    EnvRecord,
    InstanceEvent,
    InstanceRecord,
    InstanceState,
    JobOutcome,
    JobRecord,
    OutboxRecord,
    Purpose,
    Stage,
    ValueRecord,
    ValueReply,
    VmPhase,
    VmRecord,
)

GONE = "Gone"
"""In the history: an instance was forgotten."""


def stamp(moment: datetime) -> str:
    """A time as it is stored: UTC, microseconds, sortable as text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def moment(text: str) -> datetime:
    """The time back, aware."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def _optional(text: str | None) -> datetime | None:
    return None if text is None else moment(text)


def job_of(row: sqlite3.Row) -> JobRecord:
    """A row of jobs_journal."""
    return JobRecord(
        claim_id=ClaimId(row["claim_id"]),
        job_id=JobId(row["job_id"]),
        challenge_id=ChallengeId(row["challenge_id"]),
        instance_key=row["instance_key"],
        resources=Resources.model_validate_json(row["resources"]),
        stage=Stage(row["stage"]),
        claimed_at=moment(row["claimed_at"]),
        granted=row["granted"],
        attempt=row["attempt"],
        token=None if row["token"] is None else LeaseToken(row["token"]),
        vm=None if row["vm"] is None else VmName(row["vm"]),
        outcome=None if row["outcome"] is None else JobOutcome(row["outcome"]),
        reason=row["reason"],
        started_at=_optional(row["started_at"]),
        ended_at=_optional(row["ended_at"]),
        kit=row["kit"],
    )


def outbox_of(row: sqlite3.Row) -> OutboxRecord:
    """A row of jobs_outbox."""
    return OutboxRecord(
        claim_id=ClaimId(row["claim_id"]),
        job_id=JobId(row["job_id"]),
        body=row["body"],
        stored_at=moment(row["stored_at"]),
        tries=row["tries"],
        last_error=row["last_error"],
    )


def vm_of(row: sqlite3.Row) -> VmRecord:
    """A row of cvms_journal."""
    return VmRecord(
        name=VmName(row["name"]),
        purpose=Purpose(row["purpose"]),
        challenge_id=ChallengeId(row["challenge_id"]),
        instance_key=row["instance_key"],
        resources=Resources.model_validate_json(row["resources"]),
        phase=VmPhase(row["phase"]),
        sealed_secret=row["sealed_secret"],
        compose=row["compose"],
        host_port=row["host_port"],
        session_id=row["session_id"],
        intended_at=moment(row["intended_at"]),
        hard_deadline=moment(row["hard_deadline"]),
        vm_id=None if row["vm_id"] is None else VmId(row["vm_id"]),
        claim_id=None if row["claim_id"] is None else ClaimId(row["claim_id"]),
        vm_instance=row["vm_instance"],
        attestation=row["attestation"],
        reason=row["reason"],
        gone_at=_optional(row["gone_at"]),
        host=DEFAULT_HOST if row["host"] is None else HostName(row["host"]),
        os_image=row["os_image"],
    )


def vm_row(record: VmRecord) -> dict[str, Any]:
    """A CVM that is about to be made."""
    return {
        "name": record.name,
        "purpose": record.purpose.value,
        "challenge_id": record.challenge_id,
        "instance_key": record.instance_key,
        "resources": record.resources.model_dump_json(),
        "phase": record.phase.value,
        "sealed_secret": record.sealed_secret,
        "compose": record.compose,
        "host_port": record.host_port,
        "session_id": record.session_id,
        "intended_at": stamp(record.intended_at),
        "hard_deadline": stamp(record.hard_deadline),
        "claim_id": record.claim_id,
        "host": record.host,
    }


def instance_of(row: sqlite3.Row) -> InstanceRecord:
    """A row of challenges_instances."""
    return InstanceRecord(
        key=row["key"],
        challenge_id=ChallengeId(row["challenge_id"]),
        name=row["name"],
        repository=row["repository"],
        commit=row["commit_id"],
        spec_digest=row["spec_digest"],
        state=InstanceState(row["state"]),
        since=moment(row["since"]),
        reason=row["reason"],
        bundle_sha256=row["bundle_sha256"],
        compose_hash=row["compose_hash"],
        superseded_by=row["superseded_by"],
        failures=row["failures"],
    )


def instance_row(record: InstanceRecord) -> dict[str, Any]:
    """An instance as a row."""
    return {
        "key": record.key,
        "challenge_id": record.challenge_id,
        "name": record.name,
        "repository": record.repository,
        "commit_id": record.commit,
        "spec_digest": record.spec_digest,
        "state": record.state.value,
        "since": stamp(record.since),
        "reason": record.reason,
        "bundle_sha256": record.bundle_sha256,
        "compose_hash": record.compose_hash,
        "superseded_by": record.superseded_by,
        "failures": record.failures,
    }


def event_of(row: sqlite3.Row) -> InstanceEvent:
    """A row of challenges_history."""
    return InstanceEvent(
        challenge_id=ChallengeId(row["challenge_id"]),
        key=row["key"],
        commit=row["commit_id"],
        state=None if row["state"] == GONE else InstanceState(row["state"]),
        reason=row["reason"],
        at=moment(row["at"]),
    )


def env_of(row: sqlite3.Row) -> EnvRecord:
    """A row of challenges_env."""
    return EnvRecord(
        challenge_id=ChallengeId(row["challenge_id"]),
        name=row["name"],
        repository=row["repository"],
        sealed=row["sealed"],
        given_at=moment(row["given_at"]),
    )


def value_of(row: sqlite3.Row) -> ValueRecord:
    """A row of values_current."""
    return ValueRecord(
        challenge_id=ChallengeId(row["challenge_id"]),
        key=row["key"],
        value=row["value"],
        version=row["version"],
        updated_at=moment(row["updated_at"]),
        key_id=row["key_id"],
        size=row["size"],
    )


def reply_of(row: sqlite3.Row) -> ValueReply:
    """A row of values_replies."""
    return ValueReply(row["session_id"], row["request_id"], row["reply"], row["key_id"])
