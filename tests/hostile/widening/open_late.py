"""The vault, which takes so long to start that its job is known before it is given."""

from __future__ import annotations

import asyncio
import importlib

from platform_challenge_sdk import challenge

START_S = 8.0


@challenge.on_startup
async def slowly() -> None:
    """Take a while."""
    await asyncio.sleep(START_S)


importlib.import_module("vault")
