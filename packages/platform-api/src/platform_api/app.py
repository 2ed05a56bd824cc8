"""The application: routes, problem details, metrics, and the loops beside them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any

import prometheus_client
import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException as StarletteHTTPException

from platform_api import scores
from platform_api.auth import Authenticator, Signed, hash_token
from platform_api.auth import Request as SignedRequest
from platform_api.bodies import read_body, read_json
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
from platform_api.config import ApiSettings
from platform_api.database import Database, now_ms
from platform_api.errors import ApiError
from platform_api.push import Push, record_change
from platform_api.queue import Queue, job_view
from platform_api.submissions import MAX_BYTES, add_job, add_submission, bundle_for, get_submission
from platform_api.tables import admin_tokens, jobs, validators
from platform_protocol import ss58
from platform_protocol.platform_messages import JobLogs, ReleaseRequest, RenewRequest

MAX_JSON = 256 * 1024
MAX_RESULT = 20 * 1024 * 1024
_UNAVAILABLE = 503

log = structlog.get_logger(__name__)
router = APIRouter()


@dataclass(frozen=True, slots=True)
class Services:
    """What every route uses."""

    database: Database
    queue: Queue
    push: Push
    auth: Authenticator
    registry: prometheus_client.CollectorRegistry
    answers: prometheus_client.Counter


class ClaimBody(BaseModel):
    """`POST /jobs/{id}/claim`; no body is accepted too."""

    model_config = ConfigDict(extra="ignore")

    claim_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class NewJob(BaseModel):
    """`POST /jobs`: a job without a miner's upload."""

    model_config = ConfigDict(extra="forbid")

    challenge_id: str
    job_name: Annotated[str, Field(max_length=64)] | None = None
    payload: dict[str, Any] = Field(default_factory=dict)
    priority: int = 0
    timeout_s: Annotated[int, Field(ge=1)] | None = None


class NewValidator(BaseModel):
    """`POST /validators`."""

    model_config = ConfigDict(extra="forbid")

    hotkey: str
    status: Annotated[str, Field(pattern=r"^(active|banned)$")] = "active"


class NewToken(BaseModel):
    """`POST /admin/tokens`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]


def services_of(request: Request) -> Services:
    """The application's services."""
    found: Services = request.app.state.services
    return found


async def signed_validator(request: Request) -> Signed:
    """The validator that signed this request."""
    return await services_of(request).auth.validator(await _signed_form(request, MAX_RESULT))


async def signed_miner(request: Request) -> Signed:
    """The miner that signed this request."""
    return await services_of(request).auth.miner(await _signed_form(request, MAX_BYTES))


async def administrator(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    """The administrator whose token came."""
    return await services_of(request).auth.administrator(authorization)


Api = Annotated[Services, Depends(services_of)]
Validator = Annotated[Signed, Depends(signed_validator)]
Miner = Annotated[Signed, Depends(signed_miner)]
Admin = Annotated[str, Depends(administrator)]


async def _signed_form(request: Request, most: int) -> SignedRequest:
    query = request.url.query
    raw = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
    return SignedRequest(
        method=request.method,
        path=f"{raw}?{query}" if query else raw,
        body=await read_body(request, most),
        headers={name.lower(): value for name, value in request.headers.items()},
        scheme=request.url.scheme,
    )


@router.get("/health")
async def health(api: Api) -> dict[str, str]:
    """Whether the API and its database answer."""
    async with api.database.read() as connection:
        await connection.execute(sa.text("SELECT 1"))
    return {"status": "ok"}


@router.get("/version")
async def api_version() -> dict[str, str]:
    """The API's version."""
    return {"version": version("platform-api")}


@router.get("/metrics")
async def metrics(api: Api) -> Response:
    """Prometheus metrics."""
    return Response(
        prometheus_client.generate_latest(api.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
    )


@router.get("/challenges/active")
async def active_challenges(
    api: Api, _: Validator, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """The active challenges, with an ETag."""
    async with api.database.read() as connection:
        rows = await list_challenges(connection, active_only=True)
    body = json.dumps({"challenges": [active_view(row) for row in rows]}, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if if_none_match == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, media_type="application/json", headers={"ETag": tag})


@router.get("/jobs/pending")
async def pending_jobs(
    api: Api,
    _: Validator,
    challenge_id: Annotated[list[str] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Claimable jobs, in the order in which to claim."""
    async with api.database.write() as connection:
        rows = await api.queue.pending(connection, challenge_id, limit)
    keys = (
        "id",
        "challenge_id",
        "submission_id",
        "miner_hotkey",
        "status",
        "priority",
        "resources",
        "timeout_s",
    )
    return {
        "jobs": [{key: row[key] for key in keys} | {"created_at": _time(row["created_at"])} for row in rows]
    }


@router.post("/jobs/{job_id}/claim")
async def claim_job(api: Api, signed: Validator, job_id: str, request: Request) -> dict[str, Any]:
    """Claim a job, or get the same lease again for the same claim id."""
    body = await read_json(request, ClaimBody, MAX_JSON, empty={})
    async with api.database.write() as connection:
        return await api.queue.claim(connection, job_id, signed.hotkey, body.claim_id)


@router.post("/jobs/{job_id}/renew")
async def renew_job(api: Api, _: Validator, job_id: str, request: Request) -> dict[str, float]:
    """Renew a lease."""
    body = await read_json(request, RenewRequest, MAX_JSON)
    async with api.database.write() as connection:
        return {"term_s": await api.queue.renew(connection, job_id, body.lease_token)}


@router.post("/jobs/{job_id}/release", status_code=204)
async def release_job(api: Api, _: Validator, job_id: str, request: Request) -> None:
    """Give a job back, with the reason."""
    body = await read_json(request, ReleaseRequest, MAX_JSON)
    async with api.database.write() as connection:
        if await api.queue.release(connection, job_id, body.lease_token, body.reason):
            job = await api.queue.job(connection, job_id)
            await record_change(connection, "new_job", job_id, job["challenge_id"])
    api.push.wake()


@router.post("/jobs/{job_id}/logs", status_code=204)
async def job_lines(api: Api, _: Validator, job_id: str, request: Request) -> None:
    """Keep log lines of a running job."""
    body = await read_json(request, JobLogs, MAX_RESULT)
    async with api.database.write() as connection:
        await api.queue.logs(connection, job_id, body.lease_token, body.seq, body.lines)


@router.post("/jobs/{job_id}/results", status_code=204)
async def job_result(api: Api, _: Validator, job_id: str, request: Request) -> None:
    """Accept a result."""
    value = await read_json(request, None, MAX_RESULT)
    async with api.database.write() as connection:
        await api.queue.result(connection, job_id, value)


@router.post("/jobs/{job_id}/cancel", status_code=202)
async def cancel_job(api: Api, _: Admin, job_id: str) -> dict[str, str]:
    """Cancel a job at once."""
    async with api.database.write() as connection:
        await api.queue.cancel(connection, job_id)
        await record_change(connection, "job_cancelled", job_id)
    api.push.wake()
    return {"id": job_id, "status": "cancelled"}


@router.get("/jobs")
async def all_jobs(
    api: Api, _: Admin, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> dict[str, Any]:
    """Jobs, newest first, for administrators."""
    async with api.database.read() as connection:
        query = sa.select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)
        rows = [dict(row) for row in (await connection.execute(query)).mappings()]
    return {"jobs": [job_view(row) for row in rows]}


@router.post("/jobs", status_code=201)
async def make_job(api: Api, _: Admin, new: NewJob) -> dict[str, str]:
    """Queue a job without a submission."""
    async with api.database.write() as connection:
        challenge = await get_challenge(connection, new.challenge_id)
        template = new.model_dump(exclude={"challenge_id"})
        made = await add_job(connection, challenge, template, submission_id=None, miner=None)
    api.push.wake()
    return {"id": made}


@router.get("/jobs/{job_id}")
async def one_job(
    api: Api, request: Request, job_id: str, authorization: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """A job, for its miner, the validator that holds it, or an administrator."""
    async with api.database.read() as connection:
        row = await api.queue.job(connection, job_id)
    await _owner(api, request, authorization, {row["miner_hotkey"], row["holder"]})
    return job_view(row)


@router.get("/jobs/{job_id}/receipt")
async def receipt(api: Api, job_id: str) -> dict[str, Any]:
    """A job's receipt, public."""
    async with api.database.read() as connection:
        row = await api.queue.job(connection, job_id)
    found = json.loads(row["result"]).get("receipt") if row["result"] else None
    if found is None:
        raise ApiError(404, "no_receipt", "this job has no receipt")
    return dict(found)


@router.get("/submissions/{submission_id}")
async def one_submission(
    api: Api, request: Request, submission_id: str, authorization: Annotated[str | None, Header()] = None
) -> dict[str, Any]:
    """A submission, for its miner or an administrator."""
    async with api.database.read() as connection:
        row = await get_submission(connection, submission_id)
    await _owner(api, request, authorization, {row["miner_hotkey"]})
    return {key: value for key, value in row.items() if key != "data"}


@router.get("/submissions/{submission_id}/bundle")
async def submission_bundle(api: Api, signed: Validator, submission_id: str) -> Response:
    """A submission's bytes, for the validator that holds the lease."""
    async with api.database.read() as connection:
        data = await bundle_for(connection, submission_id, signed.hotkey)
    return Response(data, media_type="application/octet-stream")


@router.post("/challenges/{challenge_id}/submissions", status_code=201)
async def upload(
    api: Api, signed: Miner, challenge_id: str, request: Request, x_filename: Annotated[str, Header()] = ""
) -> dict[str, Any]:
    """A miner's signed upload."""
    data = await read_body(request, MAX_BYTES)
    async with api.database.write() as connection:
        made = await add_submission(connection, challenge_id, signed.hotkey, x_filename, data)
    api.push.wake()
    return made


@router.get("/challenges/{challenge_id}/leaderboard")
async def leaderboard(api: Api, challenge_id: str) -> dict[str, Any]:
    """Each miner's best score, public."""
    async with api.database.read() as connection:
        challenge = await get_challenge(connection, challenge_id)
        return {
            "challenge": challenge["name"],
            "leaderboard": await scores.leaderboard(connection, challenge_id),
        }


@router.get("/challenges/{challenge_id}/results")
async def results(api: Api, challenge_id: str, since: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """Results from `since` (Unix ms) on, public, without logs."""
    async with api.database.read() as connection:
        await get_challenge(connection, challenge_id)
        return {"results": await scores.results(connection, challenge_id, since)}


@router.get("/challenges/{challenge_id}/weights")
async def weights(api: Api, challenge_id: str) -> dict[str, Any]:
    """Each miner's share, public."""
    async with api.database.read() as connection:
        await get_challenge(connection, challenge_id)
        return {"weights": await scores.weights(connection, challenge_id)}


@router.get("/challenges")
async def every_challenge(api: Api, _: Admin) -> dict[str, Any]:
    """Every challenge, for administrators."""
    async with api.database.read() as connection:
        return {"challenges": await list_challenges(connection, active_only=False)}


@router.post("/challenges", status_code=201)
async def new_challenge(api: Api, _: Admin, new: NewChallenge) -> dict[str, Any]:
    """Add a challenge."""
    async with api.database.write() as connection:
        made = await add_challenge(connection, new)
    api.push.wake()
    return made


@router.patch("/challenges/{challenge_id}")
async def patch_challenge(api: Api, _: Admin, challenge_id: str, change: ChallengeChange) -> dict[str, Any]:
    """Change a challenge."""
    async with api.database.write() as connection:
        changed = await change_challenge(connection, challenge_id, change)
    api.push.wake()
    return changed


@router.delete("/challenges/{challenge_id}", status_code=204)
async def delete_challenge(api: Api, _: Admin, challenge_id: str) -> None:
    """Take a challenge off the list."""
    async with api.database.write() as connection:
        await remove_challenge(connection, challenge_id)
    api.push.wake()


@router.get("/validators")
async def all_validators(api: Api, _: Admin) -> dict[str, Any]:
    """Every registered validator."""
    async with api.database.read() as connection:
        rows = await connection.execute(sa.select(validators).order_by(validators.c.added_at))
        return {"validators": [dict(row) for row in rows.mappings()]}


@router.post("/validators", status_code=201)
async def register(api: Api, _: Admin, new: NewValidator) -> dict[str, str]:
    """Register a validator, or change its status."""
    async with api.database.write() as connection:
        await set_validator(connection, new.hotkey, new.status)
    api.push.wake()
    return {"hotkey": new.hotkey, "status": new.status}


@router.post("/admin/tokens", status_code=201)
async def new_token(api: Api, _: Admin, new: NewToken) -> dict[str, str]:
    """Make another administrator's token; shown once."""
    async with api.database.write() as connection:
        return {"name": new.name, "token": await make_token(connection, new.name)}


@router.websocket("/validators/{hotkey}/ws")
async def notifications(socket: WebSocket, hotkey: str) -> None:
    """Push notifications; the upgrade is signed like a GET."""
    api: Services = socket.app.state.services
    query = socket.url.query
    raw = socket.scope.get("raw_path", socket.url.path.encode()).decode("latin-1")
    form = SignedRequest(
        method="GET",
        path=f"{raw}?{query}" if query else raw,
        body=b"",
        headers={name.lower(): value for name, value in socket.headers.items()},
        scheme=socket.url.scheme,
    )
    try:
        signed = await api.auth.validator(form)
        if signed.hotkey != hotkey:
            raise ApiError(403, "hotkey_mismatch", "the path's hotkey is not the header's")
    except ApiError as error:
        await socket.send_denial_response(problem(error))
        return
    await socket.accept()
    await api.push.serve(socket, signed)


async def set_validator(connection: Any, hotkey: str, status: str) -> None:
    """Register, ban or readmit.

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
        await connection.execute(
            sa.insert(validators).values(hotkey=hotkey, status=status, added_at=now_ms())
        )
    if status != "active":
        await record_change(connection, "revoked", hotkey)


async def make_token(connection: Any, name: str) -> str:
    """A new administrator's token; only its hash is kept."""
    token = f"pat_{secrets.token_urlsafe(32)}"
    await connection.execute(
        sa.insert(admin_tokens).values(sha256=hash_token(token), name=name, created_at=now_ms())
    )
    return token


def problem(error: ApiError) -> JSONResponse:
    """An RFC 9457 answer."""
    body = {
        "type": "about:blank",
        "title": error.code.replace("_", " "),
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        **error.extra,
    }
    headers = {"Retry-After": "1"} if error.status == _UNAVAILABLE else {}
    return JSONResponse(
        body, status_code=error.status, media_type="application/problem+json", headers=headers
    )


def make_app(settings: ApiSettings) -> FastAPI:
    """The application; its database is opened at start-up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = await Database.open(settings.database_url)
        queue, push = Queue(int(settings.lease_term * 1000)), Push(database)
        registry = prometheus_client.CollectorRegistry()
        answers = prometheus_client.Counter(
            "platform_api_answers", "Answers by status and code", ["status", "code"], registry=registry
        )
        prometheus_client.Gauge(
            "platform_api_validators_connected", "Open notification WebSockets", registry=registry
        ).set_function(lambda: push.connected)
        auth = Authenticator(database, settings.accepted_audiences)
        app.state.services = Services(database, queue, push, auth, registry, answers)
        async with database.write() as connection:
            extended = await queue.extend_all(connection)
        log.info("api_started", leases_extended=extended, audiences=settings.accepted_audiences)
        try:
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(push.run())
                yield
                following.cancel()
        finally:
            await database.close()

    app = FastAPI(title="Platform API", version=version("platform-api"), lifespan=lifespan, docs_url="/docs")
    app.include_router(router)
    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        services_of(request).answers.labels(str(error.status), error.code).inc()
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:10])
        return await refused(request, ApiError(422, "invalid_request", faults))

    @app.exception_handler(StarletteHTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        return await refused(
            request,
            ApiError(error.status_code, codes.get(error.status_code, "http_error"), str(error.detail)),
        )

    @app.exception_handler(SQLAlchemyError)
    async def unavailable(request: Request, error: SQLAlchemyError) -> JSONResponse:
        log.error("database_unavailable", reason=str(error)[:500])
        return await refused(
            request, ApiError(_UNAVAILABLE, "database_unavailable", "the database does not answer")
        )


async def _owner(api: Services, request: Request, authorization: str | None, owners: set[str | None]) -> None:
    """A miner or validator among the owners, or an administrator."""
    if authorization:
        await api.auth.administrator(authorization)
        return
    form = await _signed_form(request, MAX_JSON)
    if "x-miner-hotkey" in form.headers:
        signed = await api.auth.miner(form)
    else:
        signed = await api.auth.validator(form)
    if signed.hotkey not in owners:
        raise ApiError(403, "not_owner", "only its owner or an administrator may read this")


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat().replace("+00:00", "Z")
