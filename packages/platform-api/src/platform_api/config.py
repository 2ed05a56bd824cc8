"""Settings of the Platform API: environment `PLATFORM_API_*`, or the same as flags."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from platform_protocol.signing import BadUrl, audience_of


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _seconds(value: object) -> object:
    return value.removesuffix("s") if isinstance(value, str) else value


class ApiSettings(BaseSettings):
    """`public_url` is what validators sign for; `audiences` replaces the list of accepted ones."""

    model_config = SettingsConfigDict(env_prefix="PLATFORM_API_", extra="ignore")

    database_url: str = "sqlite+aiosqlite:///./platform-api.db"
    listen: str = "127.0.0.1:8080"
    public_url: str | None = None
    audiences: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(default_factory=list)
    lease_term: Annotated[float, BeforeValidator(_seconds), Field(ge=1, le=86_400)] = 120.0

    @field_validator("database_url")
    @classmethod
    def _driver(cls, value: str) -> str:
        for plain, driver in (
            ("sqlite://", "sqlite+aiosqlite://"),
            ("postgresql://", "postgresql+asyncpg://"),
        ):
            if value.startswith(plain):
                return driver + value.removeprefix(plain)
        if not value.startswith(("sqlite+aiosqlite://", "postgresql+asyncpg://")):
            raise ValueError("expected sqlite:///path or postgresql://…")
        return value

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - TCP's ports
            raise ValueError("expected HOST:PORT")
        return value

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                audience_of(value)
            except BadUrl as error:
                raise ValueError(str(error)) from error
        return value

    @property
    def accepted_audiences(self) -> list[str]:
        """Whom requests may be signed for: the list, else the public URL and loopback."""
        if self.audiences:
            return [audience_of(url) for url in self.audiences]
        port = self.listen.rpartition(":")[2]
        local = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
        return [audience_of(url) for url in ([self.public_url] if self.public_url else []) + local]
