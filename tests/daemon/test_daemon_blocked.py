"""The daemon whole, on the real loop of this process, while a callback blocks it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from tests.daemon.process import Daemon as Settled

from platform_protocol.signing import Keypair
from platform_validator.config import load_settings
from platform_validator.daemon.run import Daemon, Exit
from platform_validator.daemon.systemd import Systemd
from platform_validator.state import StateDirectory

BLOCKED = 3.0


class Manager:
    """The service manager: notes when it was told what, on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.told: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (message := self._socket.recv(4096)) != b"END":
            self.told.append((time.monotonic(), message.decode()))

    def fed(self, begin: float, end: float) -> int:
        """How often the watchdog was fed in between."""
        return sum(message == "WATCHDOG=1" and begin < at < end for at, message in self.told)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"END", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.mark.slow(reason="blocks the event loop for three seconds")
@pytest.mark.robustness(4, "lag", "watchdog", "exit")
async def test_a_blocked_event_loop_starves_the_watchdog_shows_as_lag_and_still_ends(
    tmp_path: Path, manager: Manager
) -> None:
    """Robustness 4: not fed meanwhile, fed again afterwards; the lag stays to be seen; exit code 0."""
    settled = Settled.made(tmp_path)
    settings = load_settings(settled.environment, folder=tmp_path)
    state = StateDirectory(settings.db_path)
    state.prepare()
    state.lock()
    systemd = Systemd(str(tmp_path / "notify"), timedelta(seconds=0.4))
    daemon = Daemon(
        settings, Keypair.from_seed(settled.seed), state, systemd=systemd, reread=lambda: settings
    )
    try:
        async with asyncio.timeout(50):
            running = asyncio.create_task(daemon.run())
            while manager.fed(0, time.monotonic()) < 3:
                await asyncio.sleep(0.05)
            begin = time.monotonic()
            asyncio.get_running_loop().call_soon(time.sleep, BLOCKED)
            await asyncio.sleep(0)  # the turn that is blocked
            end = time.monotonic()
            assert end - begin >= BLOCKED
            assert manager.fed(begin + 0.05, begin + BLOCKED) == 0
            while not manager.fed(end, time.monotonic()):
                await asyncio.sleep(0.05)
            while await lag(settled.ports[2]) < 1.0:
                await asyncio.sleep(0.1)
            asyncio.get_running_loop().call_soon(time.sleep, 1.0)
            os.kill(os.getpid(), 15)
            assert await running == Exit.DRAINED
    finally:
        systemd.close()
        state.close()


async def lag(port: int) -> float:
    """The metric, as it is scraped."""
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    [line] = [line for line in lines if line.startswith("platform_validator_loop_lag_seconds ")]
    return float(line.split()[1])
