"""A real Platform API on a loopback port, with a database of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from running_api import Api, Server
from waiting import until

from platform_api.app import make_app, make_token
from platform_api.config import ApiSettings
from platform_api.database import Database


@pytest.fixture
def lease_term() -> float:
    return 120.0


@pytest.fixture
async def api(tmp_path: Path, lease_term: float) -> AsyncIterator[Api]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    url = f"sqlite+aiosqlite:///{tmp_path / 'api.db'}"
    settings = ApiSettings(database_url=url, listen=f"127.0.0.1:{port}", lease_term=lease_term)
    config = uvicorn.Config(
        make_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = Server(config)
    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        database = await Database.open(url)
        async with database.write() as connection:
            token = await make_token(connection, "test")
        await database.close()
        running = Api(f"http://127.0.0.1:{port}", token, http, url)
        for keypair in (running.validator, running.other):
            await running.admin("POST", "/validators", {"hotkey": keypair.address})
        yield running
        server.should_exit = True
    listener.close()
