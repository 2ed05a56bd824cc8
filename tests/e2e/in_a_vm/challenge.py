"""Asks a submission which kernel it runs on."""

from __future__ import annotations

import json
import os
from typing import Any

from platform_challenge_sdk import Context, challenge, require_ok, run


@challenge.on_job()
async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Score 1 when it says what the challenge sees: it ran, contained, on the CVM's own kernel."""
    outcome = require_ok(await ctx.submission.run(["python3", "main.py"], timeout=300))
    told = json.loads(outcome.text)
    ctx.log.info(json.dumps(told))
    return {"score": float(told["kernel"] == os.uname().release), "metrics": {"pid": told["pid"]}}


run()
