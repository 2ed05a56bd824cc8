"""The receipt of a result: what this validator saw and what the CVM proved, signed before it is stored."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

import structlog

from platform_protocol.canonical import NotCanonical
from platform_protocol.evidence import payload_sha256, result_record, result_report_data
from platform_protocol.receipts import ReceiptFacts, logs_digest, result_text, rfc3339, seal_receipt
from platform_protocol.signing import Keypair
from platform_validator.attestation.quote import QuoteInvalid, parse_quote
from platform_validator.clock import Clock
from platform_validator.cvm.jobs import GuestResult
from platform_validator.jobs.work import ClaimedJob

_MAX_LOG = 4 * 1024 * 1024

_log = structlog.get_logger(__name__)


class ReceiptMaker:
    """Seals receipts with the hotkey. Blocking, a few milliseconds.

    Args:
        keypair: The hotkey.
        clock: For when it was sealed.
    """

    def __init__(self, keypair: Keypair, clock: Clock) -> None:
        self._keypair = keypair
        self._clock = clock

    def seal(
        self,
        job: ClaimedJob,
        body: dict[str, Any],
        result: GuestResult | None,
        *,
        os_image: str | None = None,
    ) -> dict[str, Any]:
        """The receipt of a result body (which has no receipt yet). `os_image`: its CVM's, as journaled."""
        session = None if result is None else result.session
        record, absent = self._record(job, result, session)
        evidence = (result.evidence if result is not None else None) or {}
        quote, event_log = evidence.get("quote"), evidence.get("event_log")
        if record is not None and not isinstance(quote, str):
            absent = "no_quote"
        if record is not None and isinstance(quote, str) and not _binds(quote, record):
            _log.error("evidence_does_not_match", job_id=job.job_id, remedy="validator verify shows it")
        submission = job.claim.submission
        facts = ReceiptFacts(
            result=result_text(body),
            logs_sha256=logs_digest(body["logs"]),
            record=None if record is None else record.decode(),
            quote=quote if isinstance(quote, str) else None,
            event_log=event_log if isinstance(event_log, str) and len(event_log) <= _MAX_LOG else "",
            absent=absent,
            app_compose=job.plan.compose.decode(errors="replace"),
            github_commit=job.plan.commit,
            submission_sha256=submission.sha256 if submission is not None else None,
            isolation_level=str(body["isolation_level"]),
            attestation=str(body["attestation"]),
            session=session,
            os_image=None if os_image is None else json.loads(os_image),
            claimed_at=rfc3339(job.claimed_at),
            sealed_at=rfc3339(self._clock.now()),
        )
        return seal_receipt(self._keypair, facts)

    def _record(
        self, job: ClaimedJob, result: GuestResult | None, session: int | None
    ) -> tuple[bytes | None, str | None]:
        """R, from what this validator sent and received; or why there is none."""
        # 1. Nothing came: the submission took too long.
        if result is None:
            return None, "no_result"
        # 2. Version 1 knows no evidence.
        if session == 1:
            return None, "session_version_1"
        # 3. Of a very large result only what is used was kept.
        if result.result_bytes is not None:
            return None, "large_result"
        try:
            record = result_record(
                job_id=job.job_id,
                attempt=job.claim.attempt,
                validator=self._keypair.address,
                challenge_id=job.claim.challenge_id,
                submission_sha256=job.claim.submission.sha256 if job.claim.submission else None,
                payload_sha256=payload_sha256(job.claim.payload),
                result=result.result if result.error is None else None,
                error=None if result.error is None else result.error.model_dump(),
            )
        except (NotCanonical, ValueError):
            # 4. What came is no I-JSON: there is no R to prove.
            return None, "not_canonical"
        return record, None


def _binds(quote: str, record: bytes) -> bool:
    try:
        body = parse_quote(base64.b64decode(quote, validate=True))
    except (binascii.Error, ValueError, QuoteInvalid):
        return False
    return body.report_data == result_report_data(record)
