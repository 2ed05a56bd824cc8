"""Who is calling: validators and miners by signature, administrators by token."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from platform_api.database import Database, now_ms
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
    scheme: str


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
        async with self._database.read() as connection:
            status = await connection.scalar(
                sa.select(validators.c.status).where(validators.c.hotkey == signed.hotkey)
            )
        if status is None:
            command = f"platform-api admin validators add {signed.hotkey}"
            raise ApiError(
                403, "not_registered", f"this hotkey is not registered; an administrator runs: {command}"
            )
        if status != "active":
            raise ApiError(403, "banned", "this hotkey is banned")
        return signed

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
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, "missing_token", "expected Authorization: Bearer <administrator's token>")
        async with self._database.read() as connection:
            name = await connection.scalar(
                sa.select(admin_tokens.c.name).where(admin_tokens.c.sha256 == hash_token(token.strip()))
            )
        if name is None:
            raise ApiError(401, "bad_token", "no administrator has this token")
        return str(name)

    async def _signed(self, request: Request, role: Literal["validator", "miner"]) -> Signed:
        hotkey = _header(request, f"x-{role}-hotkey")
        timestamp, nonce = _header(request, "x-timestamp"), _header(request, "x-nonce")
        signature = _header(request, "x-signature")
        instance = _header(request, "x-validator-instance") if role == "validator" else ""
        for name, value, form in (
            ("X-Timestamp", timestamp, _TIMESTAMP),
            ("X-Nonce", nonce, _NONCE),
            ("X-Signature", signature, _SIGNATURE),
        ):
            _require_form(name, value, form)
        if role == "validator":
            _require_form("X-Validator-Instance", instance, _UUID)
        try:
            ss58.decode(hotkey)
        except ss58.BadAddress as error:
            raise ApiError(401, "bad_header", str(error)) from error
        held = [one for one in self._audiences if self._holds(request, hotkey, signature, one, instance)]
        if not held:
            self._explain(request, hotkey, signature, instance)
        skew = int(timestamp) - now_ms()
        if abs(skew) > SKEW_MS:
            raise ApiError(
                401,
                "clock_skew",
                f"X-Timestamp is {skew / 1000:.1f} s off, at most {SKEW_MS // 1000} s are accepted",
                server_time=now_ms(),
            )
        await self._spend(hotkey, nonce)
        return Signed(hotkey, instance)

    def _holds(self, request: Request, hotkey: str, signature: str, audience: str, instance: str) -> bool:
        payload = signing_payload(
            method=request.method,
            path=request.path,
            body=request.body,
            timestamp_ms=int(request.headers["x-timestamp"]),
            nonce=request.headers["x-nonce"],
            audience=audience,
            instance=instance,
        )
        return verify(hotkey, payload, bytes.fromhex(signature))

    def _explain(self, request: Request, hotkey: str, signature: str, instance: str) -> None:
        """The signature held for none of our audiences: perhaps it is for the address that was dialled."""
        host = request.headers.get("host", "")
        for scheme in ("http", "https"):
            try:
                dialled = audience_of(f"{scheme}://{host}")
            except BadUrl:
                continue
            if self._holds(request, hotkey, signature, dialled, instance):
                raise ApiError(
                    401,
                    "wrong_audience",
                    f"the request is signed for {dialled}; set PLATFORM_API_AUDIENCES, or dial another URL",
                    audiences=self._audiences,
                )
        raise ApiError(401, "bad_signature", "the signature does not hold for this request and hotkey")

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


def _header(request: Request, name: str) -> str:
    value = request.headers.get(name)
    if not value:
        raise ApiError(401, "missing_header", f"expected the header {name}")
    return value


def _require_form(name: str, value: str, form: re.Pattern[str]) -> None:
    if not form.fullmatch(value):
        raise ApiError(401, "bad_header", f"{name}: expected {form.pattern}, got {value[:80]!r}")
