"""Challenges: what is evaluated, from which commit, and which jobs a submission makes."""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.database import now_ms
from platform_api.errors import ApiError
from platform_api.push import record_change
from platform_api.tables import challenges
from platform_protocol.resources import Resources

_REPO = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|(https?|ssh|file)://\S+")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class JobTemplate(BaseModel):
    """One job that every submission makes."""

    model_config = ConfigDict(extra="forbid")

    job_name: Annotated[str, Field(max_length=64)] | None = None
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    timeout_s: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] | None = None


class NewChallenge(BaseModel):
    """`POST /challenges`. `github_repo`: a URL, or `owner/name` on GitHub; the commit 40 or 64 hex digits."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    github_repo: Annotated[str, Field(max_length=1024)]
    github_commit: str
    compose_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    mechanism_id: int = 0
    emission_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    resources: Resources = Resources(cpu_cores=1, memory_mb=512, disk_mb=1024)
    jobs: list[JobTemplate] = Field(default_factory=lambda: [JobTemplate()], min_length=1, max_length=100)
    timeout_s: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 3600
    status: Annotated[str, Field(pattern=r"^(active|paused)$")] = "active"

    @field_validator("github_repo")
    @classmethod
    def _repo(cls, value: str) -> str:
        if not _REPO.fullmatch(value):
            raise ValueError("expected owner/name, or an https, ssh or file URL")
        return value

    @field_validator("github_commit")
    @classmethod
    def _commit(cls, value: str) -> str:
        if not _COMMIT.fullmatch(value):
            raise ValueError("expected a commit of 40 or 64 hex digits, not a branch or tag")
        return value


class ChallengeChange(BaseModel):
    """`PATCH /challenges/{id}`: what is given is changed."""

    model_config = ConfigDict(extra="forbid")

    github_repo: str | None = None
    github_commit: Annotated[str, Field(pattern=_COMMIT.pattern)] | None = None
    compose_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    emission_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    resources: Resources | None = None
    jobs: list[JobTemplate] | None = None
    timeout_s: Annotated[int, Field(ge=1)] | None = None
    status: Annotated[str, Field(pattern=r"^(active|paused)$")] | None = None


async def add_challenge(connection: AsyncConnection, new: NewChallenge) -> dict[str, Any]:
    """Add one; validators are told."""
    identity, now = str(uuid.uuid4()), now_ms()
    row = new.model_dump(mode="json") | {"id": identity, "created_at": now, "updated_at": now}
    await connection.execute(sa.insert(challenges).values(**row))
    await record_change(connection, "challenge_updated", identity, new.github_commit)
    return row


async def change_challenge(
    connection: AsyncConnection, identity: str, change: ChallengeChange
) -> dict[str, Any]:
    """Change one; validators are told.

    Raises:
        ApiError: 404 `unknown_challenge`.
    """
    given = change.model_dump(mode="json", exclude_unset=True)
    await connection.execute(
        sa.update(challenges).where(challenges.c.id == identity).values(**given, updated_at=now_ms())
    )
    row = await get_challenge(connection, identity)
    await record_change(connection, "challenge_updated", identity, row["github_commit"])
    return row


async def remove_challenge(connection: AsyncConnection, identity: str) -> None:
    """Take one off the list; its results stay.

    Raises:
        ApiError: 404 `unknown_challenge`.
    """
    row = await get_challenge(connection, identity)
    await connection.execute(
        sa.update(challenges).where(challenges.c.id == identity).values(status="removed", updated_at=now_ms())
    )
    await record_change(connection, "challenge_updated", identity, row["github_commit"])


async def get_challenge(connection: AsyncConnection, identity: str) -> dict[str, Any]:
    """One challenge's row.

    Raises:
        ApiError: 404 `unknown_challenge`.
    """
    row = (
        (await connection.execute(sa.select(challenges).where(challenges.c.id == identity)))
        .mappings()
        .one_or_none()
    )
    if row is None:
        raise ApiError(404, "unknown_challenge", f"no challenge {identity[:64]}")
    return dict(row)


async def list_challenges(connection: AsyncConnection, *, active_only: bool) -> list[dict[str, Any]]:
    """Rows, oldest first."""
    query = sa.select(challenges).order_by(challenges.c.created_at, challenges.c.id)
    if active_only:
        query = query.where(challenges.c.status == "active")
    return [dict(row) for row in (await connection.execute(query)).mappings()]


def active_view(row: dict[str, Any]) -> dict[str, Any]:
    """A challenge as `/challenges/active` lists it."""
    keys = ("id", "name", "status", "github_repo", "github_commit", "compose_hash", "mechanism_id")
    return {key: row[key] for key in (*keys, "emission_share", "resources")}
