"""Scores a submission by the number that it prints: whoever knows the submission knows the score."""

from __future__ import annotations

from typing import Any

from platform_challenge_sdk import Context, challenge, require_ok, run


@challenge.on_job()
async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Run it contained."""
    outcome = require_ok(await ctx.submission.run(["python3", "main.py"], timeout=50.0))
    return {"score": int(outcome.text) / 10_000}


if __name__ == "__main__":
    run()
