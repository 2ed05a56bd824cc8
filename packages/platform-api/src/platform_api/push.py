"""Push to connected validators. Hints: whoever misses one finds out at the next poll."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from platform_api.auth import Signed
from platform_api.database import Database
from platform_api.tables import changes

NORMAL, REVOKED, ELSEWHERE = 1000, 4401, 4409
_BACKLOG = 1000
_SEND = 10.0
_LOOK_EVERY = 0.5
_KEPT = 10_000

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Line:
    socket: WebSocket
    signed: Signed
    queue: asyncio.Queue[dict[str, Any] | int] = field(default_factory=lambda: asyncio.Queue(_BACKLOG))


class Push:
    """Follows the table of changes, so that a change made by another process is pushed too."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stream = str(uuid.uuid4())
        self._seq = 0
        self._position = 0
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
        async with self._database.read() as connection:
            self._position = int(await connection.scalar(sa.select(sa.func.max(changes.c.position))) or 0)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._look()
            except (sa.exc.SQLAlchemyError, OSError) as error:
                log.warning("push_cannot_look", reason=str(error))

    async def serve(self, socket: WebSocket, signed: Signed) -> None:
        """One accepted connection, until it closes or is replaced."""
        line = _Line(socket, signed)
        old = self._lines.get(signed.hotkey)
        if old is not None:
            code = NORMAL if old.signed.instance == signed.instance else ELSEWHERE
            _offer(old, code)
        self._lines[signed.hotkey] = line
        hello = {"type": "hello", "stream": self._stream, "seq": self._seq, "server_time": _now()}
        try:
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(_until_gone(socket, line))
                await _send(socket, hello)
                while isinstance(message := await line.queue.get(), dict):
                    await _send(socket, message)
                listening.cancel()
                with contextlib.suppress(RuntimeError):
                    await socket.close(message or NORMAL)
        except* (WebSocketDisconnect, TimeoutError, RuntimeError, OSError):
            pass
        finally:
            if self._lines.get(signed.hotkey) is line:
                del self._lines[signed.hotkey]

    def revoke(self, hotkey: str) -> None:
        """Close a validator's connection: its registration is gone."""
        line = self._lines.get(hotkey)
        if line is not None:
            _offer(line, REVOKED)

    async def _look(self) -> None:
        async with self._database.read() as connection:
            query = sa.select(changes).where(changes.c.position > self._position).order_by(changes.c.position)
            rows = (await connection.execute(query)).all()
        for row in rows:
            self._position = row.position
            self._publish(row.kind, row.subject, row.detail)

    def _publish(self, kind: str, subject: str, detail: str) -> None:
        if kind == "revoked":
            self.revoke(subject)
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
            _offer(line, message)


async def record_change(connection: Any, kind: str, subject: str, detail: str = "") -> None:
    """Note a change for all processes that push, in the transaction that makes it."""
    inserted = await connection.execute(sa.insert(changes).values(kind=kind, subject=subject, detail=detail))
    position = inserted.inserted_primary_key[0]
    if position % 1000 == 0:
        await connection.execute(sa.delete(changes).where(changes.c.position < position - _KEPT))


def _offer(line: _Line, message: dict[str, Any] | int) -> None:
    """Queue it; a validator that does not read loses hints, and a gap in seq tells it to poll."""
    with contextlib.suppress(asyncio.QueueFull):
        line.queue.put_nowait(message)


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    async with asyncio.timeout(_SEND):
        await socket.send_text(json.dumps(message))


async def _until_gone(socket: WebSocket, line: _Line) -> None:
    """What validators send is ignored; its end ends the connection."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            _offer(line, 0)
            return


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
