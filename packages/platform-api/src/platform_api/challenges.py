"""Challenges: what is evaluated, from which commit, and which jobs a submission makes."""

from __future__ import annotations

import re
import uuid
from typing import Annotated, Any, Self

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.bodies import i_json
from platform_api.clock import now_ms
from platform_api.errors import ApiError
from platform_api.push import record_change
from platform_api.tables import challenges
from platform_protocol.resources import Resources

_REPO = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+|(https?|ssh|file)://[!-~]+")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_WEEK_S = 7 * 24 * 3600
_NULLABLE = {"compose_hash"}


def _repository(value: str) -> str:
    if not _REPO.fullmatch(value):
        raise ValueError("expected owner/name, or an https, ssh or file URL")
    return value


def _full_commit(value: str) -> str:
    if not _COMMIT.fullmatch(value):
        raise ValueError("expected a commit of 40 or 64 hex digits, not a branch or tag")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("expected printable characters")
    return value


Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Repository = Annotated[str, Field(max_length=1024), AfterValidator(_repository)]
Commit = Annotated[str, AfterValidator(_full_commit)]
ComposeHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Mechanism = Annotated[int, Field(ge=0, le=2**31 - 1)]
Timeout = Annotated[int, Field(ge=1, le=_WEEK_S)]
Status = Annotated[str, Field(pattern=r"^(active|paused)$")]


class JobTemplate(BaseModel):
    """One job that every submission makes."""

    model_config = ConfigDict(extra="forbid")

    job_name: Name | None = None
    payload: Annotated[dict[str, Any], AfterValidator(i_json)] = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    timeout_s: Timeout | None = None


Templates = Annotated[list[JobTemplate], Field(min_length=1, max_length=100)]


class NewChallenge(BaseModel):
    """`POST /challenges`. `github_repo`: a URL, or `owner/name` on GitHub; the commit 40 or 64 hex digits."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    github_repo: Repository
    github_commit: Commit
    compose_hash: ComposeHash | None = None
    mechanism_id: Mechanism = 0
    emission_share: Share = 0.0
    resources: Resources = Resources(cpu_cores=1, memory_mb=512, disk_mb=1024)
    jobs: Templates = Field(default_factory=lambda: [JobTemplate()])
    timeout_s: Timeout = 3600
    status: Status = "active"


class ChallengeChange(BaseModel):
    """`PATCH /challenges/{id}`: what is given is changed. Only `compose_hash` may be null (not published)."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    github_repo: Repository | None = None
    github_commit: Commit | None = None
    compose_hash: ComposeHash | None = None
    mechanism_id: Mechanism | None = None
    emission_share: Share | None = None
    resources: Resources | None = None
    jobs: Templates | None = None
    timeout_s: Timeout | None = None
    status: Status | None = None

    @model_validator(mode="after")
    def _nothing_null(self) -> Self:
        null = [name for name in sorted(self.model_fields_set - _NULLABLE) if getattr(self, name) is None]
        if null:
            raise ValueError(f"expected a value, or nothing at all: {', '.join(null)}")
        return self


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
