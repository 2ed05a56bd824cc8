"""The counting is counted on: each kind of harm, done on purpose, shows in its figure and in no other."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from examples.demo.stack import Stack, make_stack
from examples.demo.unix_http import UnixConnection
from tests.chaos.evidence import Attempt, Figures, Stored, figures, watch
from tests.chaos.plan import Strike, Version, full
from tests.chaos.run import ChaosRun
from tests.network.proxy import TcpProxy

from platform_api.challenges import NewChallenge, add_challenge
from platform_api.database import Database
from platform_api.queue import Queue
from platform_api.results import AcceptedResult
from platform_api.submissions import add_submission
from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import ReleaseReason
from platform_protocol.resources import Resources
from platform_validator.crashpoint import POINTS
from platform_validator.store.records import JobOutcome, JobRecord, Stage
from platform_validator.store.sqlite import SqliteStore

OURS, OTHER = "5OURS", "5OTHER"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TERM_MS = 6000
USAGE = ("cpu_time_ms", "memory_peak_bytes", "disk_bytes", "network_bytes")


@dataclass
class Held:
    """A claim that a validator holds."""

    job_id: str
    token: str
    attempt: int
    claim_id: ClaimId
    hotkey: str

    def body(self, score: float) -> dict[str, Any]:
        return {
            "lease_token": self.token,
            "attempt": self.attempt,
            "outcome": "succeeded",
            "score": score,
            "metrics": {},
            "logs": [],
            "execution_time_ms": 5,
            "error": None,
            "resource_usage": dict.fromkeys(USAGE, 0),
            "github_commit": "a" * 40,
            "compose_hash": "b" * 64,
            "isolation_level": "Container",
            "attestation": "none",
            "receipt": None,
        }


class House:
    """The Platform API's real queue in a real database, and a real journal."""

    def __init__(self, folder: Path, database: Database, journal: SqliteStore) -> None:
        self.folder = folder
        self.api = folder / "api.db"
        self.now = 1_000_000
        self.queue = Queue(TERM_MS, now=lambda: self.now)
        self._database = database
        self._journal = journal
        self._numbers = 0
        self.stored = Stored()

    async def job(self) -> str:
        """A submission's job; its right score is its number in ten thousand."""
        self._numbers += 1
        async with self._database.write() as connection:
            if self._numbers == 1:
                commit = "c" * 40
                new = NewChallenge(name="echo", github_repo="file:///nowhere", github_commit=commit)
                self._challenge = (await add_challenge(connection, new))["id"]
            data = str(self._numbers).encode()
            made = await add_submission(connection, self._challenge, "m", f"n{self._numbers}.tar.gz", data)
        return str(made["jobs"][0])

    async def claim(self, job_id: str, hotkey: str = OURS) -> Held:
        """Granted, and ours journaled."""
        claim_id = ClaimId(f"claim-{hotkey}-{self.now}-{job_id}")
        async with self._database.write() as connection:
            granted = await self.queue.claim(connection, job_id, hotkey, claim_id)
        held = Held(job_id, granted["lease"]["token"], granted["attempt"], claim_id, hotkey)
        if hotkey == OURS:
            record = JobRecord(
                claim_id=claim_id,
                job_id=JobId(job_id),
                challenge_id=ChallengeId(self._challenge),
                instance_key="key",
                resources=Resources(cpu_cores=1, memory_mb=256, disk_mb=512),
                stage=Stage.PENDING,
                claimed_at=NOW,
            )
            await self._journal.open_claim(record)
            token = LeaseToken(held.token)
            await self._journal.claim_granted(
                claim_id, granted=b"{}", attempt=held.attempt, token=token, at=NOW
            )
        return held

    async def store(self, held: Held, score: float) -> None:
        """The journal has its result."""
        body = json.dumps(held.body(score)).encode()
        await self._journal.store_result(held.claim_id, JobOutcome.SUCCEEDED, body, at=NOW)

    async def deliver(self, held: Held, score: float) -> None:
        """The Platform API accepts it; the journal is told if it is ours."""
        async with self._database.write() as connection:
            assert await self.queue.result(
                connection, held.job_id, held.hotkey, AcceptedResult.read(held.body(score))
            )
        if held.hotkey == OURS:
            await self._journal.outbox_delivered(held.claim_id, at=NOW)

    async def give_back(self, held: Held) -> None:
        async with self._database.write() as connection:
            await self.queue.release(connection, held.job_id, held.token, held.hotkey, ReleaseReason.DRAIN)

    async def is_refused(self, held: Held) -> None:
        """The journal says that the Platform API would not have it."""
        await self._journal.outbox_refused(held.claim_id, "lease_lost", at=NOW)

    def tamper(self, statement: str, *values: object) -> None:
        """Behind everybody's back."""
        connection = sqlite3.connect(self.api)
        with connection:
            connection.execute(statement, values)
        connection.close()

    def killed(self) -> None:
        """What a kill has one read."""
        self.stored.read(self.folder / "journal.db")

    def figures(self) -> Figures:
        return figures(self.api, self.stored)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}")
    watch(tmp_path / "api.db")
    journal = await SqliteStore.open(tmp_path / "journal.db")
    yield House(tmp_path, database, journal)
    await journal.close()
    await database.close()


def harm(found: Figures) -> dict[str, list[Any]]:
    """What is not as it should be."""
    kinds: dict[str, Sequence[object]] = {
        "lost": found.lost,
        "double": found.double,
        "wrong": found.wrong,
        "unended": found.unended,
        "fenced": found.fenced,
    }
    return {kind: list(each) for kind, each in kinds.items() if each}


async def test_a_result_that_was_stored_before_a_kill_and_delivered_after_it_is_no_harm(house: House) -> None:
    held = await house.claim(await house.job())
    await house.store(held, 0.0001)
    house.killed()
    await house.deliver(held, 0.0001)
    house.killed()
    found = house.figures()
    assert (harm(found), found.outcomes) == ({}, {"succeeded": 1})
    assert (len(house.stored.results), house.stored.waiting) == (1, 1)


async def test_a_stored_result_that_never_arrived_is_lost(house: House) -> None:
    """Also when the job came to an end in a later attempt, after its lease was given back."""
    held = await house.claim(await house.job())
    await house.store(held, 0.0001)
    house.killed()
    await house.give_back(held)
    assert harm(house.figures()) == {"lost": [attempt(held)], "unended": [held.job_id]}
    house.now += 1
    again = await house.claim(held.job_id)
    await house.deliver(again, 0.0001)
    assert harm(house.figures()) == {"lost": [attempt(held)]}


async def test_another_body_than_the_stored_one_is_a_lost_result(house: House) -> None:
    held = await house.claim(await house.job())
    await house.store(held, 0.9)
    house.killed()
    await house.deliver(held, 0.0001)
    assert harm(house.figures()) == {"lost": [attempt(held)]}


async def test_an_accepted_result_that_the_platform_api_lost_again_is_lost(house: House) -> None:
    held = await house.claim(await house.job())
    await house.store(held, 0.0001)
    await house.deliver(held, 0.0001)
    house.killed()
    house.tamper("UPDATE jobs SET result = NULL, result_sha256 = NULL WHERE id = ?", held.job_id)
    assert harm(house.figures())["lost"] == [attempt(held)]


async def test_a_second_acceptance_is_double_though_the_table_shows_one(house: House) -> None:
    held = await house.claim(await house.job())
    await house.deliver(held, 0.0001)
    house.tamper("UPDATE jobs SET status = 'claimed', token = ? WHERE id = ?", held.token, held.job_id)
    await house.deliver(held, 0.0001)
    assert harm(house.figures()) == {"double": [attempt(held)]}


async def test_a_job_taken_by_another_after_its_lease_lapsed_is_fenced_and_not_lost(house: House) -> None:
    """Only where both sides say so: the claim in the database, and the refusal in the journal."""
    held = await house.claim(await house.job())
    await house.store(held, 0.0001)
    house.killed()
    house.now += TERM_MS + 1
    other = await house.claim(held.job_id, OTHER)
    await house.deliver(other, 0.0001)
    assert harm(house.figures()) == {"lost": [attempt(held)]}
    await house.is_refused(held)
    house.killed()
    found = house.figures()
    assert (harm(found), found.taken_over) == ({"fenced": [attempt(held)]}, [held.job_id])


async def test_a_refusal_that_the_platform_api_knows_nothing_of_excuses_nothing(house: House) -> None:
    held = await house.claim(await house.job())
    await house.store(held, 0.0001)
    house.killed()
    await house.is_refused(held)
    house.killed()
    await house.give_back(held)
    house.now += 1
    other = await house.claim(held.job_id, OTHER)
    await house.deliver(other, 0.0001)
    assert harm(house.figures()) == {"lost": [attempt(held)]}


async def test_the_score_of_another_submission_is_wrong(house: House) -> None:
    held = await house.claim(await house.job())
    await house.deliver(held, 0.0002)
    assert harm(house.figures()) == {"wrong": [held.job_id]}


def test_without_the_triggers_nothing_is_counted(tmp_path: Path) -> None:
    """No figure comes of a database that nobody watched."""

    async def made() -> None:
        await (await Database.open(f"sqlite+aiosqlite:///{tmp_path / 'api.db'}")).close()

    asyncio.run(made())
    with pytest.raises(sqlite3.OperationalError, match="chaos_accepted"):
        figures(tmp_path / "api.db", Stored())


def attempt(held: Held) -> Attempt:
    return held.job_id, held.attempt


@pytest.mark.slow(reason="starts a VMM, which builds its image first")
@pytest.mark.timeout(180)
def test_a_vm_and_a_process_that_are_left_are_counted(made_run: tuple[ChaosRun, Stack]) -> None:
    """Whoever made the VM; and whatever still has the run's folder in its command line."""
    run, stack = made_run
    stack.start_vmm()
    identity = create_vm(stack, "somebody-elses")
    left = subprocess.Popen([sys.executable, "-c", "input()", str(stack.state)], stdin=subprocess.PIPE)
    try:
        vms, leftovers = run.leaks()
    finally:
        left.communicate(b"\n", timeout=20)
    assert identity
    assert vms == ["somebody-elses"]
    assert leftovers["processes"] == [str(left.pid)]


@pytest.fixture
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ChaosRun, Stack]]:
    """A run over a stack of which nothing is started."""
    # Not tmp_path: its length would be too much for a Unix socket's path.
    state = tmp_path_factory.mktemp("c")
    state.chmod(0o711)
    stack = make_stack(state)

    def nothing(_: object) -> None:
        pass

    with TcpProxy(("127.0.0.1", stack.api_port)) as proxy:
        rng = random.Random(1)
        yield ChaosRun(stack, proxy, term=6, rng=rng, queue=5, say=nothing, shown=nothing), stack
    stack.stop()
    shutil.rmtree(state)


def create_vm(stack: Stack, name: str) -> str:
    """A VM that was never started, made through the VMM's API."""
    token = (stack.state / "vmm" / "token").read_text().strip()

    def call(method: str, message: dict[str, Any]) -> dict[str, Any]:
        connection = UnixConnection(stack.vmm_socket)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("POST", f"/prpc/{method}?json", json.dumps(message), headers)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    image = call("ListImages", {})["images"][0]
    digest = json.loads(image["description"])["runtimes"]["platform-runtime"]
    services = {"services": {"one": {"image": f"platform-runtime@{digest}", "command": ["true"]}}}
    compose = {
        "manifest_version": 2,
        "name": "t",
        "runner": "docker-compose",
        "docker_compose_file": json.dumps(services),
    }
    message = {"name": name, "image": image["name"], "vcpu": 1, "memory": 128, "disk_size": 1}
    message |= {"compose_file": json.dumps(compose), "no_tee": True, "stopped": True}
    return str(call("CreateVm", message)["id"])


@pytest.mark.parametrize("seed", range(20))
def test_a_full_plan_has_every_point_and_kills_each_part(seed: int) -> None:
    """Whatever the seed; those of a job's life twice. The same seed gives the same plan."""
    steps = full(seed)
    strikes = [step for step in steps if isinstance(step, Strike)]
    counts = Counter(step.point for step in strikes)
    assert set(counts) == set(POINTS)
    assert all(counts[point] == 2 for point in POINTS if not point.startswith("instance_"))
    assert {step.meanwhile for step in strikes} == {None, "platform-api", "vmm"}
    assert {(step.nth, step.update) for step in strikes if step.point == "instance_switched"} == {
        (1, None),
        (2, Version.GOOD),
    }
    assert steps == full(seed)
