"""The Platform API in memory: claims, fencing tokens, results and pushes as the real one answers them.

`MemoryPlatform` is the server's side, which tests and simulations arrange; `client` gives the port as one
validator sees it. Faults are arranged a call at a time, before or after it took effect.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.notifications import ChallengeUpdated, Hello, JobCancelled, NewJob
from platform_protocol.platform_messages import (
    ActiveChallenge,
    Claim,
    PendingJob,
    ReleaseReason,
    ResultBody,
)
from platform_protocol.resources import Resources
from platform_validator.platform_client.answers import read_json
from platform_validator.platform_client.memory_client import MemoryPlatformClient
from platform_validator.platform_client.memory_job import MemoryJob
from platform_validator.platform_client.port import (
    AlreadyClaimed,
    HotkeyInUse,
    JobUnknown,
    LeaseRefused,
    NotAuthorized,
    Notification,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
)

_SMALL = Resources(cpu_cores=1, memory_mb=256, disk_mb=512, gpu_count=0)


@dataclass(slots=True)
class Fault:
    """An arranged failure of one call; `after`: its effect stands and only the answer is lost."""

    error: Exception
    after: bool


class MemoryPlatform:
    """The server's state and its administrators' acts.

    Args:
        term: Of a lease.
        now: The server's own clock.
    """

    def __init__(
        self, *, term: timedelta = timedelta(seconds=120), now: Any = lambda: datetime.now(UTC)
    ) -> None:
        self.term = term
        self._now = now
        self._challenges: dict[ChallengeId, ActiveChallenge] = {}
        self.jobs: dict[JobId, MemoryJob] = {}
        self._ids = itertools.count(1)
        self._version = 0
        self._stream = 1
        self._seq = 0
        self._listeners: list[tuple[str, asyncio.Queue[Notification | Exception | None]]] = []
        self._faults: dict[str, list[Fault]] = {}
        self.calls: list[str] = []
        self.down = False
        self.banned: set[str] = set()

    # Arranging

    def put_challenge(self, challenge: ActiveChallenge) -> None:
        """Add or change an active challenge, and push that it changed."""
        self._challenges[challenge.id] = challenge
        self._version += 1
        self._push(
            lambda seq: ChallengeUpdated(
                seq=seq, challenge_id=challenge.id, github_commit=challenge.github_commit
            )
        )

    def remove_challenge(self, challenge_id: ChallengeId) -> None:
        """Take it off the list."""
        self._challenges.pop(challenge_id, None)
        self._version += 1

    def add_job(
        self,
        challenge_id: ChallengeId,
        *,
        submission: bytes | None = None,
        payload: dict[str, Any] | None = None,
        job_name: str | None = None,
        priority: int = 0,
        timeout_s: int = 60,
        resources: Resources = _SMALL,
        push: bool = True,
    ) -> JobId:
        """Queue a job, and push it unless told not to."""
        number = next(self._ids)
        job_id = JobId(f"00000000-0000-4000-8000-{number:012x}")
        self.jobs[job_id] = MemoryJob(
            id=job_id,
            challenge_id=challenge_id,
            resources=resources,
            timeout_s=timeout_s,
            payload=payload or {},
            job_name=job_name,
            priority=priority,
            created_at=self._now(),
            submission=submission,
        )
        if push:
            self.announce(job_id)
        return job_id

    def announce(self, job_id: JobId) -> None:
        """Push that a job is there."""
        challenge_id = self.jobs[job_id].challenge_id
        self._push(lambda seq: NewJob(seq=seq, job_id=job_id, challenge_id=challenge_id))

    def cancel_job(self, job_id: JobId, *, push: bool = True) -> None:
        """Cancel at once: the token is dead."""
        job = self.jobs[job_id]
        if not job.finished:
            job.status, job.outcome = "cancelled", "cancelled"
        if push:
            self._push(lambda seq: JobCancelled(seq=seq, job_id=job_id))

    def lapse(self, job_id: JobId) -> None:
        """Let its lease's term be over now."""
        self.jobs[job_id].expires_at = self._now() - timedelta(seconds=1)

    def fail_next(self, call: str, error: Exception | None = None, *, after: bool = False) -> None:
        """The next such call fails: before it takes effect, or after (its answer is lost)."""
        failure = error or PlatformUnavailable(f"{call}: arranged to fail")
        self._faults.setdefault(call, []).append(Fault(failure, after))

    def clear_faults(self) -> None:
        """Arrange no more failures."""
        self._faults.clear()

    def push_hint(self, notification: Notification) -> None:
        """Push anything at all, as a confused or hostile server would."""
        for _, queue in self._listeners:
            queue.put_nowait(notification)

    def restart(self) -> None:
        """All connections break; the next stream has a new id; leases get one term more."""
        self._stream += 1
        self._seq = 0
        for job in self.jobs.values():
            if job.expires_at is not None:
                job.expires_at += self.term
        self.close_connections()

    def close_connections(self, error: Exception | None = None) -> None:
        """End every connection, with an error for its reader or without."""
        listeners, self._listeners = self._listeners, []
        for _, queue in listeners:
            queue.put_nowait(error)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._listeners)

    def client(self, hotkey: str = "validator-1", instance: str = "instance-1") -> MemoryPlatformClient:
        """The port, as one validator sees it."""
        return MemoryPlatformClient(self, hotkey=hotkey, instance=instance)

    # Answering

    def enter(self, call: str, hotkey: str) -> list[Fault]:
        """A call arrives; returns the fault that strikes after it took effect, if any."""
        self.calls.append(call)
        if self.down:
            raise PlatformUnavailable(f"{call}: the Platform API is down")
        if hotkey in self.banned:
            raise NotAuthorized("403 not_registered", code="not_registered", status=403)
        faults = self._faults.get(call, [])
        if not faults:
            return []
        fault = faults.pop(0)
        if fault.after:
            return [fault]
        raise fault.error

    def active(self, seen: int | None) -> tuple[tuple[ActiveChallenge, ...], int, bool]:
        """The list, its version, and whether it differs from the version seen."""
        return tuple(self._challenges.values()), self._version, seen != self._version

    def pending(self, challenge_ids: Sequence[ChallengeId], limit: int) -> list[PendingJob]:
        """By priority, then round robin over challenges, then oldest."""
        self._reclaim()
        rows = [
            job for job in self.jobs.values() if job.status == "pending" and job.challenge_id in challenge_ids
        ]
        rows.sort(key=lambda job: (-job.priority, job.created_at, job.id))
        turns: dict[tuple[int, ChallengeId], int] = {}
        ranked = []
        for job in rows:
            turn = turns[job.priority, job.challenge_id] = turns.get((job.priority, job.challenge_id), 0) + 1
            ranked.append((-job.priority, turn, job.created_at, job.id, job))
        return [each[-1].listed() for each in sorted(ranked, key=lambda each: each[:-1])[:limit]]

    def claim(self, job_id: JobId, claim_id: ClaimId, hotkey: str) -> Claim:
        """A new token, or the same lease again for the same hotkey and claim id."""
        self._reclaim()
        job = self._job(job_id)
        if job.status == "cancelled":
            raise LeaseRefused("409 job_cancelled", code="job_cancelled", status=409)
        same = job.holder == (hotkey, claim_id) and job.token not in job.released
        if job.finished or (job.status == "claimed" and not same):
            raise AlreadyClaimed("409 already_claimed", code="already_claimed", status=409)
        if not same or job.token is None:
            job.attempt += 1
            job.token = LeaseToken(f"token-{job_id}-{job.attempt}")
            job.holder = (hotkey, claim_id)
        job.status = "claimed"
        job.expires_at = self._now() + self.term
        return job.granted(job.token, self.term)

    def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """One more term, while nobody claimed since."""
        self._held(job_id, token).expires_at = self._now() + self.term
        return self.term

    def release(self, job_id: JobId, token: LeaseToken, reason: ReleaseReason) -> None:
        """Back to pending, or failed at a limit; repeating it changes nothing."""
        job = self._job(job_id)
        if token in job.released:
            return
        self._held(job_id, token)
        job.released.add(token)
        job.releases.append(reason)
        job.given_back()
        if job.status == "pending":
            self._push(lambda seq: NewJob(seq=seq, job_id=job_id, challenge_id=job.challenge_id))

    def logs(self, job_id: JobId, token: LeaseToken, lines: Sequence[str]) -> None:
        """Keep log lines."""
        self._held(job_id, token).log_lines.extend(lines)

    def results(self, job_id: JobId, body: bytes) -> None:
        """Accept one result; the same body again is accepted again and changes nothing."""
        job = self._job(job_id)
        try:
            value = read_json(body)
            result = ResultBody.model_validate(value)
        except (ValidationError, PlatformUnavailable) as error:
            raise ResultRefused(f"422 {error}", code="invalid_result", status=422) from error
        canonical = canonical_json(value)
        if job.body == canonical:
            return
        self._held(job_id, result.lease_token)
        job.body, job.result = canonical, result
        job.status = "completed" if result.outcome == "succeeded" else "failed"
        job.outcome = result.outcome.value

    def bundle(self, job: MemoryJob, hotkey: str) -> bytes:
        """A submission's bytes, for the validator that holds the lease."""
        if job.submission is None:
            raise PlatformRefused("404", code="not_found", status=404)
        if job.status != "claimed" or job.holder is None or job.holder[0] != hotkey:
            raise PlatformRefused("403 no_lease", code="no_lease", status=403)
        return job.submission

    def connect(self, hotkey: str, instance: str) -> asyncio.Queue[Notification | Exception | None]:
        """A new connection, greeted; another instance's connection is told that it was replaced."""
        kept = []
        for listener, queue in self._listeners:
            name, _, other = listener.partition("/")
            if name != hotkey:
                kept.append((listener, queue))
            else:
                queue.put_nowait(None if other == instance else HotkeyInUse("closed with 4409"))
        queue = asyncio.Queue[Notification | Exception | None]()
        queue.put_nowait(Hello(seq=self._seq, stream=f"stream-{self._stream}", server_time=self._now()))
        self._listeners = [*kept, (f"{hotkey}/{instance}", queue)]
        return queue

    def disconnect(self, queue: asyncio.Queue[Notification | Exception | None]) -> None:
        """A connection ended."""
        self._listeners = [each for each in self._listeners if each[1] is not queue]

    def _push(self, make: Any) -> None:
        self._seq += 1
        self.push_hint(make(self._seq))

    def _job(self, job_id: JobId) -> MemoryJob:
        job = self.jobs.get(job_id)
        if job is None:
            raise JobUnknown("404 job_not_found", code="job_not_found", status=404)
        return job

    def _held(self, job_id: JobId, token: LeaseToken) -> MemoryJob:
        job = self._job(job_id)
        if job.status == "cancelled":
            raise LeaseRefused("409 job_cancelled", code="job_cancelled", status=409)
        if job.finished or job.token != token or token in job.released:
            raise LeaseRefused("409 lease_lost", code="lease_lost", status=409)
        # A lapsed lease that nobody used since is still the newest.
        job.status = "claimed"
        return job

    def _reclaim(self) -> None:
        for job in self.jobs.values():
            if job.status == "claimed" and job.expires_at is not None and job.expires_at < self._now():
                job.lapses += 1
                job.given_back()
