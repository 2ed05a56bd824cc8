"""Counts in the validator's values, many increments under way at once."""

from __future__ import annotations

import asyncio
from typing import Any

from platform_challenge_sdk import Context, challenge, run

AT_ONCE = 10


@challenge.on_job()
async def count(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """From `go` on add one to `total`, `times` times; the score is how often that was answered."""
    while not await ctx.values.get("go"):
        await asyncio.sleep(0.1)
    left = iter(range(payload["times"]))
    answered = 0

    async def add() -> None:
        nonlocal answered
        for _ in left:
            await ctx.values.increment("total")
            answered += 1
            ctx.progress(100 * answered / payload["times"], "counting")

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(add())
    return {"score": float(answered)}


if __name__ == "__main__":
    run()
