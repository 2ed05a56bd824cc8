"""Who is calling: validators and miners by signature, administrators by token."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.bodies import LARGE
from platform_api.clock import now_ms, rfc3339
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.tables import admin_tokens, nonces, validators
from platform_protocol import ss58
from platform_protocol.signing import BadUrl, audience_of, signing_payload, verify

SKEW_MS = 120_000
NONCE_MS = 300_000
_NONCE = re.compile(r"[0-9a-f]{32}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIMESTAMP = re.compile(r"[0-9]{1,16}")
Role = Literal["validator", "miner"]


@dataclass(frozen=True, slots=True)
class Signed:
    """A caller whose signature held."""

    hotkey: str
    instance: str


@dataclass(frozen=True, slots=True)
class Request:
    """What was signed: method, full path with query as sent, body's bytes, headers (lower-case names)."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]


class Authenticator:
    """Checks signatures, nonces and tokens against the database."""

    def __init__(self, database: Database, audiences: list[str]) -> None:
        self._database = database
        self._audiences = audiences

    async def validator(self, request: Request) -> Signed:
        """A registered validator.

        Raises:
            ApiError: 401 with `missing_header`, `bad_header`, `bad_signature`, `wrong_audience`,
                `clock_skew` or `nonce_reused`; 403 `not_registered` or `banned`.
        """
        signed = await self._signed(request, "validator")
        await self.registered(signed.hotkey)
        return signed

    async def registered(self, hotkey: str) -> None:
        """Check a validator's registration.

        Raises:
            ApiError: 403 `not_registered` or `banned`.
        """
        async with self._database.read() as connection:
            status = await connection.scalar(
                sa.select(validators.c.status).where(validators.c.hotkey == hotkey)
            )
        if status is None:
            command = f"platform-api admin validators add {hotkey}"
            raise ApiError(
                403, "not_registered", f"this hotkey is not registered; an administrator runs: {command}"
            )
        if status != "active":
            raise ApiError(403, "banned", "this hotkey is banned")

    async def miner(self, request: Request) -> Signed:
        """A miner: any key that signed.

        Raises:
            ApiError: 401, as for a validator.
        """
        return await self._signed(request, "miner")

    async def administrator(self, authorization: str | None) -> str:
        """An administrator's token; returns its name.

        Raises:
            ApiError: 401 `missing_token` or `bad_token`.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise ApiError(401, "missing_token", "expected Authorization: Bearer <administrator's token>")
        async with self._database.read() as connection:
            name = await connection.scalar(
                sa.select(admin_tokens.c.name).where(admin_tokens.c.sha256 == hash_token(token.strip()))
            )
        if name is None:
            raise ApiError(401, "bad_token", "no administrator has this token")
        return str(name)

    def check_form(self, headers: Mapping[str, str], role: Role) -> None:
        """Whether a request could be a signed one; cheap, so that it comes before the body is read.

        Raises:
            ApiError: 401 `missing_header` or `bad_header`.
        """
        hotkey = _header(headers, f"x-{role}-hotkey")
        forms = {"x-timestamp": _TIMESTAMP, "x-nonce": _NONCE, "x-signature": _SIGNATURE}
        if role == "validator":
            forms["x-validator-instance"] = _UUID
        values = {name: _header(headers, name) for name in forms}
        for name, form in forms.items():
            if not form.fullmatch(values[name]):
                raise ApiError(
                    401, "bad_header", f"{name}: expected {form.pattern}, got {values[name][:80]!r}"
                )
        try:
            ss58.decode(hotkey)
        except ss58.BadAddress as error:
            raise ApiError(401, "bad_header", f"x-{role}-hotkey: {error}") from error

    async def _signed(self, request: Request, role: Role) -> Signed:
        self.check_form(request.headers, role)
        signed = Signed(
            request.headers[f"x-{role}-hotkey"],
            request.headers["x-validator-instance"] if role == "validator" else "",
        )
        if len(request.body) > LARGE:
            await asyncio.to_thread(self._check_signature, request, signed)
        else:
            self._check_signature(request, signed)
        now = now_ms()
        skew = int(request.headers["x-timestamp"]) - now
        if abs(skew) > SKEW_MS:
            raise ApiError(
                401,
                "clock_skew",
                f"X-Timestamp is {skew / 1000:.1f} s off, at most {SKEW_MS // 1000} s are accepted",
                server_time=rfc3339(now),
            )
        await self._spend(signed.hotkey, request.headers["x-nonce"])
        return signed

    def _check_signature(self, request: Request, signed: Signed) -> None:
        if any(self._holds(request, signed, audience) for audience in self._audiences):
            return
        # The signature holds for none of our audiences: perhaps it is for the address that was dialled.
        host = request.headers.get("host", "")
        for scheme in ("http", "https"):
            try:
                dialled = audience_of(f"{scheme}://{host}")
            except BadUrl:
                continue
            if self._holds(request, signed, dialled):
                raise ApiError(
                    401,
                    "wrong_audience",
                    f"the request is signed for {dialled}; set PLATFORM_API_AUDIENCES, or dial another URL",
                    audiences=self._audiences,
                )
        raise ApiError(401, "bad_signature", "the signature does not hold for this request and hotkey")

    def _holds(self, request: Request, signed: Signed, audience: str) -> bool:
        payload = signing_payload(
            method=request.method,
            path=request.path,
            body=request.body,
            timestamp_ms=int(request.headers["x-timestamp"]),
            nonce=request.headers["x-nonce"],
            audience=audience,
            instance=signed.instance,
        )
        return verify(signed.hotkey, payload, bytes.fromhex(request.headers["x-signature"]))

    async def _spend(self, hotkey: str, nonce: str) -> None:
        now = now_ms()
        try:
            async with self._database.write() as connection:
                await connection.execute(sa.delete(nonces).where(nonces.c.expires_at <= now))
                await connection.execute(
                    sa.insert(nonces).values(hotkey=hotkey, nonce=nonce, expires_at=now + NONCE_MS)
                )
        except IntegrityError as error:
            raise ApiError(401, "nonce_reused", "this nonce was used before: sign every try anew") from error


def hash_token(token: str) -> str:
    """How a token is kept."""
    return hashlib.sha256(token.encode()).hexdigest()


async def make_token(connection: AsyncConnection, name: str) -> str:
    """A new administrator's token; only its hash is kept."""
    token = f"pat_{secrets.token_urlsafe(32)}"
    row = {"sha256": hash_token(token), "name": name, "created_at": now_ms()}
    await connection.execute(sa.insert(admin_tokens).values(**row))
    return token


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise ApiError(401, "missing_header", f"expected the header {name}")
    return value
