"""Keeping a job's lease: decided purely, carried out in a thread that the event loop cannot starve.

The token fences and the clock only reclaims: a refused renewal ends the work, an unanswered one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import structlog

from platform_protocol.ids import JobId, LeaseToken
from platform_validator.clock import Clock
from platform_validator.platform_client.port import JobUnknown, LeaseRefused, PlatformClient, PlatformError
from platform_validator.platform_client.retries import TABLE, Kind, asked_for

_log = structlog.get_logger(__name__)

STALLED = "stalled"
OUTAGE = "outage"
_RETRY = TABLE[Kind.RENEWAL].pause


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """`stall_limit`: how long the job's task may be silent. `outage_grace`: how long no answer is borne."""

    stall_limit: timedelta = timedelta(minutes=10)
    outage_grace: timedelta = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What is known of a lease. Times are CLOCK_BOOTTIME seconds, taken before the request was sent.

    `gap`: for longer than a term nobody asked (a stopped process, a suspended machine), and nothing was
    answered since. An outage is no gap: in one, the questions are asked and stay unanswered. `held_off`:
    seconds after the last of them before which the server does not want the next.
    """

    term: float
    granted_at: float
    asked_at: float
    unanswered: int = 0
    refused: str | None = None
    gap: bool = False
    held_off: float = 0.0

    @property
    def answer(self) -> str:
        """What the last renewal brought: `granted`, `refused` or `unanswered`."""
        if self.refused is not None:
            return "refused"
        return "unanswered" if self.unanswered else "granted"

    def granted(self, asked_at: float, term: float) -> LeaseState:
        """A renewal was answered with a new term."""
        return LeaseState(term, granted_at=asked_at, asked_at=asked_at)

    def silent(self, asked_at: float, held_off: float = 0.0) -> LeaseState:
        """A renewal got no answer: nothing is known, but for how long the server wants to be left alone."""
        return LeaseState(
            self.term,
            self.granted_at,
            asked_at,
            self.unanswered + 1,
            gap=self.in_doubt(asked_at),
            held_off=held_off,
        )

    def denied(self, asked_at: float, code: str) -> LeaseState:
        """A renewal was refused."""
        return LeaseState(self.term, self.granted_at, asked_at, self.unanswered, code)

    def in_doubt(self, now: float) -> bool:
        """Whether only an answer may be believed: after a gap longer than the term."""
        return self.gap or now - self.asked_at > self.term


@dataclass(frozen=True, slots=True)
class Renew:
    """Ask now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after that many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Renew no more; the work must end, for this reason (a refusal's code, `stalled` or `outage`)."""

    reason: str


def decide(state: LeaseState, *, fed_at: float, now: float, rules: LeaseRules) -> Renew | Wait | Stop:
    """What to do about a lease at `now`; `fed_at` is when the job's own task last showed life."""
    # 1. The API said no: only that ends work at once.
    if state.refused is not None:
        return Stop(state.refused)
    # 2. The job's task is dead or stuck: nobody would use the lease.
    stalls_at = fed_at + rules.stall_limit.total_seconds()
    if now >= stalls_at:
        return Stop(STALLED)
    # 3. No answer for longer than is borne.
    gives_up_at = state.granted_at + rules.outage_grace.total_seconds()
    if state.unanswered and now >= gives_up_at:
        return Stop(OUTAGE)
    # 4. Due at a third of the term; unanswered, again soon, doubling from a second.
    if state.unanswered:
        due = state.asked_at + max(min(state.term / 6, _RETRY.bound(state.unanswered)), state.held_off)
    else:
        due = state.granted_at + state.term / 3
    if now >= due:
        return Renew()
    return Wait(min(due, stalls_at) - now)


class HeldLease(Protocol):
    """A lease that is being renewed."""

    def feed(self) -> None:
        """The job's task is alive."""

    def renew_now(self) -> None:
        """Ask at once (a push hinted at a cancellation); only the answer counts."""

    def in_doubt(self) -> bool:
        """Whether, after a gap longer than the term, no renewal was answered yet."""


class Renewer(Protocol):
    """Keeps leases, under `rules`: new ones count for the leases that are being kept, too.

    `heard` is told the answer to each renewal: `granted`, `refused` or `unanswered`; on whatever thread.
    """

    rules: LeaseRules
    heard: Callable[[str], None]

    def keep(
        self,
        job_id: JobId,
        token: LeaseToken,
        *,
        term: float,
        asked_at: float,
        on_lost: Callable[[str], None],
    ) -> AbstractAsyncContextManager[HeldLease]:
        """Renew while the context lasts; `on_lost` is called on the loop, once at most, with the reason."""


class ThreadRenewer:
    """A thread a lease, with a blocking call of its own: it goes on while the event loop is blocked.

    Args:
        renew: One blocking renewal (`BlockingRenewals.renew`).
        clock: Its boottime is counted.
        rules: The limits.
    """

    def __init__(
        self, *, renew: Callable[[JobId, LeaseToken], timedelta], clock: Clock, rules: LeaseRules
    ) -> None:
        self._renew = renew
        self._clock = clock
        self.rules = rules
        self.heard: Callable[[str], None] = lambda _answer: None

    @asynccontextmanager
    async def keep(
        self,
        job_id: JobId,
        token: LeaseToken,
        *,
        term: float,
        asked_at: float,
        on_lost: Callable[[str], None],
    ) -> AsyncIterator[HeldLease]:
        """Start the lease's thread, and stop it at the end without waiting for a call in flight."""
        loop = asyncio.get_running_loop()
        open_ = True

        def lost(reason: str) -> None:
            if open_:
                on_lost(reason)

        def tell(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to be told
                loop.call_soon_threadsafe(lost, reason)

        def ask() -> timedelta:
            return self._renew(job_id, token)

        state = LeaseState(term, granted_at=asked_at, asked_at=asked_at)
        lease = _LeaseThread(
            ask=ask, tell=tell, state=state, clock=self._clock, rules=lambda: self.rules, heard=self.heard
        )
        lease.start()
        try:
            yield lease
        finally:
            open_ = False
            lease.stop()


class _LeaseThread(threading.Thread):
    def __init__(
        self,
        *,
        ask: Callable[[], timedelta],
        tell: Callable[[str], None],
        state: LeaseState,
        clock: Clock,
        rules: Callable[[], LeaseRules],
        heard: Callable[[str], None],
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._heard = heard
        self._ask = ask
        self._tell = tell
        self._state = state
        self._clock = clock
        self._rules = rules
        self._fed_at = clock.boottime()
        self._wake = threading.Event()
        self._urgent = False
        self._stopped = False

    def feed(self) -> None:
        self._fed_at = self._clock.boottime()

    def renew_now(self) -> None:
        self._urgent = True
        self._wake.set()

    def in_doubt(self) -> bool:
        return self._state.in_doubt(self._clock.boottime())

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        while not self._stopped:
            now = self._clock.boottime()
            step = decide(self._state, fed_at=self._fed_at, now=now, rules=self._rules())
            if isinstance(step, Stop):
                self._tell(step.reason)
                return
            if isinstance(step, Renew) or self._urgent:
                self._urgent = False
                self._state = _after(self._ask, self._state, now)
                self._heard(self._state.answer)
                continue
            # Bounded, so that a suspended machine is noticed soon after it wakes.
            self._wake.wait(min(step.seconds, 5.0))
            self._wake.clear()


def _after(ask: Callable[[], timedelta], state: LeaseState, asked_at: float) -> LeaseState:
    try:
        term = ask()
    except (LeaseRefused, JobUnknown) as error:
        return state.denied(asked_at, error.code)
    except PlatformError as error:
        return state.silent(asked_at, asked_for(Kind.RENEWAL, error))
    except Exception:  # noqa: BLE001 - a thread that died of it would let the lease lapse in silence
        _log.exception("renewal_fault")
        return state.silent(asked_at)
    return state.granted(asked_at, term.total_seconds())


class TaskRenewer:
    """The same rules in a task of the event loop, over the port: for simulations on a virtual clock."""

    def __init__(self, *, client: PlatformClient, clock: Clock, rules: LeaseRules) -> None:
        self._client = client
        self._clock = clock
        self.rules = rules
        self.heard: Callable[[str], None] = lambda _answer: None

    @asynccontextmanager
    async def keep(
        self,
        job_id: JobId,
        token: LeaseToken,
        *,
        term: float,
        asked_at: float,
        on_lost: Callable[[str], None],
    ) -> AsyncIterator[HeldLease]:
        """Renew in a task for as long as the context lasts."""
        lease = _LeaseTask(self._clock, LeaseState(term, granted_at=asked_at, asked_at=asked_at))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(lease, job_id, token, on_lost))
            try:
                yield lease
            finally:
                task.cancel()

    async def _run(
        self,
        lease: _LeaseTask,
        job_id: JobId,
        token: LeaseToken,
        on_lost: Callable[[str], None],
    ) -> None:
        while True:
            now = self._clock.boottime()
            step = decide(lease.state, fed_at=lease.fed_at, now=now, rules=self.rules)
            if isinstance(step, Stop):
                on_lost(step.reason)
                return
            if isinstance(step, Renew) or lease.urgent.is_set():
                lease.urgent.clear()
                lease.state = await self._ask(lease.state, now, job_id, token)
                self.heard(lease.state.answer)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(step.seconds, 5.0)):
                    await lease.urgent.wait()

    async def _ask(self, state: LeaseState, asked_at: float, job_id: JobId, token: LeaseToken) -> LeaseState:
        try:
            term = await self._client.renew(job_id, token)
        except (LeaseRefused, JobUnknown) as error:
            return state.denied(asked_at, error.code)
        except PlatformError as error:
            return state.silent(asked_at, asked_for(Kind.RENEWAL, error))
        return state.granted(asked_at, term.total_seconds())


class _LeaseTask:
    def __init__(self, clock: Clock, state: LeaseState) -> None:
        self._clock = clock
        self.state = state
        self.fed_at = clock.boottime()
        self.urgent = asyncio.Event()

    def feed(self) -> None:
        self.fed_at = self._clock.boottime()

    def renew_now(self) -> None:
        self.urgent.set()

    def in_doubt(self) -> bool:
        return self.state.in_doubt(self._clock.boottime())
