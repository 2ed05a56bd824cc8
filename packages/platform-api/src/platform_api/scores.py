"""Leaderboards, results and weights: public, by raw score."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.tables import jobs, submissions

_MAX_RESULTS = 1000


async def leaderboard(connection: AsyncConnection, challenge_id: str) -> list[dict[str, Any]]:
    """Each miner's best completed submission, best first; equal scores: the earlier one first."""
    query = (
        sa.select(jobs, submissions.c.filename)
        .outerjoin(submissions, submissions.c.id == jobs.c.submission_id)
        .where(
            jobs.c.challenge_id == challenge_id,
            jobs.c.status == "completed",
            jobs.c.miner_hotkey.is_not(None),
        )
        .order_by(jobs.c.score.desc(), jobs.c.created_at, jobs.c.id)
    )
    best: dict[str, dict[str, Any]] = {}
    for row in await connection.execute(query):
        if row.miner_hotkey not in best:
            best[row.miner_hotkey] = {
                "rank": len(best) + 1,
                "miner_hotkey": row.miner_hotkey,
                "score": row.score,
                "job_id": row.id,
                "submission_id": row.submission_id,
                "filename": row.filename,
                "attestation": json.loads(row.result)["attestation"] if row.result else None,
            }
    return list(best.values())


async def results(connection: AsyncConnection, challenge_id: str, since_ms: int) -> list[dict[str, Any]]:
    """Finished jobs with results, oldest first, at most 1,000 from `since_ms` on."""
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
        shown = {"job_id": row.id, "miner_hotkey": row.miner_hotkey, "finished_at": row.finished_at}
        found.append(shown | {"submission_id": row.submission_id, "job_name": row.job_name} | body)
    return found


async def weights(connection: AsyncConnection, challenge_id: str) -> dict[str, float]:
    """Each miner's share of the sum of best raw scores; scores below 0 count as 0."""
    board = await leaderboard(connection, challenge_id)
    total = sum(max(0.0, entry["score"]) for entry in board)
    return {entry["miner_hotkey"]: max(0.0, entry["score"]) / total if total else 0.0 for entry in board}
