"""Submissions: miners' uploads, and their bytes for the validator that evaluates them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from platform_api.bodies import read_body
from platform_api.clock import show_times
from platform_api.services import Anyone, Api, ChallengePath, Miner, SubmissionPath, Validator, require_owner
from platform_api.submissions import add_submission, bundle_for, get_submission

router = APIRouter(tags=["submissions"])
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.post(
    "/challenges/{challenge_id}/submissions",
    status_code=201,
    openapi_extra={"security": [{"miner": []}], "requestBody": {"required": True, "content": _BYTES}},
)
async def upload(
    api: Api,
    signed: Miner,
    challenge_id: ChallengePath,
    request: Request,
    x_filename: Annotated[str, Header()] = "",
) -> dict[str, Any]:
    """A miner's upload: a tar, tar.gz or single file, stored as is; one job per entry of the challenge."""
    data = await read_body(request)
    async with api.database.write() as connection:
        made = await add_submission(connection, challenge_id, signed.hotkey, x_filename, data)
    api.push.wake()
    return made


@router.get(
    "/submissions/{submission_id}",
    openapi_extra={"security": [{"miner": []}, {"validator": []}, {"administrator": []}]},
)
async def one_submission(api: Api, caller: Anyone, submission_id: SubmissionPath) -> dict[str, Any]:
    """A submission, for its miner or an administrator."""
    async with api.database.read() as connection:
        row = await get_submission(connection, submission_id)
    require_owner(caller, row["miner_hotkey"])
    return show_times(row)


@router.get(
    "/submissions/{submission_id}/bundle",
    response_class=Response,
    responses={200: {"content": _BYTES}},
    openapi_extra={"security": [{"validator": []}]},
)
async def submission_bundle(api: Api, signed: Validator, submission_id: SubmissionPath) -> Response:
    """A submission's bytes, for the validator that holds the lease."""
    async with api.database.read() as connection:
        data = await bundle_for(connection, submission_id, signed.hotkey)
    return Response(data, media_type="application/octet-stream")
