"""A session with a deployed challenge, which speaks version 1.

The other end is `deployed_challenge`, which shares no code with ours.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deployed_challenge import DeployedChallenge
from session_pair import CHALLENGE, JOB, SECRET, VM, Values

from platform_protocol.ids import Hotkey, JobId
from platform_protocol.session.v2 import Offer
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.session import CvmSession

PACE = SessionPace(dial=20, handshake=20, send=20, ping=0.02, resume_for=2, retry=0.01, retry_most=0.05)


class Line:
    """A session with one of them; `judged` are its offers."""

    def __init__(self, session: CvmSession, judged: list[Offer]) -> None:
        self.session, self.judged = session, judged

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            await self.session.ready()

    async def run(
        self,
        submission: Path | None = None,
        *,
        name: str | None = "name",
        payload: dict[str, Any] | None = None,
        job: JobId = JOB,
        within: float = 50,
    ) -> GuestResult:
        """One job."""
        digest = None if submission is None else hashlib.sha256(submission.read_bytes()).hexdigest()
        filename = None if submission is None else "agent.tar.gz"
        async with asyncio.timeout(within):
            return await self.session.execute(
                JobOrder(job, 1, CHALLENGE, name, payload or {"x": 1}, digest, filename),
                submission,
                on_started=lambda _already: None,
                on_progress=lambda percent, message: None,
                on_log=lambda level, message: None,
            )


@asynccontextmanager
async def line_to(
    peer: DeployedChallenge, *, allow_v1: bool = True, env: dict[str, str] | None = None, resume: bool = False
) -> AsyncIterator[Line]:
    """A served challenge, and a session that calls it."""
    judged: list[Offer] = []

    async def accept(offer: Offer) -> None:
        judged.append(offer)

    with peer.served():
        session = CvmSession(
            Callee(("127.0.0.1", peer.port), VM, SECRET, "s", Hotkey("5DD"), allow_v1=allow_v1),
            challenge_id=CHALLENGE,
            env=env or {},
            judge=accept,
            values=Values(),
            pace=PACE,
            resume=resume,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            try:
                yield Line(session, judged)
            finally:
                session.close()
