"""The job queue: claims, leases, releases and results, each one conditional statement.

The token fences, the clock only reclaims: a lapsed lease makes a job claimable by others, and until
somebody claims it the old token is still accepted. A new token comes only from a claim. Every statement
acts first; why it changed nothing is read afterwards, so that no answer rests on a stale row.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.clock import now_ms, rfc3339, show_times
from platform_api.errors import ApiError
from platform_api.results import AcceptedResult
from platform_api.tables import challenges, jobs, submissions
from platform_protocol.platform_messages import ReleaseReason

MAX_ATTEMPTS = 10
MAX_INFRA_ATTEMPTS = 5
OVERTIME_MS = 15 * 60 * 1000
OPEN = ("pending", "claimed")
_COUNTED = frozenset({ReleaseReason.INFRA, ReleaseReason.ATTESTATION_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue's rules. `term_ms` is the length of a lease, `now` the clock in Unix milliseconds."""

    term_ms: int
    now: Callable[[], int] = now_ms

    async def pending(
        self,
        connection: AsyncConnection,
        challenge_ids: list[str] | None,
        limit: int,
        hotkey: str | None = None,
    ) -> list[dict[str, Any]]:
        """Claimable jobs: by priority, then round robin over challenges, then oldest.

        Within a priority, a job whose sandbox died last with `hotkey` comes after the others: another
        validator is preferred for it.
        """
        died_here = sa.case((jobs.c.died_with == hotkey, 1), else_=0) if hotkey else sa.literal(0)
        turn = sa.func.row_number().over(
            partition_by=(jobs.c.challenge_id, jobs.c.priority, died_here),
            order_by=(jobs.c.created_at, jobs.c.id),
        )
        query = (
            sa.select(
                jobs.c.id,
                jobs.c.challenge_id,
                jobs.c.submission_id,
                jobs.c.miner_hotkey,
                jobs.c.created_at,
                jobs.c.priority,
                jobs.c.resources,
                jobs.c.timeout_s,
            )
            .join(challenges, challenges.c.id == jobs.c.challenge_id)
            .where(self._claimable(self.now()), challenges.c.status == "active")
        )
        if challenge_ids is not None:
            query = query.where(jobs.c.challenge_id.in_(challenge_ids))
        query = query.order_by(jobs.c.priority.desc(), died_here, turn, jobs.c.created_at, jobs.c.id)
        rows = (await connection.execute(query.limit(limit))).mappings()
        return [show_times(dict(row)) | {"status": "pending"} for row in rows]

    async def claim(
        self, connection: AsyncConnection, job_id: str, hotkey: str, claim_id: str | None
    ) -> dict[str, Any]:
        """Claim, or give the same lease again to the same hotkey and claim id.

        Raises:
            ApiError: 404 `unknown_job`; 409 `already_claimed` or `job_cancelled`.
        """
        now = self.now()
        again = (
            sa.update(jobs)
            .where(
                jobs.c.id == job_id,
                jobs.c.holder == hotkey,
                jobs.c.claim_id == claim_id,
                jobs.c.token.is_not(None),
                jobs.c.status.in_(OPEN),
            )
            .values(expires_at=now + self.term_ms)
        )
        if claim_id is not None and (await connection.execute(again)).rowcount:
            return await self._claimed(connection, job_id)
        lapsed = sa.case((jobs.c.status == "claimed", 1), else_=0)
        fresh = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, self._claimable(now))
            .values(
                status="claimed",
                holder=hotkey,
                claim_id=claim_id,
                token=secrets.token_urlsafe(24),
                attempt=jobs.c.attempt + 1,
                failed_attempts=jobs.c.failed_attempts + lapsed,
                claimed_at=now,
                expires_at=now + self.term_ms,
                log_next=0,
            )
        )
        if not (await connection.execute(fresh)).rowcount:
            job = await self.job(connection, job_id)
            if job["status"] == "cancelled":
                raise ApiError(409, "job_cancelled", f"job {job_id} was cancelled")
            raise ApiError(409, "already_claimed", f"job {job_id} is claimed, or finished")
        return await self._claimed(connection, job_id)

    async def renew(self, connection: AsyncConnection, job_id: str, token: str, hotkey: str) -> float:
        """Start the term anew; returns it in seconds.

        Raises:
            ApiError: 404; 409 `lease_lost`, `job_cancelled` or `attempt_expired`.
        """
        now = self.now()
        limit = jobs.c.claimed_at + jobs.c.timeout_s * 1000 + OVERTIME_MS
        renewed = (
            sa.update(jobs)
            .where(alive(job_id, token, hotkey), limit > now)
            .values(expires_at=now + self.term_ms)
        )
        if not (await connection.execute(renewed)).rowcount:
            job = await self.job(connection, job_id)
            if same_token(job["token"], token) and job["holder"] == hotkey:
                raise ApiError(409, "attempt_expired", "the attempt is past its timeout and 15 minutes more")
            raise refusal(job)
        return self.term_ms / 1000

    async def release(
        self, connection: AsyncConnection, job_id: str, token: str, hotkey: str, reason: ReleaseReason
    ) -> str | None:
        """Give a job back. The same token twice is no error.

        Returns:
            The challenge's id when the job is claimable again; None when it has failed at a limit, or was
            released with this token before.

        Raises:
            ApiError: 404; 409 `lease_lost` or `job_cancelled`.
        """
        values: dict[str, Any] = {"status": "pending"}
        if reason in _COUNTED:
            values = self._ending(jobs.c.failed_attempts, MAX_ATTEMPTS, "infra_error")
        elif reason is ReleaseReason.SANDBOX_DIED:
            values = self._ending(jobs.c.died_attempts, MAX_INFRA_ATTEMPTS, "sandbox_died")
            values["died_with"] = hotkey
        released = (
            sa.update(jobs)
            .where(alive(job_id, token, hotkey))
            .values(token=None, released_token=token, **values)
        )
        changed = (await connection.execute(released)).rowcount
        job = await self.job(connection, job_id)
        if changed:
            return str(job["challenge_id"]) if job["status"] == "pending" else None
        if same_token(job["released_token"], token) and job["holder"] == hotkey:
            return None
        raise refusal(job)

    async def result(
        self, connection: AsyncConnection, job_id: str, hotkey: str, accepted: AcceptedResult
    ) -> bool:
        """Accept a result once; the same body again is accepted again and changes nothing.

        Returns:
            Whether it is new.

        Raises:
            ApiError: 404; 409 `lease_lost` or `job_cancelled`; 422 `invalid_result` for another attempt.
        """
        body = accepted.body
        stored = (
            sa.update(jobs)
            .where(alive(job_id, body.lease_token, hotkey), jobs.c.attempt == body.attempt)
            .values(
                status="completed" if accepted.succeeded else "failed",
                outcome=body.outcome.value,
                result=accepted.kept,
                result_sha256=accepted.sha256,
                score=body.score,
                finished_at=self.now(),
                token=None,
            )
        )
        if (await connection.execute(stored)).rowcount:
            return True
        job = await self.job(connection, job_id)
        if job["result_sha256"] == accepted.sha256 and job["holder"] == hotkey:
            return False
        if same_token(job["token"], body.lease_token) and job["holder"] == hotkey:
            raise ApiError(422, "invalid_result", f"attempt: expected {job['attempt']}, got {body.attempt}")
        raise refusal(job)

    async def cancel(self, connection: AsyncConnection, job_id: str) -> None:
        """Cancel at once; the token is dead.

        Raises:
            ApiError: 404; 409 `already_finished`.
        """
        cancelled = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status.in_(OPEN))
            .values(status="cancelled", outcome="cancelled", finished_at=self.now(), token=None)
        )
        if not (await connection.execute(cancelled)).rowcount:
            job = await self.job(connection, job_id)
            raise ApiError(409, "already_finished", f"job {job_id} is {job['status']}")

    async def retire(self, connection: AsyncConnection) -> int:
        """Fail jobs whose last allowed attempt has lapsed; returns how many."""
        now = self.now()
        retired = (
            sa.update(jobs)
            .where(
                jobs.c.status == "claimed",
                jobs.c.expires_at <= now,
                jobs.c.failed_attempts + 1 >= MAX_ATTEMPTS,
            )
            .values(
                status="failed",
                outcome="infra_error",
                finished_at=now,
                token=None,
                failed_attempts=jobs.c.failed_attempts + 1,
            )
        )
        return (await connection.execute(retired)).rowcount

    async def extend_all(self, connection: AsyncConnection) -> int:
        """At the API's start: its own absence costs nobody a lease. Returns how many were extended."""
        now = self.now()
        start = sa.case((jobs.c.expires_at > now, jobs.c.expires_at), else_=now)
        extended = sa.update(jobs).where(jobs.c.status == "claimed").values(expires_at=start + self.term_ms)
        return (await connection.execute(extended)).rowcount

    async def job(self, connection: AsyncConnection, job_id: str) -> dict[str, Any]:
        """One job's row.

        Raises:
            ApiError: 404 `unknown_job`.
        """
        row = (await connection.execute(sa.select(jobs).where(jobs.c.id == job_id))).mappings().one_or_none()
        if row is None:
            raise ApiError(404, "unknown_job", f"no job {job_id[:64]}")
        return dict(row)

    def _ending(self, counter: sa.Column[int], limit: int, outcome: str) -> dict[str, Any]:
        """Count one up: pending again, or failed at the limit."""
        over = counter + 1 >= limit
        return {
            counter.name: counter + 1,
            "status": sa.case((over, "failed"), else_="pending"),
            "outcome": sa.case((over, outcome), else_=None),
            "finished_at": sa.case((over, self.now()), else_=None),
        }

    async def _claimed(self, connection: AsyncConnection, job_id: str) -> dict[str, Any]:
        job = await self.job(connection, job_id)
        submission = None
        if job["submission_id"] is not None:
            columns = (submissions.c.sha256, submissions.c.size, submissions.c.filename)
            query = sa.select(*columns).where(submissions.c.id == job["submission_id"])
            found = (await connection.execute(query)).mappings().one()
            submission = {"url": f"/submissions/{job['submission_id']}/bundle", **found}
        same = ("id", "challenge_id", "submission_id", "miner_hotkey", "status", "attempt", "job_name")
        return {
            **{key: job[key] for key in (*same, "payload", "timeout_s", "resources")},
            "lease": {"token": job["token"], "term_s": self.term_ms / 1000},
            "submission": submission,
        }

    @staticmethod
    def _claimable(now: int) -> sa.ColumnElement[bool]:
        """Pending, or held by a lease that lapsed and was not the last attempt allowed."""
        lapsed = sa.and_(
            jobs.c.status == "claimed",
            jobs.c.expires_at <= now,
            jobs.c.failed_attempts + 1 < MAX_ATTEMPTS,
        )
        return sa.or_(jobs.c.status == "pending", lapsed)


def alive(job_id: str, token: str, hotkey: str) -> sa.ColumnElement[bool]:
    """The newest token of an unfinished job, in its holder's hands, whatever the clock says."""
    return sa.and_(
        jobs.c.id == job_id, jobs.c.token == token, jobs.c.holder == hotkey, jobs.c.status.in_(OPEN)
    )


def same_token(ours: str | None, given: str) -> bool:
    """Whether a lease token is this one; in constant time, although only its holder's requests are heard."""
    return ours is not None and secrets.compare_digest(ours.encode(), given.encode(errors="replace"))


def refusal(job: dict[str, Any]) -> ApiError:
    """Why a token is not accepted."""
    if job["status"] == "cancelled":
        return ApiError(409, "job_cancelled", f"job {job['id']} was cancelled")
    return ApiError(409, "lease_lost", f"this is not the newest token of an unfinished job: {job['id']}")


def job_view(row: dict[str, Any]) -> dict[str, Any]:
    """A job as owners and administrators see it; never its token."""
    hidden = {"token", "released_token", "claim_id", "result", "result_sha256", "log_next", "died_with"}
    shown = {key: value for key, value in row.items() if key not in hidden and not key.endswith("_at")}
    times = {key: None if row[key] is None else rfc3339(row[key]) for key in row if key.endswith("_at")}
    return shown | times | {"result": json.loads(row["result"]) if row["result"] else None}
