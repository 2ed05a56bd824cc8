"""A real Platform API in this process, on a free loopback port, with two validators and an administrator."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from platform_api.app import make_app, make_token, set_validator
from platform_api.config import ApiSettings
from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.signing import Keypair, sign_request
from platform_validator.clock import SystemClock
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import PlatformClient
from platform_validator.platform_client.signer import RequestSigner

KEYS = [Keypair.from_seed(bytes([number]) * 32) for number in (1, 2)]
MINER = Keypair.from_seed(bytes([9]) * 32)


class RealApi:
    """The Platform API as its administrator and its miners see it."""

    def __init__(self, url: str, token: str, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self._url = url
        self._token = token
        self._session = session
        self._clients = [
            HttpPlatformClient(
                base_url=url,
                signer=RequestSigner(
                    keypair=key,
                    base_url=url,
                    instance=f"{number:08d}-0000-4000-8000-000000000000",
                    clock=SystemClock(),
                ),
                clock=SystemClock(),
            )
            for number, key in enumerate(KEYS)
        ]

    def client(self, number: int = 0) -> PlatformClient:
        """The client of a registered validator."""
        return self._clients[number]

    async def add_challenge(self) -> ChallengeId:
        """An active challenge."""
        made = await self._administer(
            "/challenges",
            {
                "name": f"c-{secrets.token_hex(4)}",
                "github_repo": "owner/name",
                "github_commit": "a" * 40,
            },
        )
        return ChallengeId(made["id"])

    async def add_job(self, challenge_id: ChallengeId, submission: bytes | None = None) -> JobId:
        """A job: an administrator's, or a miner's upload's."""
        if submission is None:
            return JobId((await self._administer("/jobs", {"challenge_id": challenge_id}))["id"])
        path = f"/challenges/{challenge_id}/submissions"
        headers = sign_request(
            MINER,
            method="POST",
            path=path,
            body=submission,
            audience=self._url,
            instance="",
            timestamp_ms=int(time.time() * 1000),
            nonce=secrets.token_hex(16),
            role="miner",
        )
        made = await self._post(path, submission, {**headers, "X-Filename": "submission.py"})
        return JobId(made["jobs"][0])

    async def cancel_job(self, job_id: JobId) -> None:
        """Cancel it."""
        await self._administer(f"/jobs/{job_id}/cancel", {})

    async def close(self) -> None:
        """Close the clients."""
        for client in self._clients:
            await client.close()

    async def _administer(self, path: str, body: dict[str, Any]) -> Any:
        data = aiohttp.JsonPayload(body)
        return await self._post(path, data, {"Authorization": f"Bearer {self._token}"})

    async def _post(self, path: str, body: bytes | aiohttp.Payload, headers: dict[str, str]) -> Any:
        async with self._session.post(self._url + path, data=body, headers=headers) as answer:
            assert answer.status < 300, await answer.text()
            return await answer.json()


@asynccontextmanager
async def running_real_api(
    folder: Path, audiences: Callable[[int], Sequence[str]] = lambda _: ()
) -> AsyncIterator[RealApi]:
    """A server whose clients dial it directly. `audiences`: more URLs that it is known by, given its port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = ApiSettings(
        database_url=f"sqlite:///{folder / 'api.db'}", public_url=url, audiences=[url, *audiences(port)]
    )
    app = make_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="websockets-sansio", lifespan="on"))
    async with asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
        running = group.create_task(server.serve(sockets=[listener]))
        while not server.started:
            assert not running.done()
            await asyncio.sleep(0.01)
        async with app.state.services.database.write() as connection:
            token = await make_token(connection, "tests")
            for key in KEYS:
                await set_validator(connection, key.address, "active")
        await asyncio.to_thread((folder / "folder").mkdir)
        real = RealApi(url, token, folder / "folder", session)
        try:
            yield real
        finally:
            await real.close()
            server.should_exit = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await running
    listener.close()
