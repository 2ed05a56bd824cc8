"""The daemon without its operating system: recovery, the loops, and the drain.

The real daemon puts configuration, state directory, listeners and signals around it; a simulation puts a
virtual clock and twins around the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog

from platform_protocol.ids import JobId
from platform_protocol.notifications import ChallengeUpdated, JobCancelled, NewJob
from platform_validator.clock import Clock
from platform_validator.daemon.parts import Components
from platform_validator.daemon.pulse import Pulse
from platform_validator.jobs.recovery import Inheritance, recover
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.platform_client.port import PlatformClient
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values.errors import ValueKeysUnusable

_RESTART = 1.0
_LOOK = 0.1
_STORE_RETRY = 2.0
_DESTROY_WITHIN = timedelta(seconds=60)
_DELIVER_WITHIN = timedelta(seconds=30)
_RELEASE_WITHIN = timedelta(seconds=30)
_COMPACT_EVERY = timedelta(hours=6)
_BEAT_EVERY = timedelta(minutes=1)
_KEPT_FOR = timedelta(days=30)
_KEPT_JOBS = 10_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain left: results that the Platform API has not taken, and CVMs that are not gone."""

    undelivered: int
    cvms_left: int


class Engine:
    """One run of the loops. Is told hints by the notification loop.

    Args:
        parts: The components.
        client: The Platform API.
        store: The journal.
        clock: Time.
        rng: Jitter.
        metrics: Is told.
        drain_timeout: After that the jobs that still run are cancelled and given back.
        extra: Further loops to be kept running, by name; each beats in `pulse` when it turns.
    """

    def __init__(
        self,
        *,
        parts: Components,
        client: PlatformClient,
        store: Store,
        clock: Clock,
        rng: random.Random,
        metrics: Metrics,
        drain_timeout: timedelta,
        extra: dict[str, Callable[[], Awaitable[None]]] | None = None,
    ) -> None:
        self.parts = parts
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._extra = extra or {}
        self.pulse = Pulse(clock)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ended: set[str] = set()
        self.drain_timeout = drain_timeout
        self.hotkey_taken = False
        self.store_error: str | None = None
        self.phase = "starting"
        self.on_phase: Callable[[str], None] = lambda _phase: None
        self.notifications = NotificationLoop(
            client=client, listener=self, clock=clock, rng=rng, on_connect=metrics.connected
        )
        parts.fleet.beat, parts.outbox.beat = self.pulse.of("fleet"), self.pulse.of("outbox")
        parts.challenges.beat, parts.jobs.beat = self.pulse.of("challenges"), self.pulse.of("jobs")

    async def run(self) -> Drained:
        """Recover, run the loops until told to drain, drain."""
        parts = self.parts
        async with asyncio.TaskGroup() as group:
            notifying = group.create_task(self._supervise("notifications", self.notifications.run))
            _log.info("step_3_websocket_connecting")
            others = [group.create_task(self._supervise(name, loop)) for name, loop in self._extra.items()]
            if not await self._recover():
                # Told to end before the journal could be read: nothing was begun.
                self._ended.update(("notifications", *self._extra))
                for task in (notifying, *others):
                    task.cancel()
                return Drained(0, 0)
            _log.info("step_4_components_recovered")
            # The fleet runs before anything boots or adopts.
            fleet = group.create_task(self._supervise("fleet", parts.fleet.run))
            outbox = group.create_task(self._supervise("outbox", parts.outbox.run))
            housekeeping = group.create_task(self._supervise("housekeeping", self._keep_house))
            challenges = group.create_task(self._supervise("challenges", parts.challenges.run))
            jobs = group.create_task(self._supervise("jobs", parts.jobs.run))
            self._enter("running")
            await self._stop.wait()
            left = await self._drain(jobs, challenges)
            self._ended.update(("notifications", "outbox", "fleet", "housekeeping", *self._extra))
            for task in (notifying, outbox, fleet, housekeeping, *others):
                task.cancel()
        return left

    async def _recover(self) -> bool:
        """Begins anew until the journal can be read and written: a full disk at start is waited out.

        Returns:
            False when it was told to end before that.
        """
        parts = self.parts
        while True:
            try:
                await parts.fleet.restore()
                await self._settle_values()
                found = await recover(store=self._store, fleet=parts.fleet, clock=self._clock)
            except StoreUnavailable as error:
                self.store_error = str(error)
                _log.error("not_recovered", error=str(error))
                if self._stop.is_set():
                    return False
                await self._clock.sleep(_STORE_RETRY)
            else:
                self.store_error = None
                self._inherit(found)
                await parts.jobs.forget_submissions()
                return True

    async def _settle_values(self) -> None:
        """Before a session reads one. What cannot be remembered of the keys is tried at the next start."""
        try:
            await self.parts.values.settle()
        except ValueKeysUnusable as error:
            _log.error("values_not_settled", error=str(error))

    def _inherit(self, found: Inheritance) -> None:
        for fate, count in found.fates.items():
            self._metrics.recovered(fate, count)
        self.parts.jobs.inherit(found)

    # What its surroundings tell it

    def drain(self, reason: str) -> None:
        """Claim no more, finish what runs, end; a second time: cancel what runs and give it back."""
        if self._stop.is_set():
            _log.warning("drain_hurried", reason=reason)
            self._hurry.set()
        else:
            _log.info("drain_asked", reason=reason)
        self.parts.jobs.stop_claiming()
        self._stop.set()

    @property
    def draining(self) -> bool:
        """Whether it was told to end."""
        return self._stop.is_set()

    def cancel_job(self, job_id: JobId) -> bool:
        """The operator ends a running job; False when none of that id runs here."""
        return self.parts.jobs.cancel(job_id)

    # The drain

    async def _drain(self, jobs: asyncio.Task[None], challenges: asyncio.Task[None]) -> Drained:
        parts = self.parts
        self._enter("draining")
        _log.info("draining", jobs=len(parts.jobs.views()), within=str(self.drain_timeout))
        # Ready CVMs serve nobody any more.
        self._ended.add("challenges")
        challenges.cancel()
        await self._idle_or_hurried()
        self._enter("stopping")
        self._ended.add("jobs")
        jobs.cancel()
        await asyncio.wait({jobs, challenges}, timeout=_RELEASE_WITHIN.total_seconds())
        parts.outbox.wake(retry=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DELIVER_WITHIN.total_seconds()):
                while await self._undelivered():
                    await self._clock.sleep(_LOOK)
        for view in parts.fleet.views():
            parts.fleet.destroy(view.name, reason="drained")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DESTROY_WITHIN.total_seconds()):
                await parts.fleet.destroyer.finish()
        left = Drained(await self._undelivered(), len(parts.fleet.views()))
        _log.info("drained", undelivered=left.undelivered, cvms_left=left.cvms_left)
        return left

    async def _undelivered(self) -> int:
        """By the journal: what was stored a moment ago counts, though the outbox has not looked yet."""
        try:
            return len(await self._store.outbox())
        except StoreUnavailable:
            return self.parts.outbox.depth

    async def _idle_or_hurried(self) -> None:
        idle = asyncio.ensure_future(self.parts.jobs.idle())
        hurried = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait(
                {idle, hurried},
                timeout=self.drain_timeout.total_seconds(),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            idle.cancel()
            hurried.cancel()

    # Loops

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop until it is ended; one that dies is logged, counted and started again.

        What fails while it is being cancelled hides the cancellation (a task group raises its children's
        errors instead): without `_ended` that loop would be started again, and the daemon never end.
        """
        if name != "notifications":
            # That one waits for pushes for as long as it takes: the pings of its connection watch it.
            self.pulse.expect(name)
        self._metrics.watched(name)
        try:
            while True:
                try:
                    await loop()
                except Exception:  # noqa: BLE001 - whatever it was, the others go on
                    _log.exception("loop_died", loop=name)
                else:
                    if name in self._ended or (name == "notifications" and self.hotkey_taken):
                        return
                    _log.error("loop_ended", loop=name)
                if name in self._ended:
                    return
                self._metrics.restarted(name)
                await self._clock.sleep(_RESTART)
        finally:
            self.pulse.forget(name)

    async def _keep_house(self) -> None:
        while True:
            try:
                removed = await self._store.compact(
                    ended_before=self._clock.now() - _KEPT_FOR, keep=_KEPT_JOBS
                )
                _log.info("journal_compacted", rows=removed)
            except StoreUnavailable as error:
                _log.warning("journal_not_compacted", error=str(error))
            for _ in range(_COMPACT_EVERY // _BEAT_EVERY):
                self.pulse.beat("housekeeping")
                await self._clock.sleep(_BEAT_EVERY.total_seconds())

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.on_phase(phase)

    # Hints: whatever they say changes when something is looked at, and nothing else.

    def poll_now(self) -> None:
        """Something may have been missed."""
        self.parts.jobs.wake("push")
        self.parts.challenges.wake()
        self.parts.outbox.wake(retry=True)

    def new_job(self, hint: NewJob) -> None:
        """There may be a new job."""
        del hint
        self.parts.jobs.wake("push")

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        """A challenge may have changed."""
        del hint
        self.parts.challenges.wake()

    def job_cancelled(self, hint: JobCancelled) -> None:
        """A job may have been cancelled."""
        self.parts.jobs.hint_cancelled(hint.job_id)

    def hotkey_in_use(self) -> None:
        """Another instance took over: finish what is held and end."""
        self.hotkey_taken = True
        _log.error(
            "hotkey_in_use", remedy="another instance runs with this hotkey; this one finishes and ends"
        )
        self.drain("hotkey in use elsewhere")
