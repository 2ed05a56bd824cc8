"""Version 1 of the session, as deployed challenges speak it: one connection, one job, nothing resumed.

No pings (their synchronous handlers block for minutes), no `configure`, no `ready`; an ORM query is answered
that there is none; a submission goes into the payload.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from platform_protocol.session.errors import MessageInvalid
from platform_protocol.session.messages import JobError
from platform_protocol.session.v1 import MAX_MESSAGE, VERSION, EnvelopeChannel
from platform_validator.cvm.errors import SessionLost
from platform_validator.cvm.reading import ReadMessage, read_message
from platform_validator.cvm.running import RunningJob

_MAX_ERROR = 16_384
_NO_ORM = "this validator offers no ORM"

_log = structlog.get_logger(__name__)


class SessionV1:
    """One version 1 connection after its handshake."""

    def __init__(self, socket: ClientConnection, channel: EnvelopeChannel, vm: str) -> None:
        self._socket = socket
        self._channel = channel
        self._vm = vm
        self._running: RunningJob | None = None
        self.ignored = 0

    async def begin(self) -> None:
        """Say that we are here, once."""
        await self._send({"type": "orm_ready"})

    async def give(self, running: RunningJob) -> None:
        """Have it run a job. It acknowledges nothing: the job counts as started once it is sent.

        Raises:
            SessionLost: It is still at work for a job that nobody waits for: version 1 cannot end one.
        """
        if self._running is not None and not self._running.result.done():
            raise SessionLost(
                f"{self._vm} may still run {self._running.order.job_id}, which version 1 cannot end"
            )
        self._running = running
        order, payload = running.order, dict(running.order.payload)
        if running.submission is not None:
            data = await asyncio.to_thread(running.submission.read_bytes)
            payload["submission"] = {
                "filename": order.submission_name or running.submission.name,
                "sha256": order.submission_sha256,
                "data": base64.b64encode(data).decode("ascii"),
            }
        job = {"job_id": order.job_id, "job_name": order.job_name, "payload": payload}
        running.given = True
        await self._send({"type": "job_execute"} | job)
        running.started()

    async def listen(self) -> None:
        """Until the connection ends.

        Raises:
            SessionError: A frame that does not open.
            WebSocketException: The connection broke.
        """
        try:
            async for frame in self._socket:
                await self._hear(frame)
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self._too_large()
            raise

    async def _hear(self, frame: str | bytes) -> None:
        message, result_bytes = await _object(self._channel.open(frame) if isinstance(frame, str) else None)
        if message.get("type") == "job_result":
            self._finished(message, result_bytes)
        elif message.get("type") == "orm_query":
            await self._refuse_query(message)
        else:
            self.ignored += 1
            _log.debug("session_v1_message_ignored", vm=self._vm, count=self.ignored)

    async def _refuse_query(self, message: dict[str, Any]) -> None:
        """Their queries have their id in the message or in its payload, and wait for it half a minute."""
        payload = message.get("payload")
        inner = payload.get("query_id") if isinstance(payload, dict) else None
        query_id = message.get("query_id", inner)
        answer = {
            "type": "error",
            "error": _NO_ORM,
            "message": _NO_ORM,
            "message_id": message.get("message_id", query_id),
            "query_id": query_id,
        }
        await self._send(answer)

    def _too_large(self) -> None:
        """Nothing but a result is that large, and it would be as large at the next try."""
        if self._running is not None and not self._running.result.done():
            text = f"expected a message of at most {MAX_MESSAGE} bytes"
            failure = JobError(code="result_too_large", message=text)
            self._running.finish(result=None, error=failure, evidence=None, seq=0, session=VERSION)

    def _finished(self, message: dict[str, Any], result_bytes: int | None) -> None:
        running = self._running
        if running is None or message.get("job_id") != running.order.job_id or running.result.done():
            return
        result, failure = message.get("result"), None
        if "error" in message and message["error"] is not None:
            text = message["error"] if isinstance(message["error"], str) else json.dumps(message["error"])
            failure = JobError(code="handler_error", message=text[:_MAX_ERROR])
        elif not isinstance(result, dict):
            failure = JobError(code="no_result", message="expected an object as result")
        answer = result if failure is None and isinstance(result, dict) else None
        running.finish(
            result=answer, error=failure, evidence=None, seq=0, result_bytes=result_bytes, session=VERSION
        )

    async def _send(self, message: dict[str, Any]) -> None:
        await self._socket.send(self._channel.seal(json.dumps(message).encode()))


async def _object(plaintext: bytes | None) -> tuple[dict[str, Any], int | None]:
    """A message, and the length of a large result; an empty one for whatever is none."""
    try:
        read = ReadMessage(None) if plaintext is None else await read_message(plaintext)
    except MessageInvalid:
        return {}, None
    return (read.value if isinstance(read.value, dict) else {}), read.result_bytes
