"""What any implementation of the Platform API port must do, against any server: run by its tests.

A harness arranges the server's side; each case is a coroutine function of the harness. `CASES` names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId, ClaimId, JobId
from platform_protocol.notifications import Hello, JobCancelled, NewJob
from platform_protocol.platform_messages import Claim, ReleaseReason, SubmissionRef
from platform_validator.platform_client.port import (
    AlreadyClaimed,
    JobUnknown,
    LeaseRefused,
    PlatformClient,
    PlatformError,
    ResultRefused,
    SubmissionUnusable,
)


class PlatformHarness(Protocol):
    """The server's side of a case."""

    @property
    def folder(self) -> Path:
        """An empty folder."""

    def client(self, number: int = 0) -> PlatformClient:
        """The client of one of two registered validators, 0 and 1."""

    async def add_challenge(self) -> ChallengeId:
        """An active challenge."""

    async def add_job(self, challenge_id: ChallengeId, submission: bytes | None = None) -> JobId:
        """A pending job of it."""

    async def cancel_job(self, job_id: JobId) -> None:
        """Cancel it as its owner would."""


Case = Callable[[PlatformHarness], Awaitable[None]]
UNKNOWN_JOB = JobId("99999999-9999-4999-8999-999999999999")


def _claim_id() -> ClaimId:
    return ClaimId(str(uuid4()))


def a_result(claim: Claim, *, score: float = 0.5) -> bytes:
    """A result body that a server accepts for a claim."""
    return canonical_json(
        {
            "lease_token": claim.lease.token,
            "attempt": claim.attempt,
            "outcome": "succeeded",
            "score": score,
            "metrics": {"final_score": score},
            "logs": [],
            "execution_time_ms": 5,
            "error": None,
            "resource_usage": {"cpu_time_ms": 1, "memory_peak_bytes": 1, "disk_bytes": 0, "network_bytes": 0},
            "github_commit": "a" * 40,
            "compose_hash": "b" * 64,
            "isolation_level": "Container",
            "attestation": "none",
            "receipt": None,
        }
    )


async def _refused(call: Awaitable[object], kind: type[PlatformError], code: str = "") -> None:
    try:
        await call
    except kind as error:
        said = getattr(error, "code", "")
        if code and said != code:
            raise AssertionError(f"expected the code {code}, got {said}") from error
        return
    raise AssertionError(f"expected {kind.__name__} {code}, got an answer")


def _expect(held: bool, what: str) -> None:
    if not held:
        raise AssertionError(what)


async def the_server_is_healthy(server: PlatformHarness) -> None:
    """Health answers without a signature."""
    await server.client().health()


async def active_challenges_are_listed_and_unchanged_ones_said_so(server: PlatformHarness) -> None:
    """The list holds the challenge; asked again without a change, the same list comes, marked unchanged."""
    challenge_id = await server.add_challenge()
    client = server.client()
    first = await client.active_challenges()
    again = await client.active_challenges()
    _expect(challenge_id in {each.id for each in first.challenges}, "the challenge is listed")
    _expect(first.changed and not again.changed, "only the first answer is a change")
    _expect(first.challenges == again.challenges, "the list is remembered")


async def pending_jobs_are_those_of_the_challenges_asked_for(server: PlatformHarness) -> None:
    """A job is listed for its challenge alone, and for no challenge nothing is."""
    mine, other = await server.add_challenge(), await server.add_challenge()
    job_id = await server.add_job(mine)
    client = server.client()
    _expect([each.id for each in await client.pending_jobs([mine])] == [job_id], "the job is pending")
    _expect(not await client.pending_jobs([other]), "not for another challenge")
    _expect(not await client.pending_jobs([]), "nothing for no challenge")


async def one_claim_wins(server: PlatformHarness) -> None:
    """Of two validators one gets the job, the other AlreadyClaimed; it is pending no more."""
    challenge_id = await server.add_challenge()
    job_id = await server.add_job(challenge_id)
    claim = await server.client(0).claim(job_id, _claim_id())
    _expect(claim.id == job_id and claim.attempt == 1 and claim.lease.term_s > 0, "a lease was granted")
    await _refused(server.client(1).claim(job_id, _claim_id()), AlreadyClaimed, "already_claimed")
    _expect(not await server.client(1).pending_jobs([challenge_id]), "claimed jobs are not pending")


async def the_same_claim_id_gets_the_same_lease(server: PlatformHarness) -> None:
    """A claim whose answer was lost is asked for again, and answered with the same token and attempt."""
    job_id = await server.add_job(await server.add_challenge())
    claim_id = _claim_id()
    first = await server.client().claim(job_id, claim_id)
    again = await server.client().claim(job_id, claim_id)
    _expect(first.lease.token == again.lease.token and first.attempt == again.attempt, "the same lease")


async def unknown_jobs_are_said_to_be_unknown(server: PlatformHarness) -> None:
    """A claim of a job that is not there is JobUnknown."""
    await _refused(server.client().claim(UNKNOWN_JOB, _claim_id()), JobUnknown)


async def a_lease_is_renewed_by_its_token_alone(server: PlatformHarness) -> None:
    """The newest token renews; another one is told `lease_lost`."""
    job_id = await server.add_job(await server.add_challenge())
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    term = await client.renew(job_id, claim.lease.token)
    _expect(term.total_seconds() > 0, "a term from now")
    await _refused(client.renew(job_id, type(claim.lease.token)(str(uuid4()))), LeaseRefused, "lease_lost")


async def a_released_job_is_pending_again_and_its_token_dead(server: PlatformHarness) -> None:
    """A released job is claimed anew, attempt and token are new; releasing twice is harmless."""
    challenge_id = await server.add_challenge()
    job_id = await server.add_job(challenge_id)
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    await client.release(job_id, claim.lease.token, ReleaseReason.DRAIN)
    await client.release(job_id, claim.lease.token, ReleaseReason.DRAIN)
    await _refused(client.renew(job_id, claim.lease.token), LeaseRefused, "lease_lost")
    _expect([each.id for each in await client.pending_jobs([challenge_id])] == [job_id], "pending again")
    other = await server.client(1).claim(job_id, _claim_id())
    _expect(other.attempt == claim.attempt + 1, "the attempt counts up")
    _expect(other.lease.token != claim.lease.token, "a new token fences the old one")
    await _refused(client.submit_result(job_id, a_result(claim)), LeaseRefused, "lease_lost")


async def a_result_is_accepted_once_and_repeated_harmlessly(server: PlatformHarness) -> None:
    """The same body again is accepted; another body with the same token is refused."""
    job_id = await server.add_job(await server.add_challenge())
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    await client.submit_result(job_id, a_result(claim))
    await client.submit_result(job_id, a_result(claim))
    await _refused(client.submit_result(job_id, a_result(claim, score=0.9)), LeaseRefused)
    await _refused(client.claim(job_id, _claim_id()), AlreadyClaimed, "already_claimed")


async def an_unacceptable_result_is_refused_for_good(server: PlatformHarness) -> None:
    """A body without its required keys is ResultRefused."""
    job_id = await server.add_job(await server.add_challenge())
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    body = json.loads(a_result(claim))
    del body["score"]
    await _refused(client.submit_result(job_id, canonical_json(body)), ResultRefused)


async def a_cancelled_job_refuses_everything(server: PlatformHarness) -> None:
    """Renewal and result of a cancelled job are told `job_cancelled`."""
    job_id = await server.add_job(await server.add_challenge())
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    await server.cancel_job(job_id)
    await _refused(client.renew(job_id, claim.lease.token), LeaseRefused, "job_cancelled")
    await _refused(client.submit_result(job_id, a_result(claim)), LeaseRefused, "job_cancelled")


async def logs_are_taken_from_the_holder(server: PlatformHarness) -> None:
    """Log lines go with a live token and are refused with a dead one."""
    job_id = await server.add_job(await server.add_challenge())
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    await client.send_logs(job_id, claim.lease.token, 0, ["a line"])
    await client.release(job_id, claim.lease.token, ReleaseReason.DRAIN)
    await _refused(client.send_logs(job_id, claim.lease.token, 1, ["late"]), LeaseRefused, "lease_lost")


async def a_submission_is_downloaded_and_checked(server: PlatformHarness) -> None:
    """Bytes arrive as claimed; another size or digest leaves nothing behind; a foreign URL is refused."""
    data = b"submission " * 5000
    job_id = await server.add_job(await server.add_challenge(), data)
    client = server.client()
    claim = await client.claim(job_id, _claim_id())
    reference = claim.submission
    if reference is None:
        raise AssertionError("the claim names the submission")
    _expect(reference.sha256 == hashlib.sha256(data).hexdigest(), "the digest is the data's")
    target = server.folder / "submission"
    await client.fetch_submission(reference, target)
    _expect(target.read_bytes() == data, "the bytes are the submission's")
    _expect(target.stat().st_mode & 0o777 == 0o600, "nobody else can read it")
    for wrong in (
        reference.model_copy(update={"sha256": "0" * 64}),
        reference.model_copy(update={"size": len(data) - 1}),
        reference.model_copy(update={"url": "http://elsewhere.invalid/bundle"}),
    ):
        bad = server.folder / "bad"
        await _refused(client.fetch_submission(SubmissionRef.model_validate(wrong), bad), SubmissionUnusable)
        _expect(not bad.exists(), "nothing is left of a bad download")


async def only_the_holder_downloads(server: PlatformHarness) -> None:
    """Another validator gets nothing."""
    job_id = await server.add_job(await server.add_challenge(), b"secret")
    claim = await server.client(0).claim(job_id, _claim_id())
    if claim.submission is None:
        raise AssertionError("the claim names the submission")
    await _refused(
        server.client(1).fetch_submission(claim.submission, server.folder / "stolen"), PlatformError
    )
    _expect(not (server.folder / "stolen").exists(), "nothing was written")


async def pushes_come_after_a_hello(server: PlatformHarness) -> None:
    """A connection begins with hello; a new and a cancelled job are pushed with a seq that counts up."""
    challenge_id = await server.add_challenge()
    stream = server.client().notifications()
    hello = await anext(stream)
    _expect(isinstance(hello, Hello), "hello is first")
    job_id = await server.add_job(challenge_id)
    pushed = await anext(stream)
    while not isinstance(pushed, NewJob):
        pushed = await anext(stream)
    _expect(pushed.job_id == job_id and pushed.challenge_id == challenge_id, "the job is named")
    await server.cancel_job(job_id)
    cancelled = await anext(stream)
    while not isinstance(cancelled, JobCancelled):
        cancelled = await anext(stream)
    _expect(cancelled.job_id == job_id and cancelled.seq > pushed.seq, "the cancellation follows")
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


CASES: tuple[Case, ...] = (
    the_server_is_healthy,
    active_challenges_are_listed_and_unchanged_ones_said_so,
    pending_jobs_are_those_of_the_challenges_asked_for,
    one_claim_wins,
    the_same_claim_id_gets_the_same_lease,
    unknown_jobs_are_said_to_be_unknown,
    a_lease_is_renewed_by_its_token_alone,
    a_released_job_is_pending_again_and_its_token_dead,
    a_result_is_accepted_once_and_repeated_harmlessly,
    an_unacceptable_result_is_refused_for_good,
    a_cancelled_job_refuses_everything,
    logs_are_taken_from_the_holder,
    a_submission_is_downloaded_and_checked,
    only_the_holder_downloads,
    pushes_come_after_a_hello,
)
