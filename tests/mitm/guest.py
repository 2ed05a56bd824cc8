"""The processes in the CVMs: the Challenge SDK, serving; and a challenge as deployed ones speak version 1."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from tests.mitm import canaries
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.context import Context
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.session.errors import FrameInvalid
from platform_protocol.session.v1 import EnvelopeChannel, derive_key
from platform_protocol.user_config import UserConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest serves, asks for quotes, and writes down the payload of each run."""

    port: int
    agent: Path
    runs: Path
    scratch: Path

    def ran(self, payload: dict[str, Any]) -> None:
        """A line for each run."""
        with self.runs.open("a") as file:
            file.write(json.dumps(payload) + "\n")


def serve_sdk(place: Place, config: UserConfig) -> None:
    """The Challenge SDK, whole."""
    challenge = Challenge()

    @challenge.on_job()
    async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
        place.ran(payload)
        for number in range(3):
            line = f"{canaries.LINE} {number}"
            ctx.log.info(line)
        await ctx.values.set("canary", canaries.VALUE)
        return {"score": 0.5, "metrics": {"files": len(list(ctx.submission.path.iterdir()))}} | _SECRET

    async def run() -> None:
        server = ChallengeServer(
            challenge, config, Health("ready"), agent=Agent((str(place.agent),)), scratch=place.scratch
        )
        await server.serve("127.0.0.1", place.port)

    asyncio.run(run())


def serve_old(place: Place) -> None:
    """Version 1: no launch secret, no nonce remembered, frames that are no envelope ignored."""

    async def converse(connection: ServerConnection) -> None:
        begin = json.loads(await connection.recv())
        key = X25519PrivateKey.generate()
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        said = {"type": "attestation_response", "quote": "", "event_log": {}, "rtmrs": {}}
        await connection.send(json.dumps(said | {"chal_x25519_pub": public}))
        accepted = json.loads(await connection.recv())
        if accepted.get("type") != "attestation_ok":
            return
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(begin["val_x25519_pub"]))
        salt = base64.b64decode(accepted["hkdf_salt"])
        channel = EnvelopeChannel(derive_key(key.exchange(peer), salt), os.urandom)
        async for frame in connection:
            try:
                message = json.loads(channel.open(str(frame)) or b"{}")
            except FrameInvalid:
                continue
            for answer in _answers(place, message):
                await connection.send(channel.seal(json.dumps(answer).encode()))

    async def meet(connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await converse(connection)

    async def run() -> None:
        async with serve(meet, "127.0.0.1", place.port, compression=None, ping_interval=None):
            await asyncio.Event().wait()

    asyncio.run(run())


_SECRET = {"secret": canaries.RESULT}


def _answers(place: Place, message: dict[str, Any]) -> list[dict[str, Any]]:
    line = {"type": "log", "message": canaries.LINE}
    if message.get("type") == "orm_ready":
        return [line, line]
    if message.get("type") != "job_execute":
        return []
    payload = message["payload"]
    place.ran({key: held for key, held in payload.items() if key != "submission"})
    result = {"score": 0.5, "metrics": {"files": int("submission" in payload)}} | _SECRET
    return [line, {"type": "job_result", "job_id": message["job_id"], "result": result}]
