"""Settings of the Platform API: environment `PLATFORM_API_*`, or the same as flags."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from platform_protocol.signing import BadUrl, audience_of

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|m|h|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_EXPECTED_URL = "expected sqlite:///path or postgresql://user@host/database"
_MAX_PORT = 65535
_LONGEST_LEASE = timedelta(days=1)


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    found = _DURATION.fullmatch(str(value).strip())
    if found is None:
        raise ValueError("expected a duration such as 120s, 2min or 1h")
    return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])


def _lease(value: timedelta) -> timedelta:
    if not timedelta(seconds=1) <= value <= _LONGEST_LEASE:
        raise ValueError("expected a duration from 1s to 24h")
    return value


def _audience(value: str) -> str:
    try:
        return audience_of(value)
    except BadUrl as error:
        raise ValueError("expected http(s)://host[:port]") from error


class ApiSettings(BaseSettings):
    """`public_url` is what validators sign for; `audiences` replaces the list of accepted ones."""

    model_config = SettingsConfigDict(env_prefix="PLATFORM_API_", extra="ignore")

    database_url: str = "sqlite+aiosqlite:///./platform-api.db"
    listen: str = "127.0.0.1:8080"
    public_url: Annotated[str, AfterValidator(_audience)] | None = None
    audiences: Annotated[
        list[Annotated[str, AfterValidator(_audience)]], NoDecode, BeforeValidator(_split)
    ] = Field(default_factory=list)
    lease_term: Annotated[timedelta, BeforeValidator(_duration), AfterValidator(_lease)] = timedelta(
        seconds=120
    )

    @field_validator("database_url")
    @classmethod
    def _driver(cls, value: str) -> str:
        try:
            url = make_url(value)
        except (ArgumentError, ValueError) as error:
            raise ValueError(_EXPECTED_URL) from error
        name = _DRIVERS.get(url.drivername, url.drivername)
        if name not in _DRIVERS.values() or (name.startswith("sqlite") and not url.database):
            raise ValueError(_EXPECTED_URL)
        return url.set(drivername=name).render_as_string(hide_password=False)

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > _MAX_PORT:
            raise ValueError("expected HOST:PORT")
        return value

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on; an IPv6 host without its brackets."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def accepted_audiences(self) -> list[str]:
        """Whom requests may be signed for: the list, else the public URL and loopback."""
        if self.audiences:
            return self.audiences
        port = self.address[1]
        local = [audience_of(f"http://127.0.0.1:{port}"), audience_of(f"http://localhost:{port}")]
        return list(dict.fromkeys([*([self.public_url] if self.public_url else []), *local]))
