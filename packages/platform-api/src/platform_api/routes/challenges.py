"""Challenges: the active list for validators, boards for the public, changes by administrators."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response

from platform_api import scores
from platform_api.bodies import json_body
from platform_api.challenges import (
    ChallengeChange,
    NewChallenge,
    active_view,
    add_challenge,
    change_challenge,
    get_challenge,
    list_challenges,
    remove_challenge,
)
from platform_api.clock import show_times
from platform_api.openapi import accepts
from platform_api.services import Admin, Api, ChallengePath, Validator
from platform_protocol.platform_messages import ActiveChallenges

router = APIRouter(prefix="/challenges", tags=["challenges"])
_EPOCH = datetime.fromtimestamp(0, UTC)


@router.get("/active", response_model=ActiveChallenges, openapi_extra={"security": [{"validator": []}]})
async def active_challenges(
    api: Api, _: Validator, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """The active challenges, with an ETag; 304 while nothing has changed."""
    async with api.database.read() as connection:
        rows = await list_challenges(connection, active_only=True)
    body = json.dumps({"challenges": [active_view(row) for row in rows]}, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    held = [one.strip().removeprefix("W/") for one in (if_none_match or "").split(",")]
    if tag in held or "*" in held:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, media_type="application/json", headers={"ETag": tag})


@router.get("/{challenge_id}/leaderboard")
async def leaderboard(api: Api, challenge_id: ChallengePath) -> dict[str, Any]:
    """Each miner's best job by raw score, public."""
    async with api.database.read() as connection:
        challenge = await get_challenge(connection, challenge_id)
        board = await scores.leaderboard(connection, challenge_id)
    return {"challenge": challenge["name"], "leaderboard": board}


@router.get("/{challenge_id}/results")
async def results(
    api: Api,
    challenge_id: ChallengePath,
    since: Annotated[datetime, Query(description="RFC 3339; without an offset, UTC")] = _EPOCH,
) -> dict[str, Any]:
    """Results that finished at `since` or later, oldest first, at most 1,000, public, without logs."""
    moment = since if since.tzinfo else since.replace(tzinfo=UTC)
    milliseconds = (moment - _EPOCH).days * 86_400_000 + (moment - _EPOCH).seconds * 1000
    milliseconds += (moment - _EPOCH).microseconds // 1000
    async with api.database.read() as connection:
        await get_challenge(connection, challenge_id)
        return {"results": await scores.results(connection, challenge_id, milliseconds)}


@router.get("/{challenge_id}/weights")
async def weights(api: Api, challenge_id: ChallengePath) -> dict[str, Any]:
    """Each miner's share of the best raw scores, public."""
    async with api.database.read() as connection:
        await get_challenge(connection, challenge_id)
        return {"weights": await scores.weights(connection, challenge_id)}


@router.get("", openapi_extra={"security": [{"administrator": []}]})
async def every_challenge(api: Api, _: Admin) -> dict[str, Any]:
    """Every challenge, removed ones too."""
    async with api.database.read() as connection:
        rows = await list_challenges(connection, active_only=False)
    return {"challenges": [show_times(row) for row in rows]}


@router.post("", status_code=201, openapi_extra=accepts(NewChallenge) | {"security": [{"administrator": []}]})
async def new_challenge(
    api: Api, _: Admin, new: Annotated[NewChallenge, Depends(json_body(NewChallenge))]
) -> dict[str, Any]:
    """Add a challenge; connected validators are told."""
    async with api.database.write() as connection:
        made = await add_challenge(connection, new)
    api.push.wake()
    return show_times(made)


@router.patch(
    "/{challenge_id}", openapi_extra=accepts(ChallengeChange) | {"security": [{"administrator": []}]}
)
async def patch_challenge(
    api: Api,
    _: Admin,
    challenge_id: ChallengePath,
    change: Annotated[ChallengeChange, Depends(json_body(ChallengeChange))],
) -> dict[str, Any]:
    """Change a challenge; connected validators are told."""
    async with api.database.write() as connection:
        changed = await change_challenge(connection, challenge_id, change)
    api.push.wake()
    return show_times(changed)


@router.delete("/{challenge_id}", status_code=204, openapi_extra={"security": [{"administrator": []}]})
async def delete_challenge(api: Api, _: Admin, challenge_id: ChallengePath) -> None:
    """Take a challenge off the list; its results stay."""
    async with api.database.write() as connection:
        await remove_challenge(connection, challenge_id)
    api.push.wake()
