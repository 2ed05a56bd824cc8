"""Push to connected validators. Hints: whoever misses one finds out at the next poll."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.websockets import WebSocket, WebSocketDisconnect

from platform_api.auth import Authenticator, Signed
from platform_api.clock import now_ms, rfc3339
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.tables import changes

NORMAL, REVOKED, ELSEWHERE = 1000, 4401, 4409
GONE = 0
"""Not a close code: the other side has closed already."""
_BACKLOG = 1000
_SEND = 10.0
_LOOK_EVERY = 0.5
_KEPT = 10_000
_ORDERING = 0x70757368
"""Advisory lock: on PostgreSQL positions commit in their order, so that a follower misses none."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Line:
    """One connection: hints that wait to be sent, and the close code once it must end."""

    signed: Signed
    waiting: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(_BACKLOG))
    ending: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def end(self, code: int) -> None:
        if not self.ending.done():
            self.ending.set_result(code)

    def offer(self, message: dict[str, Any]) -> None:
        """Queue it; a validator that does not read loses hints, and a gap in seq tells it to poll."""
        with contextlib.suppress(asyncio.QueueFull):
            self.waiting.put_nowait(message)


class Push:
    """Follows the table of changes, so that a change made by another process is pushed too.

    Every change is a row written in the transaction that makes it; the server looks every half second, and
    at once after a change of its own.
    """

    def __init__(self, database: Database, auth: Authenticator) -> None:
        self._database = database
        self._auth = auth
        self._stream = str(uuid.uuid4())
        self._seq = 0
        self._position: int | None = None
        self._lines: dict[str, _Line] = {}
        self._wake = asyncio.Event()

    @property
    def connected(self) -> int:
        """How many validators are connected."""
        return len(self._lines)

    def wake(self) -> None:
        """Something changed in this process: look at once."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._look()
            except (SQLAlchemyError, OSError) as error:
                log.warning("push_cannot_look", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._wake.wait()
            self._wake.clear()

    async def serve(self, socket: WebSocket, signed: Signed) -> None:
        """One accepted connection, until it closes, is replaced, or its registration is revoked."""
        line = _Line(signed)
        old = self._lines.get(signed.hotkey)
        if old is not None:
            old.end(NORMAL if old.signed.instance == signed.instance else ELSEWHERE)
        self._lines[signed.hotkey] = line
        hello = {"type": "hello", "stream": self._stream, "seq": self._seq, "server_time": rfc3339(now_ms())}
        log.info("validator_connected", hotkey=signed.hotkey, instance=signed.instance)
        try:
            await self._check_still_registered(line)
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(_until_gone(socket, line))
                sending = tasks.create_task(_send_all(socket, line, hello))
                code = await line.ending
                listening.cancel()
                sending.cancel()
            if code != GONE:
                async with asyncio.timeout(_SEND):
                    await socket.close(code)
        except* (WebSocketDisconnect, TimeoutError, RuntimeError, OSError):
            log.debug("validator_connection_broke", hotkey=signed.hotkey)
        finally:
            if self._lines.get(signed.hotkey) is line:
                del self._lines[signed.hotkey]
        log.info("validator_disconnected", hotkey=signed.hotkey, instance=signed.instance)

    async def _check_still_registered(self, line: _Line) -> None:
        """A ban between the upgrade's check and the line's entry was published to nobody."""
        try:
            await self._auth.registered(line.signed.hotkey)
        except ApiError:
            line.end(REVOKED)

    async def _look(self) -> None:
        async with self._database.read() as connection:
            if self._position is None:
                newest = await connection.scalar(sa.select(sa.func.max(changes.c.position)))
                self._position = int(newest or 0)
            query = sa.select(changes).where(changes.c.position > self._position).order_by(changes.c.position)
            rows = (await connection.execute(query)).all()
        for row in rows:
            self._position = row.position
            self._publish(row.kind, row.subject, row.detail)

    def _publish(self, kind: str, subject: str, detail: str) -> None:
        if kind == "revoked":
            if subject in self._lines:
                self._lines[subject].end(REVOKED)
            return
        self._seq += 1
        message: dict[str, Any] = {"type": kind, "seq": self._seq}
        if kind == "new_job":
            message |= {"job_id": subject, "challenge_id": detail}
        elif kind == "challenge_updated":
            message |= {"challenge_id": subject, "github_commit": detail}
        else:
            message |= {"job_id": subject}
        for line in self._lines.values():
            line.offer(message)


async def record_change(connection: AsyncConnection, kind: str, subject: str, detail: str = "") -> None:
    """Note a change for all processes that push, in the transaction that makes it."""
    if connection.dialect.name == "postgresql":
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ORDERING)))
    row = {"kind": kind, "subject": subject, "detail": detail}
    added = sa.insert(changes).values(**row).returning(changes.c.position)
    position = int((await connection.execute(added)).scalar_one())
    if position % 1000 == 0:
        await connection.execute(sa.delete(changes).where(changes.c.position < position - _KEPT))


async def _send_all(socket: WebSocket, line: _Line, hello: dict[str, Any]) -> None:
    message = hello
    while True:
        async with asyncio.timeout(_SEND):
            await socket.send_text(json.dumps(message))
        message = await line.waiting.get()


async def _until_gone(socket: WebSocket, line: _Line) -> None:
    """What validators send is ignored; its end ends the connection."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass
    line.end(GONE)
