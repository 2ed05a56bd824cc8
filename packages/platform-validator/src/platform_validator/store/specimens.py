"""Records as the conformance checks use them: a claim, a CVM, an instance; and their two assertions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from platform_protocol.ids import ChallengeId, ClaimId, JobId, VmName
from platform_protocol.resources import Resources
from platform_validator.store.port import StoreError
from platform_validator.store.records import (
    InstanceRecord,
    InstanceState,
    JobRecord,
    Purpose,
    SealedText,
    Stage,
    ValueChange,
    ValueSlot,
    VmPhase,
    VmRecord,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SIZE = Resources(cpu_cores=1, memory_mb=512, disk_mb=1024)
CHALLENGE = ChallengeId("challenge")


def job(number: int = 1) -> JobRecord:
    """A claim about to be sent."""
    return JobRecord(
        ClaimId(f"claim-{number}"), JobId(f"job-{number}"), CHALLENGE, "key", SIZE, Stage.PENDING, NOW
    )


def cvm(number: int = 1) -> VmRecord:
    """A CVM about to be made."""
    return VmRecord(
        name=VmName(f"pv-{number}"),
        purpose=Purpose.READY,
        challenge_id=CHALLENGE,
        instance_key="key",
        resources=SIZE,
        phase=VmPhase.INTENDED,
        sealed_secret=b"\x00sealed",
        compose=b"{}",
        host_port=10_000 + number,
        session_id=f"session-{number}",
        intended_at=NOW,
        hard_deadline=NOW + timedelta(days=7),
    )


def instance(number: int = 1) -> InstanceRecord:
    """An instance that was just seen."""
    state = InstanceState.CREATED
    return InstanceRecord(f"key-{number}", CHALLENGE, "name", "repo", "a" * 40, "digest", state, NOW)


def require(holds: bool, what: str) -> None:
    """Fail with `what` unless it holds."""
    if not holds:
        raise AssertionError(what)


async def refuses(error: type[StoreError], act: Awaitable[object]) -> None:
    """Fail unless the call raises that error."""
    try:
        await act
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


def writes(text: str, reply: str = "ok", *, key_id: str | None = None) -> Callable[[ValueSlot], ValueChange]:
    """A change that puts a value, whatever was there."""

    def change(_: ValueSlot) -> ValueChange:
        return ValueChange(SealedText(reply, key_id), put=SealedText(text, key_id), size=len(text))

    return change
