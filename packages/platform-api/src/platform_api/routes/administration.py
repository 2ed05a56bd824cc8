"""Administration: registered validators, administrators' tokens."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict

from platform_api.auth import make_token
from platform_api.bodies import json_body
from platform_api.challenges import Name
from platform_api.openapi import accepts
from platform_api.services import Admin, Api
from platform_api.validators import NewValidator, list_validators, set_validator

router = APIRouter(tags=["administration"])
_ADMIN: dict[str, Any] = {"security": [{"administrator": []}]}


class NewToken(BaseModel):
    """`POST /admin/tokens`."""

    model_config = ConfigDict(extra="forbid")

    name: Name


@router.get("/validators", openapi_extra=_ADMIN)
async def all_validators(api: Api, _: Admin) -> dict[str, Any]:
    """Every registered validator."""
    async with api.database.read() as connection:
        return {"validators": await list_validators(connection)}


@router.post("/validators", status_code=201, openapi_extra=accepts(NewValidator) | _ADMIN)
async def register(
    api: Api, _: Admin, new: Annotated[NewValidator, Depends(json_body(NewValidator))]
) -> dict[str, str]:
    """Register a validator, or change its status."""
    async with api.database.write() as connection:
        await set_validator(connection, new.hotkey, new.status)
    api.push.wake()
    return {"hotkey": new.hotkey, "status": new.status}


@router.post("/admin/tokens", status_code=201, openapi_extra=accepts(NewToken) | _ADMIN)
async def new_token(
    api: Api, _: Admin, new: Annotated[NewToken, Depends(json_body(NewToken))]
) -> dict[str, str]:
    """Make another administrator's token; shown once."""
    async with api.database.write() as connection:
        return {"name": new.name, "token": await make_token(connection, new.name)}
