"""The job queue: claims, leases, releases and results, each one conditional statement.

The token fences, the clock only reclaims: a lapsed lease makes a job claimable by others, and until
somebody claims it the old token is still accepted. A new token comes only from a claim.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.database import now_ms
from platform_api.errors import ApiError
from platform_api.tables import challenges, job_logs, jobs, submissions
from platform_protocol.canonical import NotCanonical, canonical_json, sha256_hex
from platform_protocol.platform_messages import ReleaseReason, ResultBody, ResultOutcome

MAX_ATTEMPTS = 10
MAX_DIED = 5
OVERTIME_MS = 15 * 60 * 1000
MAX_LINE = 8 * 1024
MAX_LOGS = 64 * 1024 * 1024
_COUNTED = frozenset({ReleaseReason.INFRA, ReleaseReason.ATTESTATION_UNAVAILABLE})
_OPEN = ("pending", "claimed")


@dataclass(frozen=True, slots=True)
class Queue:
    """The rules' numbers. `term_ms` is the length of a lease."""

    term_ms: int

    async def pending(
        self, connection: AsyncConnection, challenge_ids: list[str] | None, limit: int
    ) -> list[dict[str, Any]]:
        """Claimable jobs: by priority, then round robin over challenges, then oldest."""
        await self.lapse(connection)
        turn = sa.func.row_number().over(
            partition_by=(jobs.c.challenge_id, jobs.c.priority), order_by=(jobs.c.created_at, jobs.c.id)
        )
        query = (
            sa.select(jobs, turn.label("turn"))
            .join(challenges, challenges.c.id == jobs.c.challenge_id)
            .where(jobs.c.status == "pending", challenges.c.status == "active")
        )
        if challenge_ids is not None:
            query = query.where(jobs.c.challenge_id.in_(challenge_ids))
        query = query.order_by(jobs.c.priority.desc(), sa.text("turn"), jobs.c.created_at, jobs.c.id).limit(
            limit
        )
        return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def lapse(self, connection: AsyncConnection) -> None:
        """Make jobs whose lease has run out claimable again; the old token goes on being accepted."""
        now = now_ms()
        lapsed = sa.and_(jobs.c.status == "claimed", jobs.c.expires_at <= now)
        tired = jobs.c.failed_attempts + 1 >= MAX_ATTEMPTS
        await connection.execute(
            sa.update(jobs)
            .where(lapsed, tired)
            .values(
                status="failed",
                outcome="infra_error",
                finished_at=now,
                token=None,
                failed_attempts=jobs.c.failed_attempts + 1,
            )
        )
        await connection.execute(
            sa.update(jobs).where(lapsed).values(status="pending", failed_attempts=jobs.c.failed_attempts + 1)
        )

    async def claim(
        self, connection: AsyncConnection, job_id: str, hotkey: str, claim_id: str | None
    ) -> dict[str, Any]:
        """Claim, or give the same lease again to the same hotkey and claim id.

        Raises:
            ApiError: 404 `unknown_job`; 409 `already_claimed` or `job_cancelled`.
        """
        await self.lapse(connection)
        now = now_ms()
        if claim_id is not None:
            again = (
                sa.update(jobs)
                .where(
                    jobs.c.id == job_id,
                    jobs.c.holder == hotkey,
                    jobs.c.claim_id == claim_id,
                    jobs.c.token.is_not(None),
                    jobs.c.status.in_(_OPEN),
                )
                .values(status="claimed", expires_at=now + self.term_ms)
            )
            if (await connection.execute(again)).rowcount:
                return await self._claimed(connection, job_id)
        fresh = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status == "pending")
            .values(
                status="claimed",
                holder=hotkey,
                claim_id=claim_id,
                token=secrets.token_urlsafe(24),
                attempt=jobs.c.attempt + 1,
                claimed_at=now,
                expires_at=now + self.term_ms,
            )
        )
        if not (await connection.execute(fresh)).rowcount:
            job = await self.job(connection, job_id)
            if job["status"] == "cancelled":
                raise ApiError(409, "job_cancelled", f"job {job_id} was cancelled")
            raise ApiError(
                409, "already_claimed", f"job {job_id} is claimed by another validator, or finished"
            )
        return await self._claimed(connection, job_id)

    async def renew(self, connection: AsyncConnection, job_id: str, token: str) -> float:
        """Start the term anew; returns it in seconds.

        Raises:
            ApiError: 404; 409 `lease_lost`, `job_cancelled` or `attempt_expired`.
        """
        now = now_ms()
        limit = jobs.c.claimed_at + jobs.c.timeout_s * 1000 + OVERTIME_MS
        alive = self._alive(job_id, token)
        renewed = (
            sa.update(jobs).where(alive, limit > now).values(status="claimed", expires_at=now + self.term_ms)
        )
        if not (await connection.execute(renewed)).rowcount:
            job = await self.job(connection, job_id)
            if job["token"] == token and job["status"] in _OPEN:
                raise ApiError(409, "attempt_expired", "the attempt is past its timeout and 15 minutes more")
            raise self._dead(job)
        return self.term_ms / 1000

    async def release(
        self, connection: AsyncConnection, job_id: str, token: str, reason: ReleaseReason
    ) -> bool:
        """Give a job back; True when it is claimable again. The same token twice is no error.

        Raises:
            ApiError: 404; 409 `lease_lost`.
        """
        job = await self.job(connection, job_id)
        if job["released_token"] == token:
            return False
        counted, died = int(reason in _COUNTED), int(reason is ReleaseReason.SANDBOX_DIED)
        over = (
            job["failed_attempts"] + counted >= MAX_ATTEMPTS
            if counted
            else bool(died) and job["died_attempts"] + died >= MAX_DIED
        )
        ended = {
            "status": "failed",
            "outcome": "sandbox_died" if died else "infra_error",
            "finished_at": now_ms(),
        }
        changed = await connection.execute(
            sa.update(jobs)
            .where(self._alive(job_id, token))
            .values(
                token=None,
                released_token=token,
                failed_attempts=jobs.c.failed_attempts + counted,
                died_attempts=jobs.c.died_attempts + died,
                **(ended if over else {"status": "pending"}),
            )
        )
        if not changed.rowcount:
            raise self._dead(job)
        return not over

    async def result(self, connection: AsyncConnection, job_id: str, value: Any) -> None:
        """Accept a result once; the same body again is accepted again.

        Raises:
            ApiError: 404; 409 `lease_lost` or `job_cancelled`; 422 `invalid_result`.
        """
        body, digest = _read_result(value)
        done = ResultOutcome(body.outcome) is ResultOutcome.SUCCEEDED
        if not done and body.score != 0.0:
            raise ApiError(422, "invalid_result", f"outcome {body.outcome} has a score of exactly 0.0")
        job = await self.job(connection, job_id)
        if job["result_sha256"] == digest:
            return
        if job["token"] == body.lease_token and job["attempt"] != body.attempt:
            raise ApiError(422, "invalid_result", f"attempt: expected {job['attempt']}, got {body.attempt}")
        accepted = await connection.execute(
            sa.update(jobs)
            .where(self._alive(job_id, body.lease_token))
            .values(
                status="completed" if done else "failed",
                outcome=body.outcome.value,
                result=canonical_json({k: v for k, v in value.items() if k != "lease_token"}).decode(),
                result_sha256=digest,
                score=body.score,
                finished_at=now_ms(),
                token=None,
            )
        )
        if not accepted.rowcount:
            raise self._dead(job)

    async def logs(
        self, connection: AsyncConnection, job_id: str, token: str, seq: int, lines: list[str]
    ) -> None:
        """Keep log lines, 8 KiB each, 64 MiB a job; a repeated seq changes nothing.

        Raises:
            ApiError: 404; 409 `lease_lost`.
        """
        job = await self.job(connection, job_id)
        if job["token"] != token or job["status"] not in _OPEN:
            raise self._dead(job)
        kept = [line[:MAX_LINE] for line in lines]
        total = await connection.scalar(
            sa.select(sa.func.coalesce(sa.func.sum(job_logs.c.bytes), 0)).where(job_logs.c.job_id == job_id)
        )
        size = sum(len(line.encode("utf-8", "replace")) for line in kept)
        there = await connection.scalar(
            sa.select(sa.func.count())
            .select_from(job_logs)
            .where(job_logs.c.job_id == job_id, job_logs.c.attempt == job["attempt"], job_logs.c.seq == seq)
        )
        if there or int(total or 0) + size > MAX_LOGS:
            return
        await connection.execute(
            sa.insert(job_logs).values(job_id=job_id, attempt=job["attempt"], seq=seq, lines=kept, bytes=size)
        )

    async def cancel(self, connection: AsyncConnection, job_id: str) -> None:
        """Cancel at once; the token is dead.

        Raises:
            ApiError: 404; 409 `already_finished`.
        """
        changed = await connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status.in_(_OPEN))
            .values(status="cancelled", outcome="cancelled", finished_at=now_ms(), token=None)
        )
        if not changed.rowcount:
            job = await self.job(connection, job_id)
            raise ApiError(409, "already_finished", f"job {job_id} is {job['status']}")

    async def extend_all(self, connection: AsyncConnection) -> int:
        """At the API's start: its own absence costs nobody a lease."""
        changed = await connection.execute(
            sa.update(jobs)
            .where(jobs.c.status == "claimed")
            .values(
                expires_at=sa.case((jobs.c.expires_at > now_ms(), jobs.c.expires_at), else_=now_ms())
                + self.term_ms
            )
        )
        return changed.rowcount

    async def job(self, connection: AsyncConnection, job_id: str) -> dict[str, Any]:
        """One job's row.

        Raises:
            ApiError: 404 `unknown_job`.
        """
        row = (await connection.execute(sa.select(jobs).where(jobs.c.id == job_id))).mappings().one_or_none()
        if row is None:
            raise ApiError(404, "unknown_job", f"no job {job_id[:64]}")
        return dict(row)

    async def _claimed(self, connection: AsyncConnection, job_id: str) -> dict[str, Any]:
        job = await self.job(connection, job_id)
        submission = None
        if job["submission_id"] is not None:
            columns = (submissions.c.id, submissions.c.sha256, submissions.c.size, submissions.c.filename)
            row = (
                await connection.execute(sa.select(*columns).where(submissions.c.id == job["submission_id"]))
            ).one()
            submission = {
                "url": f"/submissions/{row.id}/bundle",
                "sha256": row.sha256,
                "size": row.size,
                "filename": row.filename,
            }
        return {
            "id": job_id,
            "challenge_id": job["challenge_id"],
            "submission_id": job["submission_id"],
            "miner_hotkey": job["miner_hotkey"],
            "status": "claimed",
            "attempt": job["attempt"],
            "lease": {"token": job["token"], "term_s": self.term_ms / 1000},
            "job_name": job["job_name"],
            "payload": job["payload"],
            "submission": submission,
            "timeout_s": job["timeout_s"],
            "resources": job["resources"],
        }

    @staticmethod
    def _alive(job_id: str, token: str) -> sa.ColumnElement[bool]:
        return sa.and_(jobs.c.id == job_id, jobs.c.token == token, jobs.c.status.in_(_OPEN))

    @staticmethod
    def _dead(job: dict[str, Any]) -> ApiError:
        if job["status"] == "cancelled":
            return ApiError(409, "job_cancelled", f"job {job['id']} was cancelled")
        return ApiError(409, "lease_lost", f"this is not the newest token of an unfinished job: {job['id']}")


def _read_result(value: Any) -> tuple[ResultBody, str]:
    try:
        body = ResultBody.model_validate(value)
        return body, sha256_hex(canonical_json(value))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:10])
        raise ApiError(422, "invalid_result", faults) from error
    except NotCanonical as error:
        raise ApiError(422, "invalid_result", str(error)) from error


def job_view(row: dict[str, Any]) -> dict[str, Any]:
    """A job as owners and administrators see it; never its token."""
    hidden = {"token", "released_token", "claim_id", "result", "result_sha256", "turn"}
    shown = {key: value for key, value in row.items() if key not in hidden}
    return shown | {"result": json.loads(row["result"]) if row["result"] else None}
