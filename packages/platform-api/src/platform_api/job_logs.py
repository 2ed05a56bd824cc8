"""Log lines of running jobs: capped, and what is missing counted."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.queue import Queue, alive, refusal, same_token
from platform_api.tables import job_logs, jobs

MAX_LINE = 8 * 1024
MAX_JOB = 64 * 1024 * 1024
MAX_SEQ = 2**31 - 1
_PAGE = 1000


async def keep_lines(
    connection: AsyncConnection,
    queue: Queue,
    job_id: str,
    *,
    token: str,
    hotkey: str,
    seq: int,
    lines: list[str],
) -> None:
    """Keep lines, 8 KiB each, 64 MiB a job.

    A repeated or late `seq` changes nothing; one that was skipped is counted in `log_gaps`, a line over the
    job's cap in `log_dropped`.

    Raises:
        ApiError: 404 `unknown_job`; 409 `lease_lost` or `job_cancelled`.
    """
    kept = [_cut(line) for line in lines]
    size = sum(len(line.encode()) for line in kept)
    next_one = sa.and_(alive(job_id, token, hotkey), jobs.c.log_next <= seq)
    counted = {"log_gaps": jobs.c.log_gaps + (seq - jobs.c.log_next), "log_next": seq + 1}
    room = jobs.c.log_bytes + size <= MAX_JOB
    taken = (
        sa.update(jobs)
        .where(next_one, room)
        .values(log_bytes=jobs.c.log_bytes + size, **counted)
        .returning(jobs.c.attempt)
    )
    attempt = await connection.scalar(taken)
    if attempt is not None:
        row = {"job_id": job_id, "attempt": attempt, "seq": seq, "lines": kept, "bytes": size}
        await connection.execute(sa.insert(job_logs).values(**row))
        return
    dropped = sa.update(jobs).where(next_one).values(log_dropped=jobs.c.log_dropped + len(kept), **counted)
    if (await connection.execute(dropped)).rowcount:
        return
    job = await queue.job(connection, job_id)
    if not same_token(job["token"], token) or job["holder"] != hotkey:
        raise refusal(job)


async def kept_lines(
    connection: AsyncConnection, job_id: str, attempt: int, since_seq: int
) -> list[dict[str, Any]]:
    """Batches `{seq, lines}` of one attempt from `since_seq` on, at most 1,000."""
    query = (
        sa.select(job_logs.c.seq, job_logs.c.lines)
        .where(job_logs.c.job_id == job_id, job_logs.c.attempt == attempt, job_logs.c.seq >= since_seq)
        .order_by(job_logs.c.seq)
        .limit(_PAGE)
    )
    return [dict(row) for row in (await connection.execute(query)).mappings()]


def _cut(line: str) -> str:
    return line.encode()[:MAX_LINE].decode(errors="ignore")
