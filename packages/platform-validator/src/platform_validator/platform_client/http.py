"""The Platform API over HTTP: each request signed anew, one try a call, no redirects, all sizes capped."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit

import aiohttp
import structlog
from pydantic import BaseModel, ValidationError

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import (
    ActiveChallenge,
    Claim,
    ClaimRequest,
    JobLogs,
    PendingJob,
    ReleaseReason,
    ReleaseRequest,
    Renewal,
    RenewRequest,
    SubmissionRef,
)
from platform_validator.clock import Clock
from platform_validator.platform_client.answers import MAX_BODY, Call, problem_code, read_json, refusal
from platform_validator.platform_client.notifications import notification_stream
from platform_validator.platform_client.port import (
    ActiveList,
    Notification,
    PlatformUnavailable,
    SubmissionUnusable,
)
from platform_validator.platform_client.retries import TABLE, Kind
from platform_validator.platform_client.signer import RequestSigner

MAX_SUBMISSION = 64 * 1024 * 1024
_CHUNK = 256 * 1024
_OK = range(200, 300)
_VISIBLE = re.compile(r"[!-~]{1,2000}")
_NOT_MODIFIED = 304
_SERVER_FAILS = 500

_log = structlog.get_logger(__name__)
ModelT = TypeVar("ModelT", bound=BaseModel)
_Answer = tuple[int, Mapping[str, str], bytes]


class HttpPlatformClient:
    """The port over aiohttp, on the API's own origin alone.

    Args:
        base_url: `http(s)://host[:port][/prefix]`.
        signer: Signs each try.
        clock: Wall time, for Retry-After dates.
        timeout: Of one call, from connecting to the last byte.
        download_timeout: Of one submission's download.
    """

    def __init__(
        self,
        *,
        base_url: str,
        signer: RequestSigner,
        clock: Clock,
        timeout: timedelta = TABLE[Kind.LIST].deadline,
        download_timeout: timedelta = TABLE[Kind.SUBMISSION].deadline,
    ) -> None:
        parts = urlsplit(base_url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._prefix = parts.path.rstrip("/")
        self._signer = signer
        self._clock = clock
        self._timeout = timeout.total_seconds()
        self._download_timeout = download_timeout.total_seconds()
        self.on_answer: Callable[[], None] = lambda: None
        self._session: aiohttp.ClientSession | None = None
        self._etag: str | None = None
        self._active: tuple[ActiveChallenge, ...] = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def health(self) -> None:
        """`GET /health`, unsigned."""
        await self._call("GET", "/health", signed=False)

    async def active_challenges(self) -> ActiveList:
        """The active challenges; remembers the ETag, and the list that it stood for."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        status, answered, body = await self._send("GET", "/challenges/active", headers=headers)
        if status == _NOT_MODIFIED and self._etag:
            return ActiveList(self._active, changed=False)
        self._check(Call.PLAIN, status, answered, body)
        self._active = _each(ActiveChallenge, read_json(body), "challenges")
        self._etag = answered.get("ETag")
        return ActiveList(self._active, changed=True)

    async def pending_jobs(
        self, challenge_ids: Sequence[ChallengeId], limit: int = 100
    ) -> Sequence[PendingJob]:
        """Pending jobs of these challenges, in the API's order; asks nothing for an empty list."""
        if not challenge_ids:
            return ()
        query = urlencode([*(("challenge_id", each) for each in challenge_ids), ("limit", str(limit))])
        return _each(PendingJob, read_json(await self._call("GET", f"/jobs/pending?{query}")), "jobs")

    async def claim(self, job_id: JobId, claim_id: ClaimId) -> Claim:
        """Claim it, or get the same lease again for the same claim id."""
        body = await self._post(Call.CLAIM, job_id, "claim", ClaimRequest(claim_id=claim_id))
        claim = _one(Claim, read_json(body))
        if claim.id != job_id:
            raise PlatformUnavailable(f"claimed job {job_id}, answered for another one: {claim.id[:80]!r}")
        return claim

    async def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """Renew; returns the term from now."""
        body = await self._post(Call.LEASE, job_id, "renew", RenewRequest(lease_token=token))
        return timedelta(seconds=_one(Renewal, read_json(body)).term_s)

    async def release(self, job_id: JobId, token: LeaseToken, reason: ReleaseReason) -> None:
        """Give the job back."""
        await self._post(Call.LEASE, job_id, "release", ReleaseRequest(lease_token=token, reason=reason))

    async def send_logs(self, job_id: JobId, token: LeaseToken, seq: int, lines: Sequence[str]) -> None:
        """Send log lines."""
        await self._post(Call.LEASE, job_id, "logs", JobLogs(lease_token=token, seq=seq, lines=list(lines)))

    async def submit_result(self, job_id: JobId, body: bytes) -> None:
        """Send a stored result, byte for byte."""
        await self._call("POST", f"/jobs/{quote(job_id, safe='')}/results", body=body, call=Call.RESULT)

    async def fetch_submission(self, submission: SubmissionRef, target: Path) -> None:
        """Download to `target` (0600), checking size and SHA-256; nothing is left there on failure."""
        path = self._own_path(submission.url)
        if submission.size > MAX_SUBMISSION:
            raise SubmissionUnusable(f"a submission of {submission.size} bytes: at most {MAX_SUBMISSION}")
        partial = target.with_name(target.name + ".part")
        try:
            async with self._request("GET", path, timeout=self._download_timeout) as answer:
                if answer.status not in _OK:
                    body = await _capped(answer, MAX_BODY)
                    self._check(Call.PLAIN, answer.status, answer.headers, body)
                await _save(answer, submission, partial)
            await asyncio.to_thread(os.replace, partial, target)
        except OSError as error:
            raise SubmissionUnusable(f"the submission could not be kept: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def notifications(self) -> AsyncIterator[Notification]:
        """One WebSocket connection's notifications; ends when it closes."""
        path = f"{self._prefix}/validators/{self._signer.hotkey}/ws"
        return notification_stream(origin=self._origin, path=path, signer=self._signer, now=self._clock.now)

    async def close(self) -> None:
        """Close connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(self, call: Call, job_id: JobId, verb: str, message: BaseModel) -> bytes:
        body = message.model_dump_json().encode()
        return await self._call("POST", f"/jobs/{quote(job_id, safe='')}/{verb}", body=body, call=call)

    async def _call(
        self, method: str, path: str, *, body: bytes = b"", call: Call = Call.PLAIN, signed: bool = True
    ) -> bytes:
        status, headers, answer = await self._send(method, path, body=body, signed=signed)
        self._check(call, status, headers, answer)
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        signed: bool = True,
    ) -> _Answer:
        path = self._prefix + path
        answer = await self._try(method, path, body, headers or {}, signed)
        if signed and answer[0] not in _OK and self._learned(answer[2]):
            answer = await self._try(method, path, body, headers or {}, signed)
        return answer

    def _learned(self, body: bytes) -> bool:
        code, _, problem = problem_code(body)
        if code != "clock_skew" or not self._signer.learn(problem.get("server_time")):
            return False
        _log.warning("clock_offset_learned", offset_s=self._signer.offset.total_seconds())
        return True

    async def _try(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], signed: bool
    ) -> _Answer:
        async with self._request(
            method, path, body=body, headers=headers, signed=signed, timeout=self._timeout
        ) as answer:
            return answer.status, answer.headers, await _capped(answer, MAX_BODY)

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        signed: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        sent = dict(headers or {})
        if body:
            sent["Content-Type"] = "application/json"
        if signed:
            sent |= self._signer.headers(method, path, body)
        url = _exactly(self._origin + path)
        try:
            async with (
                asyncio.timeout(timeout),
                self._open().request(
                    method, url, data=body or None, headers=sent, allow_redirects=False
                ) as answer,
            ):
                if answer.status < _SERVER_FAILS:
                    self.on_answer()
                yield answer
        except TimeoutError as error:
            raise PlatformUnavailable(f"{method} {path}: no answer within {timeout:.0f} s") from error
        except aiohttp.ClientError as error:
            raise PlatformUnavailable(f"{method} {path}: {error}") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No environment proxies and no cookies; deadlines are ours, a call.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "platform-validator"},
            )
        return self._session

    def _check(self, call: Call, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status not in _OK:
            raise refusal(call, status, headers, body, self._clock.now())

    def _own_path(self, url: str) -> str:
        """The path and query of a URL on our own origin; a path alone is on it.

        Raises:
            SubmissionUnusable: It leads elsewhere.
        """
        whole = urlsplit(urljoin(self._origin + "/", url))
        if f"{whole.scheme}://{whole.netloc}" != self._origin or not _VISIBLE.fullmatch(url):
            raise SubmissionUnusable(f"the submission's URL leaves {self._origin}: {url[:200]!r}")
        return whole.path + (f"?{whole.query}" if whole.query else "")


def _exactly(url: str) -> Any:
    # As signed: yarl must not normalise what goes out.
    from yarl import URL  # noqa: PLC0415 - aiohttp's own URL type, needed at this one place

    return URL(url, encoded=True)


async def _capped(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    held = bytearray()
    async for chunk in answer.content.iter_chunked(_CHUNK):
        held += chunk
        if len(held) > limit:
            raise PlatformUnavailable(f"the answer is larger than {limit} bytes")
    return bytes(held)


async def _save(answer: aiohttp.ClientResponse, submission: SubmissionRef, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        async for chunk in answer.content.iter_chunked(_CHUNK):
            size += len(chunk)
            if size > submission.size:
                raise SubmissionUnusable(f"the submission is larger than the claim's {submission.size} bytes")
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    if size != submission.size or digest.hexdigest() != submission.sha256:
        raise SubmissionUnusable(
            f"expected {submission.size} bytes with SHA-256 {submission.sha256}, "
            f"got {size} with {digest.hexdigest()}"
        )


def _one(model: type[ModelT], answer: Any) -> ModelT:
    try:
        return model.model_validate(answer)
    except ValidationError as error:
        raise PlatformUnavailable(
            f"the answer is no {model.__name__}: {error.error_count()} faults"
        ) from error


def _each(model: type[ModelT], answer: Any, key: str) -> tuple[ModelT, ...]:
    """The readable entries: one that is not ours to understand must not hide the others."""
    entries = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise PlatformUnavailable(f"the answer holds no list {key!r}")
    read: list[ModelT] = []
    for entry in entries:
        try:
            read.append(model.model_validate(entry))
        except ValidationError as error:
            _log.warning("platform_entry_unreadable", kind=model.__name__, faults=error.error_count())
    return tuple(read)
