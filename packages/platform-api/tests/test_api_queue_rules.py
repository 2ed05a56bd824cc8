"""The queue under any order of events: one accepted result a job, only the newest token, no clock fences."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from running_api import result

from platform_api.challenges import NewChallenge, add_challenge
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.queue import MAX_ATTEMPTS, MAX_INFRA_ATTEMPTS, Queue
from platform_api.results import AcceptedResult
from platform_api.submissions import add_job
from platform_api.tables import jobs
from platform_protocol.platform_messages import ReleaseReason

TERM = 1000
HOTKEYS = ("first", "second")
CLAIM = st.tuples(st.just("claim"), st.sampled_from(HOTKEYS), st.sampled_from(["a", "b", None]))
USE = st.tuples(st.sampled_from(["renew", "renew", "result"]), st.integers(0, 3))
RELEASE = st.tuples(st.just("release"), st.integers(0, 3), st.sampled_from(list(ReleaseReason)))
WAIT = st.tuples(st.just("wait"), st.sampled_from([1, TERM, 5 * TERM]))
REST = st.tuples(st.sampled_from(["retire", "extend", "cancel"]))
STEPS = st.one_of(CLAIM, CLAIM, WAIT, WAIT, USE, USE, RELEASE, RELEASE, REST)


class _Model:
    """What must be true, kept beside the real queue."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.time = 1_000_000
        self.queue = Queue(TERM, lambda: self.time)
        self.job = ""
        self.challenges: list[str] = []
        self.claims: list[tuple[str, dict[str, Any]]] = []
        self.newest: str | None = None
        self.asked: tuple[str, str | None] = "", None
        self.ends = 0
        self.lapsed, self.died = 0, 0
        self.finished: str | None = None

    async def prepare(self) -> None:
        async with self.database.write() as connection:
            new = NewChallenge(name="c", github_repo="o/n", github_commit="a" * 40)
            challenge = await add_challenge(connection, new)
            self.challenges.append(challenge["id"])
            self.job = await add_job(connection, challenge, {}, submission_id=None, miner=None)

    async def do(self, step: tuple[Any, ...]) -> None:
        try:
            await getattr(self, step[0])(*step[1:])
        except ApiError as error:
            self.refused(step, error)

    def refused(self, step: tuple[Any, ...], error: ApiError) -> None:
        """A refusal is only for a dead token, a held job, or a finished one."""
        assert error.status in (409, 422)
        if step[0] in ("renew", "result", "release"):
            _, claim = self.claims[step[1] % len(self.claims)]
            assert claim["lease"]["token"] != self.newest or self.finished, error.code

    async def wait(self, milliseconds: int) -> None:
        self.time += milliseconds

    async def claim(self, hotkey: str, claim_id: str | None) -> None:
        held = self.newest is not None and self.time < self.ends
        async with self.database.write() as connection:
            claim = await self.queue.claim(connection, self.job, hotkey, claim_id)
        assert self.finished is None
        if claim["lease"]["token"] != self.newest:
            assert not held, "a lease in its term is nobody else's"
            self.lapsed += self.newest is not None
            assert claim["attempt"] == max((one["attempt"] for _, one in self.claims), default=0) + 1
            self.claims.append((hotkey, claim))
            self.asked = hotkey, claim_id
        assert self.asked == (hotkey, claim_id), "the same lease is for who asked with the same claim id"
        self.newest, self.ends = claim["lease"]["token"], self.time + TERM

    async def renew(self, number: int) -> None:
        if self.claims:
            hotkey, claim = self.claims[number % len(self.claims)]
            token = claim["lease"]["token"]
            async with self.database.write() as connection:
                await self.queue.renew(connection, self.job, token, hotkey)
            assert token == self.newest
            self.ends = self.time + TERM

    async def result(self, number: int) -> None:
        if self.claims:
            hotkey, claim = self.claims[number % len(self.claims)]
            accepted = AcceptedResult.read(result(claim, score=claim["attempt"] / 100))
            async with self.database.write() as connection:
                new = await self.queue.result(connection, self.job, hotkey, accepted)
            if new:
                assert claim["lease"]["token"] == self.newest
                assert self.finished is None, "one accepted result a job"
                self.finished, self.newest = "completed", None

    async def release(self, number: int, reason: ReleaseReason) -> None:
        if not self.claims:
            return
        hotkey, claim = self.claims[number % len(self.claims)]
        token = claim["lease"]["token"]
        async with self.database.write() as connection:
            await self.queue.release(connection, self.job, token, hotkey, reason)
        if token == self.newest:
            self.newest = None
            self.lapsed += reason in (ReleaseReason.INFRA, ReleaseReason.ATTESTATION_UNAVAILABLE)
            self.died += reason is ReleaseReason.SANDBOX_DIED
            if self.lapsed >= MAX_ATTEMPTS or self.died >= MAX_INFRA_ATTEMPTS:
                self.finished = "failed"

    async def cancel(self) -> None:
        async with self.database.write() as connection:
            await self.queue.cancel(connection, self.job)
        assert self.finished is None
        self.finished, self.newest = "cancelled", None

    async def retire(self) -> None:
        async with self.database.write() as connection:
            if await self.queue.retire(connection):
                assert self.lapsed + 1 == MAX_ATTEMPTS
                assert self.time >= self.ends
                self.finished, self.newest = "failed", None

    async def extend(self) -> None:
        async with self.database.write() as connection:
            await self.queue.extend_all(connection)
        self.ends = max(self.ends, self.time) + TERM

    async def check(self) -> None:
        async with self.database.read() as connection:
            job = await self.queue.job(connection, self.job)
            listed = await self.queue.pending(connection, self.challenges, 10)
        assert job["token"] == self.newest
        open_status = "pending" if self.newest is None else "claimed"
        assert job["status"] == (self.finished or open_status)
        assert (job["score"] is not None) == (self.finished == "completed")
        free = self.newest is None or (self.time >= self.ends and self.lapsed + 1 < MAX_ATTEMPTS)
        assert bool(listed) == (self.finished is None and free)


async def _play(database: Database, steps: list[tuple[Any, ...]]) -> None:
    model = _Model(database)
    await model.prepare()
    try:
        for step in steps:
            await model.do(step)
            await model.check()
    finally:
        async with database.write() as connection:
            await connection.execute(sa.update(jobs).values(status="cancelled", token=None))


@pytest.mark.slow(reason="40 histories of up to 30 transactions each")
def test_whatever_happens_one_result_counts_and_only_the_newest_token_is_accepted(tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        database = runner.run(Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}"))

        # Unshrunk: every step is a transaction, and the failing steps are printed as they are.
        @settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
        @given(steps=st.lists(STEPS, min_size=12, max_size=30))
        def play(steps: list[tuple[Any, ...]]) -> None:
            runner.run(_play(database, steps))

        play()
        runner.run(database.close())


async def test_the_tenth_lapse_ends_the_job_and_the_ninth_does_not(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}")
    model = _Model(database)
    await model.prepare()
    for attempt in range(MAX_ATTEMPTS):
        await model.claim("first", f"c{attempt}")
        assert model.finished is None
        model.time += TERM
        await model.retire()
    await model.check()
    assert model.finished == "failed"
    await database.close()


async def test_a_lapse_that_nobody_used_counts_to_nothing(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}")
    model = _Model(database)
    await model.prepare()
    await model.claim("first", "c")
    for _ in range(20):
        model.time += 2 * TERM
        await model.renew(0)
    async with database.read() as connection:
        assert (await model.queue.job(connection, model.job))["failed_attempts"] == 0
    await database.close()


async def test_a_job_whose_sandbox_died_here_is_offered_here_last(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}")
    model = _Model(database)
    await model.prepare()
    await model.claim("first", "c")
    await model.release(0, ReleaseReason.SANDBOX_DIED)
    died = model.job
    await model.prepare()
    async with database.read() as connection:
        offered = {
            hotkey: [job["id"] for job in await model.queue.pending(connection, None, 10, hotkey)]
            for hotkey in HOTKEYS
        }
    assert offered["first"] == [model.job, died]
    assert offered["second"] == [died, model.job]
    await database.close()
