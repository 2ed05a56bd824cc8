"""The outbox against a Platform API that drops, repeats, refuses and forgets, on a disk that fills up.

The law: each stored result is accepted exactly once, or given up by the code of a definite refusal.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.machines.timed import PROFILE, TimedMachine, finds

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId, ClaimId, JobId
from platform_protocol.resources import Resources
from platform_validator.jobs.observe import Unmeasured
from platform_validator.jobs.outbox import Outbox
from platform_validator.platform_client import retries
from platform_validator.platform_client.answers import read_json
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.conformance import a_result
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.memory_client import MemoryPlatformClient
from platform_validator.platform_client.port import (
    JobUnknown,
    LeaseRefused,
    NotAuthorized,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
)
from platform_validator.platform_client.retries import Kind
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import JobOutcome, JobRecord, OutboxRecord, Stage

CHALLENGE = ChallengeId("challenge")
SIZE = Resources(cpu_cores=1, memory_mb=1, disk_mb=1)
PATIENCE = 65.0
"""Two of the longest waits between tries: by then everything that can be delivered is."""

_UNANSWERED: dict[str, PlatformError] = {
    "503": PlatformUnavailable("503"),
    "503 for a year": PlatformUnavailable("503", timedelta(days=365)),
    "401 once": NotAuthorized("401", code="nonce_reused", status=401),
    "418": PlatformRefused("418", code="teapot", status=418),
}
_REFUSALS: dict[str, PlatformError] = {
    "410": LeaseRefused("410", code="gone", status=410),
    "422": ResultRefused("422", code="invalid_result", status=422),
    "404": JobUnknown("404", code="job_not_found", status=404),
}


class Line(MemoryPlatformClient):
    """The way to the Platform API, which notes what was sent over it and what came back."""

    def __init__(self, platform: MemoryPlatform) -> None:
        super().__init__(platform, hotkey="ours", instance="ours")
        self.way = "straight"
        self.stored: dict[JobId, bytes] = {}
        self.accepted: dict[JobId, int] = {}
        self.refused: dict[JobId, set[str]] = {}
        self.platform = platform

    async def submit_result(self, job_id: JobId, body: bytes) -> None:
        """See the port."""
        assert body == self.stored[job_id], "what was sent is not what was stored"
        if self.way == "slow":
            await asyncio.sleep(15)
        await self._deliver(job_id, body)
        if self.way == "twice":
            await self._deliver(job_id, body)

    async def _deliver(self, job_id: JobId, body: bytes) -> None:
        before = self.platform.jobs[job_id].body
        try:
            await super().submit_result(job_id, body)
        except (LeaseRefused, ResultRefused, JobUnknown) as error:
            self.refused.setdefault(job_id, set()).add(error.code)
            raise
        finally:
            if self.platform.jobs[job_id].body != before:
                self.accepted[job_id] = self.accepted.get(job_id, 0) + 1


class OutboxMachine(TimedMachine):
    """Results are stored while the line, the disk and the process fail."""

    @initialize()
    def begins(self) -> None:
        """A validator with nothing to send."""
        self.platform = MemoryPlatform(now=self.clock.now)
        self.line = Line(self.platform)
        self.store = MemoryStore()
        self.claims: dict[ClaimId, JobId] = {}
        self.full = self.unreadable = False
        self.store.fail = self._fails
        self._open()

    def _fails(self, call: str) -> bool:
        reads = {"outbox", "recent_jobs"}
        return self.unreadable if call in reads else self.full

    def _open(self) -> None:
        self.outbox = Outbox(
            client=self.line,
            store=self.store,
            clock=self.clock,
            rng=random.Random(1),
            metrics=Unmeasured(),
        )
        self.running = self.start(self.outbox.run())

    @precondition(lambda self: not self.full and not self.platform.down)
    @rule(score=st.floats(0, 1))
    def a_result_is_stored(self, score: float) -> None:
        """As the executor does it: journaled, claimed, stored, and the outbox is woken."""
        self.do(self._store_one(score))
        self.outbox.wake()

    async def _store_one(self, score: float) -> None:
        job_id = self.platform.add_job(CHALLENGE, push=False)
        claim_id = ClaimId(f"claim-{job_id}")
        now = self.clock.now()
        await self.store.open_claim(JobRecord(claim_id, job_id, CHALLENGE, "c@1", SIZE, Stage.PENDING, now))
        claim = self.platform.claim(job_id, claim_id, "ours")
        token = claim.lease.token
        await self.store.claim_granted(claim_id, granted=b"{}", attempt=1, token=token, at=now)
        body = a_result(claim, score=score)
        self.line.stored[job_id] = body
        self.claims[claim_id] = job_id
        await self.store.store_result(claim_id, JobOutcome.SUCCEEDED, body, at=now)

    @rule(seconds=st.sampled_from([0.01, 1, 10, 60, 600]))
    def time_passes(self, seconds: float) -> None:
        """And the loop does what is due."""
        self.let_pass(seconds)

    @rule(down=st.booleans(), way=st.sampled_from(["straight", "straight", "twice", "slow"]))
    def the_line_changes(self, down: bool, way: str) -> None:
        """Up or down; straight, slow, or with everything arriving twice."""
        self.platform.down = down
        self.line.way = way

    @rule(what=st.sampled_from([*_UNANSWERED, *_REFUSALS]))
    def the_next_answer_is(self, what: str) -> None:
        """An error that decides nothing, or a definite no."""
        self.platform.fail_next("submit_result", (_UNANSWERED | _REFUSALS)[what])

    @rule()
    def the_next_answer_is_lost(self) -> None:
        """The result is committed, and nobody is told."""
        self.platform.fail_next("submit_result", after=True)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), how=st.sampled_from(["cancelled", "taken"]))
    def the_job_is_lost(self, data: st.DataObject, how: str) -> None:
        """Cancelled, or lapsed and claimed by another validator."""
        job_id = data.draw(st.sampled_from(sorted(self.line.stored)))
        if self.platform.jobs[job_id].finished:
            return
        if how == "cancelled":
            self.platform.cancel_job(job_id, push=False)
        else:
            self.platform.lapse(job_id)
            self.platform.claim(job_id, ClaimId("theirs"), "theirs")

    @rule(full=st.booleans(), unreadable=st.booleans())
    def the_disk_changes(self, full: bool, unreadable: bool) -> None:
        """Full: nothing can be written. Unreadable: not even the outbox can be read."""
        self.full, self.unreadable = full, unreadable

    @rule()
    def the_process_is_killed(self) -> None:
        """Wherever it was; the next one knows only what is on the disk."""
        self.stop(self.running)
        self._open()

    @rule()
    def the_platform_is_back(self) -> None:
        """Somebody noticed that it answers."""
        self.outbox.wake(retry=True)

    @invariant()
    def nothing_is_lost_and_nothing_is_done_twice(self) -> None:
        """Each result waits, or was accepted, or was given up by a refusal's name."""
        if self.running.done():
            self.running.result()
        waiting, jobs = self._look()
        for claim_id, job_id in self.claims.items():
            self._one(jobs[claim_id], job_id, waits=claim_id in waiting)

    def _one(self, job: JobRecord, job_id: JobId, *, waits: bool) -> None:
        took = self.line.accepted.get(job_id, 0)
        assert took <= 1, f"{job_id} was accepted {took} times"
        if took:
            assert self.platform.jobs[job_id].body == canonical_json(read_json(self.line.stored[job_id]))
        if waits:
            assert job.stage is not Stage.DONE, "the job is done, and its result waits"
            return
        assert job.stage is Stage.DONE
        if job.outcome is JobOutcome.SUCCEEDED:
            assert took == 1, "it left the outbox as delivered, and was never accepted"
        else:
            assert job.reason in self.line.refused.get(job_id, set()), f"given up as {job.reason}"

    def _look(self) -> tuple[set[ClaimId], dict[ClaimId, JobRecord]]:
        async def read() -> tuple[set[ClaimId], dict[ClaimId, JobRecord]]:
            waiting = {entry.claim_id for entry in await self.store.outbox()}
            return waiting, {job.claim_id: job for job in await self.store.recent_jobs(1000)}

        unreadable, self.unreadable = self.unreadable, False
        found = self.do(read())
        self.unreadable = unreadable
        return found

    def teardown(self) -> None:
        """When all is well again, everything is delivered or given up within a minute."""
        try:
            if hasattr(self, "platform"):
                self._settle()
        finally:
            super().teardown()

    def _settle(self) -> None:
        self.platform.down = self.full = self.unreadable = False
        self.line.way = "straight"
        self.platform.clear_faults()
        self.let_pass(PATIENCE)
        assert not self._look()[0], "a result waits though nothing is in its way"
        self.nothing_is_lost_and_nothing_is_done_twice()


OutboxMachine.TestCase.settings = PROFILE
TestOutboxMachine = OutboxMachine.TestCase


def _silence_is_delivered(patch: pytest.MonkeyPatch) -> None:
    async def note(self: Any, entry: OutboxRecord, tries: Any, error: PlatformError) -> None:
        del tries, error
        await self._settle(entry, None)

    patch.setattr(Outbox, "_note", note)


def _anything_but_silence_is_final(patch: pytest.MonkeyPatch) -> None:
    rule = replace(retries.TABLE[Kind.RESULT], bears=0)
    patch.setattr(retries, "TABLE", {**retries.TABLE, Kind.RESULT: rule})


def _a_conflict_is_delivered(patch: pytest.MonkeyPatch) -> None:
    original = Outbox._settle

    async def settle(self: Any, entry: OutboxRecord, refusal: str | None) -> None:
        await original(self, entry, None if refusal == "lease_lost" else refusal)

    patch.setattr(Outbox, "_settle", settle)


def _tried_once(patch: pytest.MonkeyPatch) -> None:
    original = Outbox._note

    async def note(self: Any, entry: OutboxRecord, tries: Any, error: PlatformError) -> None:
        await original(self, entry, tries, error)
        tries.due = float("inf")

    patch.setattr(Outbox, "_note", note)


def _the_server_s_wish_has_no_end(patch: pytest.MonkeyPatch) -> None:
    endless = Backoff(timedelta(seconds=1), timedelta(days=365))
    rule = replace(retries.TABLE[Kind.RESULT], pause=endless)
    patch.setattr(retries, "TABLE", {**retries.TABLE, Kind.RESULT: rule})


@pytest.mark.parametrize(
    "fault",
    [
        _silence_is_delivered,
        _anything_but_silence_is_final,
        _a_conflict_is_delivered,
        _tried_once,
        _the_server_s_wish_has_no_end,
    ],
)
def test_an_outbox_with_a_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine finds each fault that is put in."""
    fault(monkeypatch)
    finds(OutboxMachine)
