"""Registered validators."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from platform_api.clock import now_ms, show_times
from platform_api.errors import ApiError
from platform_api.push import record_change
from platform_api.tables import validators
from platform_protocol import ss58


class NewValidator(BaseModel):
    """`POST /validators`: register a hotkey, ban it, or readmit it."""

    model_config = ConfigDict(extra="forbid")

    hotkey: str
    status: Annotated[str, Field(pattern=r"^(active|banned)$")] = "active"


async def set_validator(connection: AsyncConnection, hotkey: str, status: str) -> None:
    """Register, ban or readmit; a banned one's connection is closed.

    Raises:
        ApiError: 422 `bad_hotkey`.
    """
    try:
        ss58.decode(hotkey)
    except ss58.BadAddress as error:
        raise ApiError(422, "bad_hotkey", str(error)) from error
    changed = await connection.execute(
        sa.update(validators).where(validators.c.hotkey == hotkey).values(status=status)
    )
    if not changed.rowcount:
        row = {"hotkey": hotkey, "status": status, "added_at": now_ms()}
        await connection.execute(sa.insert(validators).values(**row))
    if status != "active":
        await record_change(connection, "revoked", hotkey)


async def list_validators(connection: AsyncConnection) -> list[dict[str, Any]]:
    """Every registered validator, oldest first."""
    query = sa.select(validators).order_by(validators.c.added_at, validators.c.hotkey)
    return [show_times(dict(row)) for row in (await connection.execute(query)).mappings()]
