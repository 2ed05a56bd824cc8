"""What every route uses, and who may call it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request
from starlette.requests import HTTPConnection

from platform_api.auth import Authenticator, Role, Signed
from platform_api.auth import Request as SignedRequest
from platform_api.bodies import read_body
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.push import Push
from platform_api.queue import Queue
from platform_api.telemetry import Metrics

UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running API."""

    database: Database
    queue: Queue
    push: Push
    auth: Authenticator
    metrics: Metrics


def services_of(request: Request) -> Services:
    """The application's services."""
    found: Services = request.app.state.services
    return found


def signed_form(connection: HTTPConnection, method: str, body: bytes) -> SignedRequest:
    """What a client signed: the path and query are the bytes that it sent."""
    raw: bytes = connection.scope.get("raw_path") or connection.scope["path"].encode()
    query: bytes = connection.scope["query_string"]
    return SignedRequest(
        method=method,
        path=(raw + b"?" + query if query else raw).decode("latin-1"),
        body=body,
        headers={name.lower(): value for name, value in connection.headers.items()},
    )


async def signed_validator(request: Request) -> Signed:
    """The validator that signed this request."""
    return await _signed(request, "validator")


async def signed_miner(request: Request) -> Signed:
    """The miner that signed this request."""
    return await _signed(request, "miner")


async def administrator(request: Request) -> str:
    """The administrator whose token came."""
    return await services_of(request).auth.administrator(request.headers.get("authorization"))


async def anyone(request: Request) -> str | None:
    """A miner's or validator's hotkey, or None for an administrator.

    Raises:
        ApiError: 401 or 403, as for the one that the headers speak of.
    """
    if "authorization" in request.headers:
        await administrator(request)
        return None
    role: Role = "miner" if "x-miner-hotkey" in request.headers else "validator"
    return (await _signed(request, role)).hotkey


def require_owner(caller: str | None, *owners: str | None) -> None:
    """Let owners and administrators pass.

    Raises:
        ApiError: 403 `not_owner`.
    """
    if caller is not None and caller not in owners:
        raise ApiError(403, "not_owner", "only its owner or an administrator may do this")


def _known_form(kind: str, value: str) -> str:
    """An id of the path; one that is no UUID is simply unknown."""
    if not UUID_FORM.fullmatch(value):
        raise ApiError(404, f"unknown_{kind}", f"no {kind} {value[:64]!r}")
    return value


async def _job_id(job_id: Annotated[str, Path()]) -> str:
    return _known_form("job", job_id)


async def _challenge_id(challenge_id: Annotated[str, Path()]) -> str:
    return _known_form("challenge", challenge_id)


async def _submission_id(submission_id: Annotated[str, Path()]) -> str:
    return _known_form("submission", submission_id)


async def _signed(request: Request, role: Role) -> Signed:
    auth = services_of(request).auth
    auth.check_form({name.lower(): value for name, value in request.headers.items()}, role)
    form = signed_form(request, request.method, await read_body(request))
    return await (auth.miner(form) if role == "miner" else auth.validator(form))


Api = Annotated[Services, Depends(services_of)]
Validator = Annotated[Signed, Depends(signed_validator)]
Miner = Annotated[Signed, Depends(signed_miner)]
Admin = Annotated[str, Depends(administrator)]
Anyone = Annotated[str | None, Depends(anyone)]
JobPath = Annotated[str, Depends(_job_id)]
ChallengePath = Annotated[str, Depends(_challenge_id)]
SubmissionPath = Annotated[str, Depends(_submission_id)]
