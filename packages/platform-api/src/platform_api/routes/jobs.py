"""Jobs: the queue as validators work it, reading for owners, and administration."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from platform_api.bodies import LARGE, json_body, read_body, read_value
from platform_api.challenges import get_challenge
from platform_api.errors import ApiError
from platform_api.job_logs import MAX_SEQ, keep_lines, kept_lines
from platform_api.openapi import accepts
from platform_api.push import record_change
from platform_api.queue import job_view
from platform_api.results import AcceptedResult
from platform_api.services import UUID_FORM, Admin, Anyone, Api, JobPath, Validator, require_owner
from platform_api.submissions import NewJob, add_job
from platform_api.tables import jobs
from platform_protocol.platform_messages import (
    Claim,
    JobLogs,
    PendingJobs,
    ReleaseRequest,
    Renewal,
    RenewRequest,
    ResultBody,
)

router = APIRouter(prefix="/jobs", tags=["jobs"])
log = structlog.get_logger(__name__)
_MAX_ASKED = 1000
_VALIDATOR: dict[str, Any] = {"security": [{"validator": []}]}
_ADMIN: dict[str, Any] = {"security": [{"administrator": []}]}
_OWNER: dict[str, Any] = {"security": [{"miner": []}, {"validator": []}, {"administrator": []}]}


class ClaimBody(BaseModel):
    """`POST /jobs/{id}/claim`; no body is accepted too."""

    model_config = ConfigDict(extra="ignore")

    claim_id: Annotated[str, Field(pattern=r"^[!-~]{1,64}$")] | None = None


@router.get("/pending", response_model=PendingJobs, openapi_extra=_VALIDATOR)
async def pending_jobs(
    api: Api,
    signed: Validator,
    challenge_id: Annotated[list[str] | None, Query(max_length=_MAX_ASKED)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Claimable jobs, in the order in which to claim; without `challenge_id`, of every challenge."""
    asked = None if challenge_id is None else [one for one in challenge_id if UUID_FORM.fullmatch(one)]
    async with api.database.read() as connection:
        return {"jobs": await api.queue.pending(connection, asked, limit, signed.hotkey)}


@router.post(
    "/{job_id}/claim", response_model=Claim, openapi_extra=accepts(ClaimBody, required=False) | _VALIDATOR
)
async def claim_job(
    api: Api,
    signed: Validator,
    job_id: JobPath,
    body: Annotated[ClaimBody, Depends(json_body(ClaimBody, optional=True))],
) -> dict[str, Any]:
    """Claim a job, or get the same lease again for the same claim id."""
    async with api.database.write() as connection:
        claimed = await api.queue.claim(connection, job_id, signed.hotkey, body.claim_id)
    _note(api, "claimed", job_id, hotkey=signed.hotkey, attempt=claimed["attempt"])
    return claimed


@router.post("/{job_id}/renew", response_model=Renewal, openapi_extra=accepts(RenewRequest) | _VALIDATOR)
async def renew_job(
    api: Api,
    signed: Validator,
    job_id: JobPath,
    body: Annotated[RenewRequest, Depends(json_body(RenewRequest))],
) -> dict[str, float]:
    """Renew a lease: the term starts anew."""
    async with api.database.write() as connection:
        term_s = await api.queue.renew(connection, job_id, _token(body.lease_token), signed.hotkey)
    api.metrics.events.labels("renewed").inc()
    return {"term_s": term_s}


@router.post("/{job_id}/release", status_code=204, openapi_extra=accepts(ReleaseRequest) | _VALIDATOR)
async def release_job(
    api: Api,
    signed: Validator,
    job_id: JobPath,
    body: Annotated[ReleaseRequest, Depends(json_body(ReleaseRequest))],
) -> None:
    """Give a job back, with the reason."""
    token = _token(body.lease_token)
    async with api.database.write() as connection:
        challenge_id = await api.queue.release(connection, job_id, token, signed.hotkey, body.reason)
        if challenge_id is not None:
            await record_change(connection, "new_job", job_id, challenge_id)
    api.push.wake()
    _note(api, "released", job_id, hotkey=signed.hotkey, reason=body.reason.value)


@router.post("/{job_id}/logs", status_code=204, openapi_extra=accepts(JobLogs) | _VALIDATOR)
async def job_lines(
    api: Api, signed: Validator, job_id: JobPath, body: Annotated[JobLogs, Depends(json_body(JobLogs))]
) -> None:
    """Keep log lines of a running job."""
    if body.seq > MAX_SEQ:
        raise ApiError(422, "invalid_request", f"seq: expected at most {MAX_SEQ}")
    async with api.database.write() as connection:
        await keep_lines(
            connection,
            api.queue,
            job_id,
            token=_token(body.lease_token),
            hotkey=signed.hotkey,
            seq=body.seq,
            lines=body.lines,
        )


@router.post("/{job_id}/results", status_code=204, openapi_extra=accepts(ResultBody) | _VALIDATOR)
async def job_result(api: Api, signed: Validator, job_id: JobPath, request: Request) -> None:
    """Accept a result; the same body again is accepted again."""
    value = await read_value(request)
    large = len(await read_body(request)) > LARGE
    accepted = await asyncio.to_thread(AcceptedResult.read, value) if large else AcceptedResult.read(value)
    _token(accepted.body.lease_token)
    async with api.database.write() as connection:
        new = await api.queue.result(connection, job_id, signed.hotkey, accepted)
    if new:
        event = "completed" if accepted.succeeded else "failed"
        _note(api, event, job_id, hotkey=signed.hotkey, outcome=accepted.body.outcome.value)
        if accepted.body.receipt is None:
            log.info("result_without_receipt", job_id=job_id, hotkey=signed.hotkey)


@router.post("/{job_id}/cancel", status_code=202, openapi_extra=_OWNER)
async def cancel_job(api: Api, caller: Anyone, job_id: JobPath) -> dict[str, str]:
    """Cancel a job at once: its miner or an administrator."""
    async with api.database.write() as connection:
        row = await api.queue.job(connection, job_id)
        require_owner(caller, row["miner_hotkey"])
        await api.queue.cancel(connection, job_id)
        await record_change(connection, "job_cancelled", job_id)
    api.push.wake()
    _note(api, "cancelled", job_id, by=caller or "administrator")
    return {"id": job_id, "status": "cancelled"}


@router.get("", openapi_extra=_ADMIN)
async def all_jobs(
    api: Api, _: Admin, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> dict[str, Any]:
    """Jobs, newest first, for administrators."""
    async with api.database.read() as connection:
        query = sa.select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)
        rows = [dict(row) for row in (await connection.execute(query)).mappings()]
    return {"jobs": [job_view(row) for row in rows]}


@router.post("", status_code=201, openapi_extra=accepts(NewJob) | _ADMIN)
async def make_job(api: Api, _: Admin, new: Annotated[NewJob, Depends(json_body(NewJob))]) -> dict[str, str]:
    """Queue a job without a submission."""
    async with api.database.write() as connection:
        challenge = await get_challenge(connection, new.challenge_id)
        template = new.model_dump(exclude={"challenge_id"})
        made = await add_job(connection, challenge, template, submission_id=None, miner=None)
    api.push.wake()
    return {"id": made}


@router.get("/{job_id}", openapi_extra=_OWNER)
async def one_job(api: Api, caller: Anyone, job_id: JobPath) -> dict[str, Any]:
    """A job, for its miner, the validator that held it last, or an administrator."""
    async with api.database.read() as connection:
        row = await api.queue.job(connection, job_id)
    require_owner(caller, row["miner_hotkey"], row["holder"])
    return job_view(row)


@router.get("/{job_id}/logs", openapi_extra=_OWNER)
async def read_lines(
    api: Api,
    caller: Anyone,
    job_id: JobPath,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_SEQ)] = None,
    since_seq: Annotated[int, Query(ge=0, le=MAX_SEQ)] = 0,
) -> dict[str, Any]:
    """Log lines of one attempt, the newest by default, for the job's owner or an administrator."""
    async with api.database.read() as connection:
        row = await api.queue.job(connection, job_id)
        require_owner(caller, row["miner_hotkey"], row["holder"])
        shown = attempt or row["attempt"]
        batches = await kept_lines(connection, job_id, shown, since_seq)
    counted = {key: row[key] for key in ("log_gaps", "log_dropped")}
    return {"attempt": shown, "batches": batches, **counted}


@router.get("/{job_id}/receipt")
async def receipt(api: Api, job_id: JobPath) -> dict[str, Any]:
    """A job's receipt, public."""
    async with api.database.read() as connection:
        row = await api.queue.job(connection, job_id)
    found = json.loads(row["result"]).get("receipt") if row["result"] else None
    if found is None:
        raise ApiError(404, "no_receipt", "this job has no receipt")
    return dict(found)


def _token(token: str) -> str:
    """A lease token as we make them; anything else is simply no token of ours."""
    if not token.isascii() or not token.isprintable():
        raise ApiError(409, "lease_lost", "this is not the newest token of an unfinished job")
    return token


def _note(api: Api, event: str, job_id: str, **facts: Any) -> None:
    api.metrics.events.labels(event).inc()
    log.info("job_changed", change=event, job_id=job_id, **facts)
