"""How late the event loop runs: measured every second, shown as the worst of the last minute."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import timedelta

EVERY = timedelta(seconds=1)
SHOWN_FOR = timedelta(minutes=1)


class LoopLag:
    """The loop that measures. A scrape now and then sees a stall that has passed.

    Args:
        shown: Is told the worst lag of the last minute, in seconds.
    """

    def __init__(self, shown: Callable[[float], None]) -> None:
        self._shown = shown
        self.beat: Callable[[], None] = lambda: None
        self._seen: deque[tuple[float, float]] = deque()
        self.worst = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + EVERY.total_seconds()
            await asyncio.sleep(EVERY.total_seconds())
            now = loop.time()
            self._seen.append((now, max(0.0, now - due)))
            while self._seen[0][0] < now - SHOWN_FOR.total_seconds():
                self._seen.popleft()
            self.worst = max(lag for _, lag in self._seen)
            self._shown(self.worst)
            self.beat()
