"""Submissions: kept as uploaded, one job for each of the challenge's templates."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.challenges import JobTemplate, Name, get_challenge
from platform_api.clock import now_ms
from platform_api.errors import ApiError
from platform_api.push import record_change
from platform_api.queue import OPEN
from platform_api.tables import jobs, submissions
from platform_protocol.canonical import sha256_hex

_MAX_NAME = 255
_SHOWN = ("id", "challenge_id", "miner_hotkey", "sha256", "size", "filename", "created_at")


class NewJob(JobTemplate):
    """`POST /jobs`: a job without a miner's upload."""

    challenge_id: Name


async def add_submission(
    connection: AsyncConnection, challenge_id: str, miner: str, filename: str, data: bytes
) -> dict[str, Any]:
    """Keep an upload and make its jobs; the same bytes of the same miner again make nothing new.

    Raises:
        ApiError: 404 `unknown_challenge`; 409 `challenge_not_active`; 422 `bad_filename`, `empty`.
    """
    challenge = await get_challenge(connection, challenge_id)
    if challenge["status"] != "active":
        raise ApiError(409, "challenge_not_active", f"challenge {challenge['name']} is {challenge['status']}")
    _check_name(filename)
    if not data:
        raise ApiError(422, "empty", "expected the submission's bytes as the body")
    digest = sha256_hex(data)
    shown = {"sha256": digest, "size": len(data)}
    identity = str(uuid.uuid4())
    row = {
        "id": identity,
        "challenge_id": challenge_id,
        "miner_hotkey": miner,
        "filename": filename,
        "data": data,
        "created_at": now_ms(),
        **shown,
    }
    try:
        async with connection.begin_nested():
            await connection.execute(sa.insert(submissions).values(**row))
    except IntegrityError:
        earlier = await _same(connection, challenge_id, miner, digest)
        return shown | {"id": earlier, "jobs": await _jobs_of(connection, earlier), "duplicate": True}
    made = [
        await add_job(connection, challenge, template, submission_id=identity, miner=miner)
        for template in challenge["jobs"]
    ]
    return shown | {"id": identity, "jobs": made, "duplicate": False}


async def add_job(
    connection: AsyncConnection,
    challenge: dict[str, Any],
    template: dict[str, Any],
    *,
    submission_id: str | None,
    miner: str | None,
) -> str:
    """Queue one job; validators are told. Returns its id."""
    identity = str(uuid.uuid4())
    await connection.execute(
        sa.insert(jobs).values(
            id=identity,
            challenge_id=challenge["id"],
            submission_id=submission_id,
            miner_hotkey=miner,
            status="pending",
            created_at=now_ms(),
            priority=template.get("priority") or 0,
            resources=challenge["resources"],
            timeout_s=template.get("timeout_s") or challenge["timeout_s"],
            job_name=template.get("job_name"),
            payload=template.get("payload") or {},
        )
    )
    await record_change(connection, "new_job", identity, challenge["id"])
    return identity


async def get_submission(connection: AsyncConnection, identity: str) -> dict[str, Any]:
    """One submission without its bytes, with the ids of its jobs.

    Raises:
        ApiError: 404 `unknown_submission`.
    """
    columns = [submissions.c[name] for name in _SHOWN]
    query = sa.select(*columns).where(submissions.c.id == identity)
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise ApiError(404, "unknown_submission", f"no submission {identity[:64]}")
    return dict(row) | {"jobs": await _jobs_of(connection, identity)}


async def bundle_for(connection: AsyncConnection, identity: str, hotkey: str) -> bytes:
    """The bytes, for the validator that holds a lease on one of its jobs.

    Raises:
        ApiError: 404 `unknown_submission`; 403 `no_lease`.
    """
    held = sa.exists().where(
        jobs.c.submission_id == identity,
        jobs.c.holder == hotkey,
        jobs.c.token.is_not(None),
        jobs.c.status.in_(OPEN),
    )
    data = await connection.scalar(sa.select(submissions.c.data).where(submissions.c.id == identity, held))
    if data is None:
        await get_submission(connection, identity)
        raise ApiError(403, "no_lease", "only the validator that holds a job of this submission may read it")
    return bytes(data)


async def _same(connection: AsyncConnection, challenge_id: str, miner: str, digest: str) -> str:
    query = sa.select(submissions.c.id).where(
        submissions.c.challenge_id == challenge_id,
        submissions.c.miner_hotkey == miner,
        submissions.c.sha256 == digest,
    )
    return str((await connection.execute(query)).scalar_one())


async def _jobs_of(connection: AsyncConnection, submission_id: str) -> list[str]:
    query = sa.select(jobs.c.id).where(jobs.c.submission_id == submission_id)
    return list((await connection.execute(query.order_by(jobs.c.created_at, jobs.c.id))).scalars())


def _check_name(filename: str) -> None:
    bad = not filename or len(filename) > _MAX_NAME or not (filename.isascii() and filename.isprintable())
    if bad or "/" in filename or "\\" in filename or filename in (".", ".."):
        raise ApiError(
            422,
            "bad_filename",
            "X-Filename: expected a plain file name of 1 to 255 printable ASCII characters",
        )
