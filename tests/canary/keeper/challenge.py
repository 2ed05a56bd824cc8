"""Has a secret from its operator, and keeps another one in its values."""

from __future__ import annotations

import os
from typing import Any

from platform_challenge_sdk import Context, challenge, run


@challenge.on_job()
async def keep(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """The score says that the secret came; the value that is kept is the secret, backwards."""
    secret = os.environ["KEEPER_SECRET"]
    await ctx.values.set("kept", {"inside": secret[::-1]})
    kept = await ctx.values.get("kept")
    return {"score": float(kept["inside"] == secret[::-1])}


if __name__ == "__main__":
    run()
