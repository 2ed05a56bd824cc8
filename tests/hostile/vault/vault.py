"""An honest challenge with secrets of its own: an environment value, and the same backwards in its values."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from platform_challenge_sdk import Context, challenge, run


@challenge.on_job()
async def keep(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Keep the secret."""
    secret = os.environ["VAULT_SECRET"]
    await ctx.values.set("kept", secret[::-1])
    await asyncio.sleep(payload.get("seconds", 0))
    return {"score": float(await ctx.values.get("kept") == secret[::-1])}


if __name__ == "__main__":
    run()
