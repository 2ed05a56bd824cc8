"""Leaderboards, results and weights: public, by raw score."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.clock import rfc3339
from platform_api.tables import jobs, submissions

_MAX_RESULTS = 1000


async def leaderboard(connection: AsyncConnection, challenge_id: str) -> list[dict[str, Any]]:
    """Each miner's best completed job by raw score, best first; of equal scores the earlier submitted.

    `job_id`, `job_name`, `submission_id` and `filename` say which job that was: a challenge with several
    jobs a submission ranks a miner by the best of all of them.
    """
    order = (jobs.c.score.desc(), jobs.c.created_at, jobs.c.id)
    place = sa.func.row_number().over(partition_by=jobs.c.miner_hotkey, order_by=order).label("place")
    ranked = (
        sa.select(jobs, place)
        .where(
            jobs.c.challenge_id == challenge_id,
            jobs.c.status == "completed",
            jobs.c.miner_hotkey.is_not(None),
        )
        .subquery()
    )
    query = (
        sa.select(ranked, submissions.c.filename)
        .outerjoin(submissions, submissions.c.id == ranked.c.submission_id)
        .where(ranked.c.place == 1)
        .order_by(ranked.c.score.desc(), ranked.c.created_at, ranked.c.id)
    )
    return [
        {
            "rank": rank,
            "miner_hotkey": row.miner_hotkey,
            "score": row.score,
            "job_id": row.id,
            "job_name": row.job_name,
            "submission_id": row.submission_id,
            "filename": row.filename,
            "attestation": json.loads(row.result)["attestation"],
            "isolation_level": json.loads(row.result)["isolation_level"],
        }
        for rank, row in enumerate(await connection.execute(query), start=1)
    ]


async def results(connection: AsyncConnection, challenge_id: str, since_ms: int) -> list[dict[str, Any]]:
    """Finished jobs with results, oldest first, at most 1,000 from `since_ms` on, without logs.

    The last one's `finished_at` is the next `since`; what finished in that millisecond comes again.
    """
    query = (
        sa.select(jobs)
        .where(
            jobs.c.challenge_id == challenge_id, jobs.c.result.is_not(None), jobs.c.finished_at >= since_ms
        )
        .order_by(jobs.c.finished_at, jobs.c.id)
        .limit(_MAX_RESULTS)
    )
    found = []
    for row in await connection.execute(query):
        body = json.loads(row.result)
        body.pop("logs", None)
        shown = {
            "job_id": row.id,
            "job_name": row.job_name,
            "miner_hotkey": row.miner_hotkey,
            "submission_id": row.submission_id,
            "validator_hotkey": row.holder,
            "finished_at": rfc3339(row.finished_at),
        }
        found.append(shown | body)
    return found


async def weights(connection: AsyncConnection, challenge_id: str) -> dict[str, float]:
    """Each miner's share of the sum of best raw scores; scores below 0 count as 0."""
    board = await leaderboard(connection, challenge_id)
    best = {str(entry["miner_hotkey"]): max(0.0, float(entry["score"])) for entry in board}
    largest = max(best.values(), default=0.0)
    # Divided by the largest first: a sum of finite scores may overflow.
    total = sum(score / largest for score in best.values()) if largest else 0.0
    return {miner: score / largest / total if total else 0.0 for miner, score in best.items()}
