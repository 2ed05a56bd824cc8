"""The session port: what a fleet needs of the attested session with the SDK in one CVM.

Two implementations: `session.CvmSession` over a WebSocket, and the simulation's, over a guest in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.messages import ValuesRequest, ValuesResult
from platform_validator.cvm.connection import Callee, Judge, SessionPace
from platform_validator.cvm.jobs import GuestResult, JobOrder


class ValuesHandler(Protocol):
    """Answers a challenge's values requests; refusals are answers."""

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        """Answer one; durable when it returns."""


class Session(Protocol):
    """One session with one CVM, over any number of connections."""

    async def run(self) -> None:
        """Keep a connection until closed or lost. Never raises."""

    async def ready(self) -> None:
        """Wait until the SDK is attested, configured and says `ready`.

        Raises:
            AttestationRefused: The policy refused it.
            AttestationUnavailable: It could not be judged.
            SessionRefused: The SDK refused, or its start-up handlers failed.
            SessionLost: It cannot be reached, or does not know a session that is resumed.
            StoreUnavailable: The finding could not be journaled.
        """

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """Have the SDK run a job, or go on with it, and wait for its result.

        `on_started` marks the SDK's acknowledgement, and says whether it had the job before this call.

        Raises:
            SessionRefused: The SDK will not run it.
            SessionLost: The session cannot be resumed.
        """

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end a job; a lost connection is no error."""

    async def confirm(self) -> None:
        """Return once the SDK has shown that it lives.

        Raises:
            SessionLost: It does not answer, and the session cannot be resumed.
        """

    async def acknowledge(self, result: GuestResult) -> None:
        """The result is durable here: the SDK may forget it."""

    async def lost(self) -> Exception:
        """Wait until the session can go on no more, also because it was closed; why."""

    def close(self) -> None:
        """End `run`; the CVM is about to be destroyed."""


class SessionMaker(Protocol):
    """Makes the session of one CVM; `CvmSession` itself is one."""

    def __call__(
        self,
        callee: Callee,
        *,
        challenge_id: ChallengeId,
        env: Mapping[str, str],
        judge: Judge,
        values: ValuesHandler,
        pace: SessionPace | None = None,
        resume: bool = False,
    ) -> Session:
        """A session that `run` will keep. Arguments as `CvmSession`'s."""
