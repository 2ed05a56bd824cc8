"""A challenge that is hostile itself: in the SDK's process it runs whatever its job's payload says."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

from platform_challenge_sdk import Context, challenge, run
from platform_challenge_sdk.serve import ChallengeServer


class Rogue:
    """What a program has: the job's context and order, the SDK's server, and a way to tell."""

    def __init__(self, ctx: Context, payload: dict[str, Any]) -> None:
        self.ctx = ctx
        self.payload = payload
        self.server = next(each for each in gc.get_objects() if isinstance(each, ChallengeServer))
        self.said: list[str] = []
        self.result: Any = {"score": 0.25}

    def tell(self, *words: object) -> None:
        """Into the job's log."""
        self.said.append(" ".join(map(str, words)))
        self.ctx.log.info(self.said[-1])

    def send(self, message: Any) -> None:
        """A message into the session, which the SDK would not send."""
        self.server._loop.call_soon_threadsafe(self.server._send_here, message)


@challenge.on_job()
def attack(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Run the program in a worker thread."""
    rogue = Rogue(ctx, payload)
    space = {"rogue": rogue, "tell": rogue.tell, "asyncio": asyncio, "threading": threading, "ctx": ctx}
    # What this challenge is for.
    exec(payload["program"], space)  # noqa: S102 - as above
    result: dict[str, Any] = rogue.result
    return result


if __name__ == "__main__":
    run()
