"""Push notifications: one signed WebSocket connection as an iterator, and the loop that keeps one open.

A push is a hint: whatever is lost, forged, repeated or late changes latency alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from platform_protocol.errors import ProtocolError
from platform_protocol.notifications import (
    ChallengeUpdated,
    Hello,
    JobCancelled,
    NewJob,
    UnknownNotification,
    parse_notification,
)
from platform_validator.clock import Clock
from platform_validator.platform_client.answers import problem_code
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import (
    HotkeyInUse,
    NotAuthorized,
    Notification,
    PlatformClient,
    PlatformUnavailable,
)
from platform_validator.platform_client.retries import TABLE, Kind, asked_for, retry_after
from platform_validator.platform_client.signer import RequestSigner

PING_EVERY = 20.0
GREETED_WITHIN = 15.0
"""Seconds. A server that answers pings and never greets would be taken for one with nothing to say."""
MAX_FRAME = 256 * 1024
REVOKED = 4401
IN_USE = 4409
_REFUSED = frozenset({401, 403})

_log = structlog.get_logger(__name__)


class _Connect(connect):
    """A connection attempt that follows no redirect: what is signed for one host goes to no other."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def notification_stream(
    *, origin: str, path: str, signer: RequestSigner, now: Callable[[], datetime]
) -> AsyncIterator[Notification]:
    """One connection's notifications.

    Raises:
        PlatformUnavailable: Not opened, or broken.
        HotkeyInUse: Closed with 4409.
        NotAuthorized: Closed with 4401, or the upgrade was refused with 401 or 403.
    """
    url = "ws" + origin.removeprefix("http") + path
    try:
        async with _Connect(
            url,
            additional_headers=signer.headers("GET", path),
            ping_interval=PING_EVERY,
            ping_timeout=PING_EVERY,
            open_timeout=TABLE[Kind.PUSH].deadline.total_seconds(),
            close_timeout=2,
            max_size=MAX_FRAME,
            proxy=None,
            user_agent_header="platform-validator",
        ) as socket:
            frames = aiter(socket)
            async with asyncio.timeout(GREETED_WITHIN):
                frame = await anext(frames, None)
            while frame is not None:
                notification = _read(frame)
                if notification is not None:
                    yield notification
                frame = await anext(frames, None)
    except InvalidStatus as error:
        body = error.response.body or b""
        code, detail, problem = problem_code(bytes(body))
        if code == "clock_skew":
            signer.learn(problem.get("server_time"))
        status = error.response.status_code
        said = f"the WebSocket upgrade was answered {status} {code}: {detail}".rstrip(": ")
        if status in _REFUSED:
            raise NotAuthorized(said, code=code or "unauthorized", status=status) from error
        asked = retry_after(error.response.headers.get("Retry-After"), now())
        raise PlatformUnavailable(said, asked) from error
    except ConnectionClosed as error:
        _raise_close(error.rcvd.code if error.rcvd else 1006, error)
    except (InvalidHandshake, OSError, TimeoutError, EOFError) as error:
        said = str(error) or "neither opened nor greeted in time"
        raise PlatformUnavailable(f"the WebSocket could not be opened: {said}") from error
    else:
        close = socket.close_code
        if close in {REVOKED, IN_USE}:
            _raise_close(close, None)


def _raise_close(code: int, cause: BaseException | None) -> None:
    if code == IN_USE:
        raise HotkeyInUse("another instance of this hotkey connected (4409)") from cause
    if code == REVOKED:
        raise NotAuthorized("the registration was revoked (4401)", code="revoked", status=401) from cause
    raise PlatformUnavailable(f"the WebSocket was closed with {code}") from cause


def _read(frame: str | bytes) -> Notification | None:
    if isinstance(frame, bytes):
        return None
    try:
        return parse_notification(frame)
    except ProtocolError as error:
        _log.warning("notification_unreadable", error=str(error)[:200])
        return None


class NotificationListener(Protocol):
    """Who is told. Every method returns at once and may be called any number of times."""

    def poll_now(self) -> None:
        """Something may have been missed."""

    def new_job(self, hint: NewJob) -> None:
        """There may be a new job."""

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        """A challenge may have changed."""

    def job_cancelled(self, hint: JobCancelled) -> None:
        """A job may have been cancelled: ask with a renewal."""

    def hotkey_in_use(self) -> None:
        """Another instance has taken over: claim no more."""


@dataclass(frozen=True, slots=True)
class NotificationView:
    """The connection as /health and status show it."""

    connected: bool
    since: datetime | None
    reconnects: int
    received: int
    unknown: int
    gaps: int
    last_error: str | None


class NotificationLoop:
    """Keeps one connection open, for as long as the daemon runs.

    Args:
        client: Opens connections.
        listener: Is told.
        clock: Waits, and measures how long a connection was good.
        rng: Jitter.
        backoff: Between connections.
        good_after: A connection that lasted this long starts the backoff anew.
        on_connect: Told of each connection that was opened.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        listener: NotificationListener,
        clock: Clock,
        rng: random.Random,
        backoff: Backoff = TABLE[Kind.PUSH].pause,
        good_after: timedelta = timedelta(seconds=60),
        on_connect: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._listener = listener
        self._clock = clock
        self._rng = rng
        self._backoff = backoff
        self._good_after = good_after.total_seconds()
        self._on_connect = on_connect
        self._connected = False
        self._since: datetime | None = None
        self._stream: str | None = None
        self._seq = 0
        self._reconnects = self._received = self._unknown = self._gaps = 0
        self._last_error: str | None = None

    def view(self) -> NotificationView:
        """The connection now."""
        return NotificationView(
            connected=self._connected,
            since=self._since,
            reconnects=self._reconnects,
            received=self._received,
            unknown=self._unknown,
            gaps=self._gaps,
            last_error=self._last_error,
        )

    async def run(self) -> None:
        """Connect, listen, and connect again; returns only when another instance has the hotkey."""
        failures = 0
        while True:
            asked = 0.0
            begun = self._clock.monotonic()
            try:
                await self._listen()
                self._last_error = None
            except HotkeyInUse as error:
                self._last_error = str(error)
                _log.error("hotkey_in_use", error=str(error))
                self._listener.hotkey_in_use()
                return
            except (PlatformUnavailable, NotAuthorized) as error:
                self._last_error = str(error)
                asked = asked_for(Kind.PUSH, error)
                _log.warning("notifications_lost", error=str(error))
            finally:
                self._connected = False
            good = self._clock.monotonic() - begun >= self._good_after
            failures = 1 if good else failures + 1
            self._reconnects += 1
            await self._clock.sleep(max(self._backoff.wait(failures, self._rng), asked))

    async def _listen(self) -> None:
        async for notification in self._client.notifications():
            if not self._connected:
                self._connected = True
                self._since = self._clock.now()
                self._on_connect()
                _log.info("notifications_connected")
            self._received += 1
            self._take(notification)

    def _take(self, notification: Notification) -> None:
        match notification:
            case Hello():
                self._greeted(notification)
                return
            case NewJob():
                self._listener.new_job(notification)
            case ChallengeUpdated():
                self._listener.challenge_updated(notification)
            case JobCancelled():
                self._listener.job_cancelled(notification)
            case UnknownNotification():
                self._unknown += 1
        self._count(notification.seq)

    def _greeted(self, hello: Hello) -> None:
        if hello.stream != self._stream or hello.seq != self._seq:
            self._listener.poll_now()
        self._stream, self._seq = hello.stream, hello.seq

    def _count(self, seq: int | None) -> None:
        if seq is None:
            return
        if seq > self._seq + 1:
            self._gaps += 1
            self._listener.poll_now()
        self._seq = max(self._seq, seq)
