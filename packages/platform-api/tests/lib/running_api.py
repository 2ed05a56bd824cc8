"""Talks to a real Platform API on a loopback port."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn

from platform_protocol.signing import Keypair, sign_request

INSTANCE = "11111111-1111-4111-8111-111111111111"


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Answer:
    """An answer, read."""

    status: int
    body: Any
    headers: Mapping[str, str]


@dataclass
class Api:
    """A running server and keys to talk to it."""

    base: str
    token: str
    http: aiohttp.ClientSession
    database_url: str
    validator: Keypair = field(default_factory=lambda: Keypair.from_seed(b"v" * 32))
    other: Keypair = field(default_factory=lambda: Keypair.from_seed(b"w" * 32))
    miner: Keypair = field(default_factory=lambda: Keypair.from_seed(b"m" * 32))

    async def admin(self, method: str, path: str, body: Any = None) -> Answer:
        return await self.send(method, path, body, {"Authorization": f"Bearer {self.token}"})

    async def signed(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        by: Keypair | None = None,
        role: str = "validator",
        change: dict[str, Any] | None = None,
        extra: dict[str, str] | None = None,
    ) -> Answer:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given: dict[str, Any] = {
            "method": method,
            "path": path,
            "body": data,
            "audience": self.base,
            "instance": INSTANCE,
            "timestamp_ms": time.time_ns() // 1_000_000,
            "nonce": secrets.token_hex(16),
            "role": role,
        } | (change or {})
        headers = sign_request(by or self.validator, **given)
        return await self.send(method, path, data, headers | (extra or {}))

    async def send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self.http.request(
            method, self.base + path, data=data or None, headers=headers
        ) as response:
            raw = await response.read()
            body = json.loads(raw) if raw and "json" in response.headers.get("Content-Type", "") else raw
            return Answer(response.status, body, response.headers)

    async def challenge(self, **more: Any) -> str:
        new = {"name": "demo", "github_repo": "owner/name", "github_commit": "a" * 40, **more}
        answer = await self.admin("POST", "/challenges", new)
        assert answer.status == 201, answer.body
        return str(answer.body["id"])

    async def upload(self, challenge_id: str, data: bytes = b"tar", by: Keypair | None = None) -> Answer:
        return await self.signed(
            "POST",
            f"/challenges/{challenge_id}/submissions",
            data,
            by=by or self.miner,
            role="miner",
            change={"instance": ""},
            extra={"X-Filename": "a.tar", "Content-Type": "application/octet-stream"},
        )

    async def claim(self, job_id: str, claim_id: str = "c1", by: Keypair | None = None) -> Answer:
        return await self.signed("POST", f"/jobs/{job_id}/claim", {"claim_id": claim_id}, by=by)


def result(claim: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A result body for a claim."""
    return {
        "lease_token": claim["lease"]["token"],
        "attempt": claim["attempt"],
        "outcome": "succeeded",
        "score": 0.5,
        "metrics": {"accuracy": 0.5},
        "logs": ["hello"],
        "execution_time_ms": 10,
        "error": None,
        "resource_usage": {"cpu_time_ms": 1, "memory_peak_bytes": 2, "disk_bytes": 3, "network_bytes": 4},
        "github_commit": "a" * 40,
        "compose_hash": "b" * 64,
        "isolation_level": "Container",
        "attestation": "simulated",
        "receipt": None,
    } | more
