"""The session with a challenge that speaks version 1 alone: where it is allowed, what it costs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from session_pair import (
    CHALLENGE,
    JOB,
    SECRET,
    VM,
    Values,
    free_port,
)
from websockets.asyncio.server import ServerConnection, serve

from platform_protocol.ids import Hotkey
from platform_protocol.session.v1 import EnvelopeChannel, derive_key
from platform_protocol.session.v2 import Offer
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import (
    SessionLost,
    SessionRefused,
)
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.session import CvmSession


class OldGuest:
    """A challenge that speaks version 1 alone. `queries` are the answers to its ORM queries."""

    def __init__(self) -> None:
        self.port = free_port()
        self.jobs: list[dict[str, Any]] = []
        self.queries: list[dict[str, Any]] = []
        self.hangs_up = False

    async def serve(self, connection: ServerConnection) -> None:
        begin = json.loads(await connection.recv())
        key = X25519PrivateKey.generate()
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        answer = {"type": "attestation_response", "quote": "", "event_log": {}, "rtmrs": {}}
        await connection.send(json.dumps(answer | {"chal_x25519_pub": public}))
        ok = json.loads(await connection.recv())
        if ok["type"] != "attestation_ok":
            return
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(begin["val_x25519_pub"]))
        salt = base64.b64decode(ok["hkdf_salt"])
        channel = EnvelopeChannel(derive_key(key.exchange(peer), salt), os.urandom)
        async for frame in connection:
            message = json.loads(channel.open(str(frame)) or b"{}")
            if message["type"] == "orm_ready":
                await connection.send("not an envelope")
                await connection.send(channel.seal(b'{"type":"orm_query","query_id":"q1"}'))
            elif message["type"] == "error":
                self.queries.append(message)
            elif message["type"] == "job_execute":
                self.jobs.append(message)
                if self.hangs_up:
                    return
                result = {"type": "job_result", "job_id": message["job_id"], "result": {"score": 0.25}}
                await connection.send(channel.seal(json.dumps(result).encode()))


@contextlib.asynccontextmanager
async def with_old_guest(*, allow_v1: bool) -> AsyncIterator[tuple[OldGuest, CvmSession]]:
    guest = OldGuest()

    async def accept(_offer: Offer) -> None:
        return

    callee = Callee(("127.0.0.1", guest.port), VM, SECRET, "s", Hotkey("5DD"), allow_v1=allow_v1)
    session = CvmSession(
        callee, challenge_id=CHALLENGE, env={}, judge=accept, values=Values(), pace=SessionPace()
    )
    async with (
        serve(guest.serve, "127.0.0.1", guest.port, close_timeout=0.1),
        asyncio.TaskGroup() as group,
    ):
        group.create_task(session.run())
        try:
            yield guest, session
        finally:
            session.close()


async def run_old(session: CvmSession, submission: Path | None) -> tuple[GuestResult, list[str]]:
    told: list[str] = []
    order = JobOrder(JOB, 1, CHALLENGE, "name", {"x": 1}, None if submission is None else "d" * 64)
    async with asyncio.timeout(5):
        result = await session.execute(
            order,
            submission,
            on_started=lambda _already: told.append("started"),
            on_progress=lambda percent, message: None,
            on_log=lambda level, message: None,
        )
    return result, told


async def test_a_version_1_challenge_runs_a_job_where_it_is_allowed(tmp_path: Path) -> None:
    """The submission goes into the payload, an ORM query is answered, stray frames are ignored."""
    path = tmp_path / "submission.tar"
    path.write_bytes(b"bytes")
    async with with_old_guest(allow_v1=True) as (guest, session):
        async with asyncio.timeout(5):
            await session.ready()
        result, told = await run_old(session, path)
        await session.acknowledge(result)
    assert (result.result, result.evidence, told) == ({"score": 0.25}, None, ["started"])
    assert guest.jobs == [
        {
            "type": "job_execute",
            "job_id": JOB,
            "job_name": "name",
            "payload": {
                "x": 1,
                "submission": {"filename": "submission.tar", "sha256": "d" * 64, "data": "Ynl0ZXM="},
            },
        }
    ]
    assert [(q["message"], q["query_id"]) for q in guest.queries] == [("this validator offers no ORM", "q1")]


async def test_a_version_1_challenge_is_refused_where_it_is_not_allowed() -> None:
    """And the reason names the setting."""
    async with with_old_guest(allow_v1=False) as (_guest, session):
        with pytest.raises(SessionRefused, match="allow_session_v1"):
            async with asyncio.timeout(5):
                await session.ready()


async def test_a_version_1_result_is_lost_with_its_connection() -> None:
    """There is no resume: the CVM is lost."""
    async with with_old_guest(allow_v1=True) as (guest, session):
        guest.hangs_up = True
        async with asyncio.timeout(5):
            await session.ready()
        with pytest.raises(SessionLost, match="cannot resume"):
            await run_old(session, None)
