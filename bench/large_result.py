"""How long the event loop stands still while a huge result is read: in this process, and as the daemon does.

The last line of stdout is one JSON object. Seconds are the longest pause between two turns of the loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

from platform_validator.cvm.reading import read_message

_EVERY = 0.01


async def longest_pause(work: Callable[[], Awaitable[object]]) -> float:
    """The longest time in seconds that a 10 ms timer was late while `work` was done."""
    lags = [0.0]

    async def turn() -> None:
        while True:
            due = time.monotonic() + _EVERY
            await asyncio.sleep(_EVERY)
            lags.append(time.monotonic() - due)

    turning = asyncio.ensure_future(turn())
    await work()
    await asyncio.sleep(2 * _EVERY)
    turning.cancel()
    return max(lags)


async def measure() -> dict[str, float | int]:
    """Both ways, on the same text: an object of 15 million empty objects, 60 MB."""
    text = json.dumps({"type": "job_result", "result": {"score": 1.0, "more": [{}] * 15_000_000}}).encode()

    async def here() -> None:
        await asyncio.to_thread(json.loads, text)

    apart = await longest_pause(lambda: read_message(text))
    together = await longest_pause(here)
    return {
        "bytes": len(text),
        "pause_in_a_thread_s": round(together, 3),
        "pause_in_a_process_s": round(apart, 3),
        "ratio": round(together / max(apart, 1e-3), 1),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(measure())) + "\n")
