"""The session against scripted guests of the real protocol: resume, loss, silence, refusals, version 1."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from websockets.asyncio.server import ServerConnection, serve

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.messages import (
    GuestError,
    JobError,
    JobExecute,
    JobResult,
    Log,
    ValuesGet,
    ValuesRequest,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.session.v1 import EnvelopeChannel, derive_key
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import (
    AttestationRefused,
    AttestationUnavailable,
    SessionLost,
    SessionRefused,
)
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.session import CvmSession
from platform_validator.cvm.testing_guest import GuestScript, Outcome, ScriptedGuest

CHALLENGE = ChallengeId("00000000-0000-4000-8000-000000000001")
VM = VmName("pv-0123456789-a")
SECRET = b"s" * 32
JOB = JobId("22222222-2222-4222-8222-222222222222")
CONFIG = UserConfig(
    vm=VM,
    launch_secret=UserConfig.encode_secret(SECRET),
    validator_base_url="http://127.0.0.1:1",
    proxy_url=None,
    max_lifetime_s=60,
    hard_lifetime_s=60,
)
PACE = SessionPace(dial=2, handshake=2, send=2, resume_for=0.3, retry=0.01, retry_most=0.02)


class Values:
    """Keeps what is written; waits at `gate` before it answers."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.error: Exception | None = None

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        self.asked.append(request.request_id)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return ValuesResult(request_id=request.request_id, value=1, version=1)


@dataclass
class Pair:
    """Both ends. `judged` are the offers; `verdict` is raised for the next one."""

    guest: ScriptedGuest
    session: CvmSession
    values: Values
    running: asyncio.Task[None]
    judged: list[Offer] = field(default_factory=list)
    verdict: Exception | None = None
    told: list[str] = field(default_factory=list)

    async def execute(self, submission: Path | None = None, job: JobId = JOB) -> GuestResult:
        digest = None
        if submission is not None:
            digest = hashlib.sha256(submission.read_bytes()).hexdigest()
        async with asyncio.timeout(10):
            return await self.session.execute(
                JobOrder(job, 1, CHALLENGE, None, {"x": 1}, digest),
                submission,
                on_started=lambda _already: self.told.append("started"),
                on_progress=lambda percent, message: self.told.append(f"{percent:.0f} {message}"),
                on_log=lambda level, message: self.told.append(f"{level}: {message}"),
            )

    async def ready(self) -> None:
        async with asyncio.timeout(10):
            await self.session.ready()


MakePair = Callable[..., Awaitable[Pair]]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            script: GuestScript | None = None, *, secret: bytes = SECRET, pace: SessionPace = PACE
        ) -> Pair:
            port, values = free_port(), Values()
            guest = ScriptedGuest(CONFIG, script or GuestScript())
            group = await stack.enter_async_context(asyncio.TaskGroup())

            async def judge(offer: Offer) -> None:
                pair.judged.append(offer)
                if pair.verdict is not None:
                    raise pair.verdict

            session = CvmSession(
                Callee(
                    ("127.0.0.1", port), VM, secret, "11111111-1111-4111-8111-111111111111", Hotkey("5DD")
                ),
                challenge_id=CHALLENGE,
                env={"A": "b"},
                judge=judge,
                values=values,
                pace=pace,
            )
            serving = group.create_task(guest.serve("127.0.0.1", port))
            pair = Pair(guest, session, values, group.create_task(session.run()))
            stack.callback(serving.cancel)
            stack.callback(session.close)
            return pair

        yield make


def gated(gate: asyncio.Event) -> GuestScript:
    """Work that waits."""

    async def work(_guest: ScriptedGuest, _order: JobExecute, _submission: bytes) -> Outcome:
        await gate.wait()
        return {"score": 1.0}

    return GuestScript(work=work)


async def test_a_job_is_told_of_from_its_start_to_its_result(make_pair: MakePair) -> None:
    """Started first, then progress and logs as they come, then the result with its number."""

    async def work(guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> Outcome:
        await guest.say(Log(level="info", message="hello", job_id=order.job_id))
        return {"score": 0.5, "payload": order.payload}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    result = await pair.execute()
    assert result.result == {"score": 0.5, "payload": {"x": 1}}
    assert (result.error, result.attempt, result.job_id) == (None, 1, JOB)
    assert pair.told == ["started", "0 running", "info: hello"]


async def test_an_empty_error_is_a_failure(make_pair: MakePair) -> None:
    """Failure is the presence of `error`."""

    async def work(_guest: ScriptedGuest, _order: JobExecute, _submission: bytes) -> Outcome:
        return JobError()

    pair = await make_pair(GuestScript(work=work))
    result = await pair.execute()
    assert (result.result, result.error) == (None, JobError())


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 5])
async def test_a_submission_arrives_whole(make_pair: MakePair, tmp_path: Path, size: int) -> None:
    """In chunks of 1 MiB, also an empty one."""
    path, data = tmp_path / "submission", os.urandom(size)
    path.write_bytes(data)
    got: list[bytes] = []

    async def work(_guest: ScriptedGuest, _order: JobExecute, submission: bytes) -> Outcome:
        got.append(submission)
        return {}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    await pair.execute(path)
    assert got == [data]


async def test_a_job_given_before_the_session_is_up_is_run_once_it_is(make_pair: MakePair) -> None:
    """And given once."""
    pair = await make_pair()
    result = await pair.execute()
    assert result.result is not None
    assert len(pair.guest.orders) == 1


async def test_a_dropped_connection_is_resumed_and_the_job_goes_on(make_pair: MakePair) -> None:
    """The same session, a whole new handshake, configured once, ordered once."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.guest.drop()
        await pair.guest.until(lambda guest: guest.connections == 2)
        gate.set()
    assert job.result().result == {"score": 1.0}
    assert (len(pair.guest.orders), len(pair.guest.configured)) == (1, 1)
    assert len(pair.judged) == 2
    assert pair.judged[0].report_data != pair.judged[1].report_data
    assert pair.told.count("started") == 1


async def test_a_result_that_was_not_acknowledged_comes_again_and_counts_once(make_pair: MakePair) -> None:
    """Acknowledged is what the caller has stored, and nothing before."""
    pair = await make_pair()
    await pair.ready()
    result = await pair.execute()
    assert pair.guest.pending == 1
    pair.guest.drop()
    await pair.guest.until(lambda guest: guest.connections == 2)
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)


async def test_an_acknowledgement_made_while_disconnected_is_sent_after_the_resume(
    make_pair: MakePair,
) -> None:
    """It is not lost, and costs the new connection no number."""
    pair = await make_pair()
    await pair.ready()
    result = await pair.execute()
    pair.guest.drop()
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)
    assert (await pair.execute(job=JobId("another"))).result is not None


async def test_a_values_request_is_answered_though_its_connection_broke(make_pair: MakePair) -> None:
    """Asked over one connection, answered over the next; applied once."""
    answers: list[ValuesResult] = []

    async def work(guest: ScriptedGuest, _order: JobExecute, _submission: bytes) -> Outcome:
        answers.append(await guest.ask(ValuesGet(request_id="r1", key="k")))
        return {}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    pair.values.gate.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(pair.execute())
        async with asyncio.timeout(5):
            while not pair.values.asked:
                await asyncio.sleep(0)
        pair.guest.drop()
        await pair.guest.until(lambda guest: guest.connections == 2)
        pair.values.gate.set()
    assert [answer.value for answer in answers] == [1]
    assert pair.values.asked == ["r1"]


async def test_an_answer_that_was_lost_on_its_way_is_sent_again(make_pair: MakePair) -> None:
    """It left, the connection broke before it arrived: the resume brings it."""
    pair = await make_pair()
    await pair.ready()
    await pair.guest.ask(ValuesSet(request_id="r1", key="k", value=1))
    pair.guest._asked["r1"] = waiting = asyncio.get_running_loop().create_future()
    pair.guest.drop()
    async with asyncio.timeout(5):
        assert (await waiting).request_id == "r1"
    assert pair.values.asked == ["r1"]


async def test_a_rebooted_guest_is_lost(make_pair: MakePair) -> None:
    """It does not know the session: the job does not silently begin again."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.guest.reboot()
    assert "rebooted" in str(job.result())
    assert len(pair.guest.orders) == 1


async def lost(pair: Pair) -> Exception:
    with pytest.raises((SessionLost, SessionRefused, AttestationRefused)) as raised:
        await pair.execute()
    return raised.value


async def test_a_guest_that_cannot_be_reached_is_lost_in_time(make_pair: MakePair) -> None:
    """Dialled until `resume_for`, then given up."""
    pair = await make_pair(pace=SessionPace(dial=0.1, resume_for=0.1, retry=0.01, retry_most=0.02))
    pair.session._callee = Callee(("127.0.0.1", free_port()), VM, SECRET, "s", Hotkey("5DD"))
    with pytest.raises(SessionLost, match="cannot be reached"):
        await pair.ready()


async def test_three_unanswered_pings_mean_reconnect(make_pair: MakePair) -> None:
    """A connection that is silently dead is resumed."""
    gate = asyncio.Event()
    script = gated(gate)
    pair = await make_pair(script, pace=SessionPace(ping=0.02, resume_for=2, retry=0.01))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        script.answers_pings = False
        await pair.guest.until(lambda guest: guest.connections == 2)
        script.answers_pings = True
        gate.set()
    assert job.result().error is None


@pytest.mark.parametrize(("frames", "age"), [(8, 3600.0), (2**31, 0.05)])
async def test_keys_are_replaced_by_a_resume_in_the_middle_of_a_job(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, frames: int, age: float
) -> None:
    """After so many frames, or so long; the job is ordered once, and its result comes once."""
    monkeypatch.setattr("platform_validator.cvm.session._REKEY_FRAMES", frames)
    gate = asyncio.Event()
    pair = await make_pair(gated(gate), pace=SessionPace(ping=0.02, resume_for=5, retry=0.01, rekey=age))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: guest.connections >= 3 and len(guest.orders) == 1)
        gate.set()
    assert job.result().error is None
    assert len({offer.report_data for offer in pair.judged}) == len(pair.judged) >= 3
    assert len(pair.guest.orders) == 1


async def test_a_guest_that_asks_faster_than_it_is_answered_has_to_wait(make_pair: MakePair) -> None:
    """No more than 64 requests are held; the rest stays with the guest, and is answered later."""
    pair = await make_pair()
    await pair.ready()
    pair.values.gate.clear()
    asked = [
        asyncio.create_task(pair.guest.ask(ValuesGet(seq=0, request_id=f"r{number}", key="k")))
        for number in range(200)
    ]
    async with asyncio.timeout(10):
        while len(pair.values.asked) < 64:
            await asyncio.sleep(0)
    for _ in range(500):
        await asyncio.sleep(0)
    held = len(pair.values.asked)
    pair.values.gate.set()
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*asked)
    assert held == 64
    assert {answer.request_id for answer in answers} == {f"r{number}" for number in range(200)}


async def test_a_guest_that_does_not_know_the_launch_secret_is_refused_at_once(make_pair: MakePair) -> None:
    """4403: dialling again would change nothing."""
    pair = await make_pair(secret=b"x" * 32, pace=SessionPace(resume_for=60))
    with pytest.raises(SessionRefused, match="launch secret"):
        await pair.ready()


async def test_nothing_goes_into_a_guest_that_the_policy_refused(make_pair: MakePair) -> None:
    """No environment, no job, no submission."""
    pair = await make_pair()
    pair.verdict = AttestationRefused("compose_hash", "another one")
    with pytest.raises(AttestationRefused):
        await pair.ready()
    assert "compose_hash" in str(await lost(pair))
    assert (pair.guest.configured, pair.guest.orders) == ([], [])


async def test_the_policy_judges_every_resume(make_pair: MakePair) -> None:
    """A guest that was fine once is not fine for ever."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.verdict = AttestationRefused("instance_id", "another one")
        pair.guest.drop()
    assert isinstance(job.result(), AttestationRefused)


async def test_collateral_that_is_away_for_a_moment_loses_no_running_job(make_pair: MakePair) -> None:
    """At a resume it is judged again until it can be; at the first handshake it is the end."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate), pace=SessionPace(resume_for=5, retry=0.01, retry_most=0.02))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(pair.execute())
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.verdict = AttestationUnavailable("the collateral service is down")
        pair.guest.drop()
        async with asyncio.timeout(5):
            while len(pair.judged) < 3:
                await asyncio.sleep(0)
        pair.verdict = None
        gate.set()
    assert job.result().error is None
    first = await make_pair()
    first.verdict = AttestationUnavailable("the collateral service is down")
    with pytest.raises(AttestationUnavailable):
        await first.ready()


async def test_a_refused_job_says_why(make_pair: MakePair) -> None:
    """The SDK's error message ends the job."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        await pair.guest.say(GuestError(code="busy", message="this VM has its one job"))
    assert "one job" in str(job.result())


async def test_results_that_nobody_waits_for_do_not_hold_up_the_others(make_pair: MakePair) -> None:
    """Of another job, or a second one: dropped and acknowledged, and never taken for this job's."""

    async def work(guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> Outcome:
        await guest.say(JobResult(job_id=JobId("another"), result={"score": 99.0}))
        return {"score": 0.5}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    result = await pair.execute()
    assert result.result == {"score": 0.5}
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)
    await pair.guest.say(JobResult(job_id=JOB, result={"score": 99.0}))
    await pair.guest.until(lambda guest: guest.pending == 0)


async def test_a_cancelled_wait_leaves_the_session_usable(make_pair: MakePair) -> None:
    """A timed-out job is cancelled inside, and the next one runs."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    job = asyncio.ensure_future(pair.execute())
    await pair.guest.until(lambda guest: len(guest.orders) == 1)
    job.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await job
    await pair.session.cancel(JOB, "timeout")
    await pair.guest.until(lambda guest: [c.reason for c in guest.cancelled] == ["timeout"])
    gate.set()
    assert (await pair.execute(job=JobId("next"))).result == {"score": 1.0}


async def test_weights_are_asked_for_and_answered(make_pair: MakePair) -> None:
    """Over a dropped connection too."""
    pair = await make_pair(GuestScript(weights={"5A": 0.75}))
    await pair.ready()
    assert await pair.session.weights([{"score": 1.0}]) == {"5A": 0.75}


async def test_a_fault_over_one_guest_ends_its_session_alone(make_pair: MakePair) -> None:
    """`run` never raises: the fleet's other sessions go on."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    pair.values.error = RuntimeError("a bug")
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        await pair.guest.say(ValuesGet(request_id="r", key="k"))
    assert isinstance(job.result(), SessionLost)
    await pair.running


async def test_a_closed_session_ends_whoever_waits(make_pair: MakePair) -> None:
    """The CVM is about to be destroyed."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.session.close()
    assert "closed" in str(job.result())


async def test_a_session_whose_task_is_cancelled_ends_whoever_waits(make_pair: MakePair) -> None:
    """Nobody waits for ever for a loop that is gone."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        pair.running.cancel()
    assert "has ended" in str(job.result())


# Version 1


class OldGuest:
    """A challenge that speaks version 1 alone. `queries` are the answers to its ORM queries."""

    def __init__(self) -> None:
        self.port = free_port()
        self.jobs: list[dict[str, Any]] = []
        self.queries: list[dict[str, Any]] = []
        self.hangs_up = False

    async def serve(self, connection: ServerConnection) -> None:
        begin = json.loads(await connection.recv())
        key = X25519PrivateKey.generate()
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        answer = {"type": "attestation_response", "quote": "", "event_log": {}, "rtmrs": {}}
        await connection.send(json.dumps(answer | {"chal_x25519_pub": public}))
        ok = json.loads(await connection.recv())
        if ok["type"] != "attestation_ok":
            return
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(begin["val_x25519_pub"]))
        salt = base64.b64decode(ok["hkdf_salt"])
        channel = EnvelopeChannel(derive_key(key.exchange(peer), salt), os.urandom)
        async for frame in connection:
            message = json.loads(channel.open(str(frame)) or b"{}")
            if message["type"] == "orm_ready":
                await connection.send("not an envelope")
                await connection.send(channel.seal(b'{"type":"orm_query","query_id":"q1"}'))
            elif message["type"] == "error":
                self.queries.append(message)
            elif message["type"] == "job_execute":
                self.jobs.append(message)
                if self.hangs_up:
                    return
                result = {"type": "job_result", "job_id": message["job_id"], "result": {"score": 0.25}}
                await connection.send(channel.seal(json.dumps(result).encode()))


@contextlib.asynccontextmanager
async def with_old_guest(*, allow_v1: bool) -> AsyncIterator[tuple[OldGuest, CvmSession]]:
    guest = OldGuest()

    async def accept(_offer: Offer) -> None:
        return

    callee = Callee(("127.0.0.1", guest.port), VM, SECRET, "s", Hotkey("5DD"), allow_v1=allow_v1)
    session = CvmSession(
        callee, challenge_id=CHALLENGE, env={}, judge=accept, values=Values(), pace=SessionPace()
    )
    async with (
        serve(guest.serve, "127.0.0.1", guest.port, close_timeout=0.1),
        asyncio.TaskGroup() as group,
    ):
        group.create_task(session.run())
        try:
            yield guest, session
        finally:
            session.close()


async def run_old(session: CvmSession, submission: Path | None) -> tuple[GuestResult, list[str]]:
    told: list[str] = []
    order = JobOrder(JOB, 1, CHALLENGE, "name", {"x": 1}, None if submission is None else "d" * 64)
    async with asyncio.timeout(5):
        result = await session.execute(
            order,
            submission,
            on_started=lambda _already: told.append("started"),
            on_progress=lambda percent, message: None,
            on_log=lambda level, message: None,
        )
    return result, told


async def test_a_version_1_challenge_runs_a_job_where_it_is_allowed(tmp_path: Path) -> None:
    """The submission goes into the payload, an ORM query is answered, stray frames are ignored."""
    path = tmp_path / "submission.tar"
    path.write_bytes(b"bytes")
    async with with_old_guest(allow_v1=True) as (guest, session):
        async with asyncio.timeout(5):
            await session.ready()
        result, told = await run_old(session, path)
        await session.acknowledge(result)
    assert (result.result, result.evidence, told) == ({"score": 0.25}, None, ["started"])
    assert guest.jobs == [
        {
            "type": "job_execute",
            "job_id": JOB,
            "job_name": "name",
            "payload": {
                "x": 1,
                "submission": {"filename": "submission.tar", "sha256": "d" * 64, "data": "Ynl0ZXM="},
            },
        }
    ]
    assert [(q["message"], q["query_id"]) for q in guest.queries] == [("this validator offers no ORM", "q1")]


async def test_a_version_1_challenge_is_refused_where_it_is_not_allowed() -> None:
    """And the reason names the setting."""
    async with with_old_guest(allow_v1=False) as (_guest, session):
        with pytest.raises(SessionRefused, match="allow_session_v1"):
            async with asyncio.timeout(5):
                await session.ready()


async def test_a_version_1_result_is_lost_with_its_connection() -> None:
    """There is no resume: the CVM is lost."""
    async with with_old_guest(allow_v1=True) as (guest, session):
        guest.hangs_up = True
        async with asyncio.timeout(5):
            await session.ready()
        with pytest.raises(SessionLost, match="cannot resume"):
            await run_old(session, None)
