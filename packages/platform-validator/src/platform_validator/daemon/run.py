"""The startup sequence of the usage guide, in its order; then the loops; then the drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path

import structlog

from platform_protocol.notifications import ChallengeUpdated, JobCancelled, NewJob
from platform_protocol.signing import Keypair
from platform_validator.config import Settings
from platform_validator.cvm.vmm import VmmError
from platform_validator.daemon.board import Board
from platform_validator.daemon.parts import Components, Connections, make_components, make_connections
from platform_validator.jobs.recovery import recover
from platform_validator.keyring import Keyring, KeyringBroken
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.state import StateDirectory, StateLocked, StateUnusable
from platform_validator.store.port import StoreCorrupt, StoreUnavailable
from platform_validator.store.sqlite import SqliteStore
from platform_validator.telemetry.metrics import Metrics
from platform_validator.web.guests import guests_app
from platform_validator.web.operators import TokenGuard, operators_app
from platform_validator.web.server import AddressInUse, WebServer

_VMM_EVERY = 15.0
_LAG_EVERY = 1.0
_RESTART = 1.0
_DESTROY_WITHIN = 60.0
_DELIVER_WITHIN = 30.0

_log = structlog.get_logger(__name__)


class Exit(IntEnum):
    """The daemon's exit codes."""

    DRAINED = 0
    CONFIGURATION = 2
    STATE_LOCKED = 3
    STATE_UNUSABLE = 4
    HOTKEY_IN_USE = 5
    INTERNAL = 70


def run(settings: Settings, keypair: Keypair) -> int:
    """Run the daemon until it is drained. Returns the exit code."""
    state = StateDirectory(settings.db_path)
    try:
        state.prepare()
        state.lock()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(Daemon(settings, keypair, state).run())
    except StateLocked as error:
        return _end(Exit.STATE_LOCKED, error)
    except (StateUnusable, StoreCorrupt, StoreUnavailable, KeyringBroken) as error:
        return _end(Exit.STATE_UNUSABLE, error)
    except AddressInUse as error:
        return _end(Exit.CONFIGURATION, error)
    except Exception:  # noqa: BLE001 - the last place that can say why
        _log.exception("daemon_died")
        return Exit.INTERNAL
    finally:
        state.close()


class Daemon:
    """One run of the daemon. Is told hints by the notification loop."""

    def __init__(self, settings: Settings, keypair: Keypair, state: StateDirectory) -> None:
        self._settings = settings
        self._keypair = keypair
        self._state = state
        self._metrics = Metrics()
        self._board = Board(settings, self._metrics)
        self._parts: Components | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._code = Exit.DRAINED

    async def run(self) -> int:
        """Start, run, drain.

        Raises:
            StateUnusable: Or StoreCorrupt, StoreUnavailable, KeyringBroken, AddressInUse: at the start.
        """
        settings, state = self._settings, self._state
        self._listen_to_signals()
        # 1. Configuration, state lock (taken before), HTTP listener.
        _log.info("step_1_configuration_loaded", state=str(state.folder), level=settings.level.value)
        store = await SqliteStore.open(state.database)
        servers = self._servers()
        try:
            async with asyncio.TaskGroup() as group:
                web = [group.create_task(server.run()) for server in servers]
                try:
                    await self._start_and_drain(store)
                finally:
                    for server in servers:
                        await server.stop()
                    await asyncio.wait(web, timeout=5)
        finally:
            await store.close()
        _log.info("daemon_ended", code=int(self._code))
        return int(self._code)

    async def _start_and_drain(self, store: SqliteStore) -> None:
        identity = await store.identity()
        # 2. Platform API client.
        connections = make_connections(self._settings, self._keypair, identity.instance)
        _log.info("step_2_platform_client", platform_api=self._settings["platform.base_api"])
        try:
            # 3. WebSocket: begins to connect, nobody waits for it.
            notifications = NotificationLoop(
                client=connections.client,
                listener=self,
                clock=connections.clock,
                rng=random.SystemRandom(),
                on_reconnect=self._metrics.connected,
            )
            self._board.notifications = notifications
            async with asyncio.TaskGroup() as group:
                notifying = group.create_task(self._supervise("notifications", notifications.run))
                _log.info("step_3_websocket_connecting")
                # 4. Components, then recovery.
                parts = self._parts = make_components(
                    self._settings,
                    self._keypair,
                    connections,
                    store=store,
                    identity=identity,
                    keyring=Keyring.open_or_create(self._state.folder / "keyring"),
                    metrics=self._metrics,
                    cache=self._state.folder / "cache",
                    on_active=self._wake_jobs,
                )
                self._board.components = parts
                _log.info("step_4_components_made")
                await parts.fleet.restore()
                found = await recover(
                    store=store, client=connections.client, fleet=parts.fleet, clock=connections.clock
                )
                _log.info("step_4_recovered", **{name: getattr(found, name) for name in found.__slots__})
                # 5. The loops.
                fleet = group.create_task(self._supervise("fleet", parts.fleet.run))
                outbox = group.create_task(self._supervise("outbox", parts.outbox.run))
                watching = group.create_task(
                    self._supervise("vmm_watch", lambda: self._watch_vmm(connections))
                )
                lag = group.create_task(self._supervise("loop_lag", self._measure_lag))
                challenges = group.create_task(self._supervise("challenges", parts.challenges.run))
                jobs = group.create_task(self._supervise("jobs", parts.jobs.run))
                self._board.phase = "running"
                _log.info("step_5_ready", guests=self._settings["validator.http_listen"])
                await self._stop.wait()
                await self._drain(parts, jobs, challenges)
                for task in (notifying, watching, lag, outbox, fleet):
                    task.cancel()
        finally:
            await connections.client.close()
            await connections.vmm.close()

    async def _drain(
        self, parts: Components, jobs: asyncio.Task[None], challenges: asyncio.Task[None]
    ) -> None:
        """Claim no more, finish, submit, destroy; a second signal or the deadline releases what is left."""
        self._board.phase = "draining"
        parts.jobs.stop_claiming()
        running = len(parts.jobs.views())
        _log.info("draining", jobs=running, within=str(self._settings["jobs.drain_timeout"]))
        finished = asyncio.create_task(parts.jobs.idle())
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait(
            {finished, hurried},
            timeout=self._settings.seconds("jobs.drain_timeout"),
            return_when=asyncio.FIRST_COMPLETED,
        )
        finished.cancel()
        hurried.cancel()
        self._board.phase = "stopping"
        for task in (jobs, challenges):
            task.cancel()
        await asyncio.wait({jobs, challenges}, timeout=30)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DELIVER_WITHIN):
                while parts.outbox.depth:
                    parts.outbox.wake(retry=True)
                    await asyncio.sleep(0.1)
        for view in parts.fleet.views():
            parts.fleet.destroy(view.name, reason="drained")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DESTROY_WITHIN):
                await parts.fleet.destroyer.finish()
        left = len(parts.fleet.views())
        _log.info("drained", undelivered=parts.outbox.depth, cvms_left=left)

    # Loops of the daemon's own

    async def _supervise(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop for ever; one that dies is logged, counted and started again."""
        while True:
            try:
                await loop()
            except Exception:  # noqa: BLE001 - whatever it was, the others go on
                _log.exception("loop_died", loop=name)
            else:
                _log.error("loop_ended", loop=name)
            self._metrics.restarted(name)
            await asyncio.sleep(_RESTART)

    async def _watch_vmm(self, connections: Connections) -> None:
        while True:
            try:
                facts = await connections.vmm.facts()
                self._board.vmm_version, error = facts.version, None
            except VmmError as failure:
                error = str(failure)
            if (error is None) != (self._board.vmm_error is None):
                _log.info("vmm_reachable") if error is None else _log.warning("vmm_unreachable", reason=error)
            self._board.vmm_error = error
            await asyncio.sleep(_VMM_EVERY if error is None else 2.0)

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY
            await asyncio.sleep(_LAG_EVERY)
            self._metrics.loop_lag(max(0.0, loop.time() - due))

    # Hints

    def poll_now(self) -> None:
        """Something may have been missed."""
        if self._parts is not None:
            self._parts.jobs.wake("push")
            self._parts.challenges.wake()
            self._parts.outbox.wake(retry=True)

    def new_job(self, hint: NewJob) -> None:
        """There may be a new job."""
        del hint
        if self._parts is not None:
            self._parts.jobs.wake("push")

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        """A challenge may have changed."""
        del hint
        if self._parts is not None:
            self._parts.challenges.wake()

    def job_cancelled(self, hint: JobCancelled) -> None:
        """A job may have been cancelled."""
        if self._parts is not None:
            self._parts.jobs.hint_cancelled(hint.job_id)

    def hotkey_in_use(self) -> None:
        """Another instance took over: finish what is held, exit 5."""
        _log.error(
            "hotkey_in_use", remedy="another instance runs with this hotkey; this one finishes and ends"
        )
        self._code = Exit.HOTKEY_IN_USE
        self._stop.set()

    def _wake_jobs(self) -> None:
        if self._parts is not None:
            self._parts.jobs.wake("local")

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._stop.is_set():
            _log.warning("second_signal", what="running jobs are released")
            self._hurry.set()
        self._stop.set()

    def _servers(self) -> list[WebServer]:
        settings = self._settings
        token = _admin_token(self._state.folder)
        operators = operators_app(self._board)
        host, _ = settings["validator.admin_listen"]
        hosts = frozenset({host, "localhost", "127.0.0.1", "::1"})
        return [
            WebServer(guests_app(self._board), settings["validator.http_listen"]),
            WebServer(TokenGuard(operators, token, hosts), settings["validator.admin_listen"]),
            WebServer(operators, self._state.prepare_socket()),
        ]


def _admin_token(folder: Path) -> str:
    path = folder / "admin.token"
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform != "linux":
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415 - not on every platform

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _end(code: Exit, error: Exception) -> int:
    _log.error("daemon_cannot_run", reason=str(error), code=int(code))
    return int(code)
