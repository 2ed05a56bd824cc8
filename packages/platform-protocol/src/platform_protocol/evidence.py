"""What the SDK proves of a result inside the CVM, before it sends it (protocol "platform-result-v1")."""

from __future__ import annotations

import hashlib
from typing import Any

from platform_protocol.canonical import canonical_json, sha256_hex
from platform_protocol.ids import ChallengeId, Hotkey, JobId

_LABEL = b"platform-result-v1"


def payload_sha256(payload: Any) -> str:
    """SHA-256 (hex) of the RFC 8785 form of a job's payload.

    Raises:
        NotCanonical: The payload is not I-JSON.
    """
    return sha256_hex(canonical_json(payload))


def result_record(
    *,
    job_id: JobId,
    attempt: int,
    validator: Hotkey,
    challenge_id: ChallengeId,
    submission_sha256: str | None,
    payload_sha256: str,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bytes:
    """R: the RFC 8785 form of what was run and what came out. Exactly one of result and error is given.

    Raises:
        NotCanonical: The result is not I-JSON.
        ValueError: Both or neither of result and error.
    """
    if (result is None) == (error is None):
        raise ValueError("expected exactly one of result and error")
    record: dict[str, Any] = {
        "job_id": job_id,
        "attempt": attempt,
        "validator": validator,
        "challenge_id": challenge_id,
        "submission_sha256": submission_sha256,
        "payload_sha256": payload_sha256,
    }
    record |= {"result": result} if error is None else {"error": error}
    return canonical_json(record)


def result_report_data(record: bytes) -> bytes:
    """64 bytes: `SHA-512("platform-result-v1" ‖ 0x00 ‖ SHA-256(R))`."""
    return hashlib.sha512(_LABEL + b"\x00" + hashlib.sha256(record).digest()).digest()
