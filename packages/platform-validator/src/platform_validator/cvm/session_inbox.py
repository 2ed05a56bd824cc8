"""What a guest says, taken in its order; the work over it goes on beside, and only so much at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from platform_protocol.ids import VmName
from platform_protocol.session.errors import SessionError
from platform_protocol.session.messages import (
    GuestError,
    GuestHello,
    JobProgress,
    JobResult,
    Log,
    Pong,
    Ready,
    WeightsResponse,
)
from platform_validator.cvm.errors import SessionRefused
from platform_validator.cvm.session_jobs import SessionJobs
from platform_validator.cvm.session_link import Heard, SessionLink
from platform_validator.cvm.session_requests import SessionRequests

_AT_WORK = 64
"""Answers and acknowledgements on their way at once; at so many nothing more is read from the guest."""


class SessionInbox:
    """Brings each message to whom it is for.

    Args:
        link: The connection of the moment.
        jobs: Who hears of jobs.
        requests: Who hears of requests and answers.
        ready: Set when the SDK says `ready`, or why it never will.
        vm: For the texts of errors.
    """

    def __init__(
        self,
        link: SessionLink,
        jobs: SessionJobs,
        requests: SessionRequests,
        *,
        ready: asyncio.Future[None],
        vm: VmName,
    ) -> None:
        self._link = link
        self._jobs = jobs
        self._requests = requests
        self._ready = ready
        self._vm = vm
        self._at_work: set[asyncio.Task[None]] = set()

    async def take(self, heard: Heard, tasks: asyncio.TaskGroup) -> None:
        """Bring one message where it belongs. Work that may outlive its connection is done in `tasks`.

        Raises:
            SessionError: A second hello.
        """
        while len(self._at_work) >= _AT_WORK:
            await asyncio.wait(self._at_work, return_when=asyncio.FIRST_COMPLETED)
        work = self._take(heard)
        if work is not None:
            task = tasks.create_task(work)
            self._at_work.add(task)
            task.add_done_callback(self._at_work.discard)

    def _take(self, heard: Heard) -> Coroutine[Any, Any, None] | None:
        """What is left to do for a message."""
        match message := heard.message:
            case GuestHello():
                raise SessionError("expected one hello, first")
            case Pong():
                self._link.ponged()
                return None
            case JobProgress() | Log():
                self._jobs.tell(message)
                return None
            case JobResult():
                # Its acknowledgement is whoever waits for it to give, once it is stored.
                if self._jobs.finish(message, heard.result_bytes):
                    return None
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(None)
            case GuestError():
                self._refused(message)
            case WeightsResponse():
                self._requests.weighed(message)
            case _:
                return self._requests.answer(message)
        return self._link.acknowledge(message.seq)

    def _refused(self, message: GuestError) -> None:
        error = SessionRefused(f"the SDK in {self._vm} says {message.code}: {message.message}"[:1000])
        if self._ready.done():
            self._jobs.refuse(message.request_id, error)
        else:
            self._ready.set_exception(error)
