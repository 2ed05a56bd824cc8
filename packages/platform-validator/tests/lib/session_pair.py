"""A session and the scripted guest that it calls, over a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ports import free_port

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.messages import JobExecute, ValuesRequest, ValuesResult
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import AttestationRefused, SessionLost, SessionRefused
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


@asynccontextmanager
async def session_pairs() -> AsyncIterator[MakePair]:
    """Makes pairs that end with it."""
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


async def lost(pair: Pair) -> Exception:
    """Why a job that this runs is lost."""
    with pytest.raises((SessionLost, SessionRefused, AttestationRefused)) as raised:
        await pair.execute()
    return raised.value
