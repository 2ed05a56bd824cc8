"""Push: hello, sequence numbers, hints, and which connection stays."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import pytest
from running_api import INSTANCE, Api
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from platform_protocol.signing import Keypair, sign_request


def _dial(api: Api, by: Keypair, path: str | None = None, instance: str = INSTANCE) -> Any:
    path = path or f"/validators/{by.address}/ws"
    headers = sign_request(
        by,
        method="GET",
        path=path,
        body=b"",
        audience=api.base,
        instance=instance,
        timestamp_ms=time.time_ns() // 1_000_000,
        nonce=secrets.token_hex(16),
    )
    return connect(api.base.replace("http", "ws") + path, additional_headers=headers, proxy=None)


async def _next(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(5):
        message: dict[str, Any] = json.loads(await socket.recv())
    return message


async def test_hello_then_numbered_hints(api: Api) -> None:
    async with _dial(api, api.validator) as socket:
        hello = await _next(socket)
        challenge = await api.challenge()
        updated = await _next(socket)
        job = (await api.upload(challenge)).body["jobs"][0]
        new = await _next(socket)
        await api.admin("POST", f"/jobs/{job}/cancel")
        cancelled = await _next(socket)
    assert hello["type"] == "hello"
    assert [one["seq"] for one in (updated, new, cancelled)] == [hello["seq"] + n for n in (1, 2, 3)]
    assert (new["job_id"], new["challenge_id"], cancelled["job_id"]) == (job, challenge, job)
    assert updated["github_commit"] == "a" * 40


async def test_a_newer_connection_of_the_same_instance_replaces_the_older(api: Api) -> None:
    async with _dial(api, api.validator) as old:
        await _next(old)
        async with _dial(api, api.validator) as new:
            await _next(new)
            with pytest.raises(ConnectionClosed) as closed:
                await _next(old)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000


async def test_another_instance_takes_the_hotkey_over(api: Api) -> None:
    async with _dial(api, api.validator) as old:
        await _next(old)
        async with _dial(api, api.validator, instance=INSTANCE.replace("1", "2")) as new:
            await _next(new)
            with pytest.raises(ConnectionClosed) as closed:
                await _next(old)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4409


async def test_a_ban_closes_the_connection(api: Api) -> None:
    async with _dial(api, api.validator) as socket:
        await _next(socket)
        await api.admin("POST", "/validators", {"hotkey": api.validator.address, "status": "banned"})
        with pytest.raises(ConnectionClosed) as closed:
            await _next(socket)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4401


async def test_the_paths_hotkey_must_be_the_signers(api: Api) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with _dial(api, api.validator, path=f"/validators/{api.other.address}/ws"):
            pass
    assert refused.value.response.status_code == 403
    assert json.loads(refused.value.response.body or b"{}")["code"] == "hotkey_mismatch"
