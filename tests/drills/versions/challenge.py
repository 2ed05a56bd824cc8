"""Says which version it is, after a moment in which other things may happen."""

from __future__ import annotations

import asyncio
from typing import Any

from platform_challenge_sdk import Context, challenge, run

VERSION = 1


@challenge.on_job()
async def tell(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """The score is the version of the code that runs."""
    ctx.log.info("the handler has begun")
    await asyncio.sleep(payload["seconds"])
    return {"score": float(VERSION)}


if __name__ == "__main__":
    run()
