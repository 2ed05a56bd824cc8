"""The startup sequence of the usage guide, in its order; then the loops; then the drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

import structlog

from platform_protocol.ids import Hotkey
from platform_protocol.signing import Keypair
from platform_validator.clock import Clock
from platform_validator.config import Settings
from platform_validator.crashpoint import BadCrashpoint, arm_from_environment
from platform_validator.daemon.board import Board
from platform_validator.daemon.control import ENDS_WITHIN, DaemonControl, Started
from platform_validator.daemon.engine import Engine
from platform_validator.daemon.lag import LoopLag
from platform_validator.daemon.parts import (
    make_components,
    make_connections,
    make_outside,
    make_values,
    value_key_source,
)
from platform_validator.daemon.pinning import Pinner
from platform_validator.daemon.systemd import Systemd
from platform_validator.daemon.watchdog import Watchdog
from platform_validator.jobs.receipts import ReceiptMaker
from platform_validator.keyring import Keyring, KeyringBroken
from platform_validator.memory_guard import guard_memory
from platform_validator.state import StateDirectory, StateLocked, StateUnusable
from platform_validator.store.port import StoreCorrupt, StoreUnavailable
from platform_validator.store.sqlite import SqliteStore
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values import ValueKeeper
from platform_validator.values.errors import ValueKeysUnusable
from platform_validator.web.guests import guests_app
from platform_validator.web.operators import TokenGuard, operators_app
from platform_validator.web.server import AddressInUse, WebServer

_LOCK_PATIENCE = timedelta(seconds=2)

_log = structlog.get_logger(__name__)


class Exit(IntEnum):
    """The daemon's exit codes."""

    DRAINED = 0
    CONFIGURATION = 2
    STATE_LOCKED = 3
    STATE_UNUSABLE = 4
    HOTKEY_IN_USE = 5
    INTERNAL = 70


_CODES: tuple[tuple[type[Exception], Exit], ...] = (
    (StateLocked, Exit.STATE_LOCKED),
    (StateUnusable, Exit.STATE_UNUSABLE),
    (StoreCorrupt, Exit.STATE_UNUSABLE),
    (StoreUnavailable, Exit.STATE_UNUSABLE),
    (KeyringBroken, Exit.STATE_UNUSABLE),
    (ValueKeysUnusable, Exit.STATE_UNUSABLE),
    (AddressInUse, Exit.CONFIGURATION),
    (BadCrashpoint, Exit.CONFIGURATION),
)


def run(settings: Settings, keypair: Keypair, *, reread: Callable[[], Settings] | None = None) -> int:
    """Run the daemon until it is drained. Returns the exit code.

    Args:
        settings: The configuration.
        keypair: The hotkey's.
        reread: Reads the configuration anew for a reload (raises ConfigFaults); None: it never changes.
    """
    guard_memory()
    state = StateDirectory(settings.db_path)
    systemd = Systemd.from_environment(os.environ, pid=os.getpid())
    try:
        arm_from_environment(os.environ)
        state.prepare()
        state.lock(patience=_LOCK_PATIENCE)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            daemon = Daemon(settings, keypair, state, systemd=systemd, reread=reread or (lambda: settings))
            return runner.run(daemon.run())
    except Exception as error:  # noqa: BLE001 - the last place that can say why
        return _end(error, systemd)
    finally:
        systemd.close()
        state.close()


class Daemon:
    """One run of the daemon: the engine, with its operating system around it."""

    def __init__(
        self,
        settings: Settings,
        keypair: Keypair,
        state: StateDirectory,
        *,
        systemd: Systemd,
        reread: Callable[[], Settings],
    ) -> None:
        self._settings = settings
        self._keypair = keypair
        self._state = state
        self._systemd = systemd
        self._metrics = Metrics()
        self._board = Board(settings, self._metrics)
        self._control = DaemonControl(settings, reread=reread, board=self._board, systemd=systemd)
        self._lag = LoopLag(self._metrics.loop_lag)
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
        for warning in self._board.warnings():
            _log.warning("limit_above_the_machine", what=warning)
        store = await SqliteStore.open(state.database)
        try:
            servers = self._servers()
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
        settings, cache = self._settings, self._state.folder / "cache"
        identity = await store.identity()
        # 2. Platform API client.
        connections = make_connections(settings, self._keypair, identity.instance)
        connections.client.on_answer = self._metrics.platform_contact
        store.trouble.told = self._metrics.store_failed
        _log.info("step_2_platform_client", platform_api=settings["platform.base_api"])
        try:
            outside, source = make_outside(settings, connections, cache=cache)
            values = await asyncio.to_thread(self._values, store, connections.clock)
            self._board.source = source
            parts = make_components(
                settings,
                outside,
                validator=Hotkey(self._keypair.address),
                store=store,
                identity=identity,
                keyring=Keyring.open_or_create(self._state.folder / "keyring"),
                values=values,
                metrics=self._metrics,
                cache=cache,
                receipts=ReceiptMaker(self._keypair, connections.clock),
            )
            source.in_use = parts.challenges.bundles_in_use
            pinner = Pinner(
                fleet=parts.fleet,
                quota=parts.quota,
                vmm=parts.fleet.hosts,
                policy=outside.policy,
                level=settings.level,
                runtime=settings["cvm.runtime"],
                keep_bundle=source.keep,
                clock=connections.clock,
                where=", ".join(host.url for host in settings.hosts),
            )
            # 3. The WebSocket begins to connect, nobody waits for it; 4. components, recovery; 5. the loops.
            engine = Engine(
                parts=parts,
                client=connections.client,
                store=store,
                clock=connections.clock,
                rng=outside.rng,
                metrics=self._metrics,
                drain_timeout=settings["jobs.drain_timeout"],
                extra={
                    "loop_lag": self._lag.run,
                    "attestation": outside.policy.run,
                    "pinning": pinner.run,
                    **({} if outside.egress is None else {"egress": outside.egress.run}),
                },
            )
            outside.policy.beat, pinner.beat = engine.pulse.of("attestation"), engine.pulse.of("pinning")
            if outside.egress is not None:
                outside.egress.beat = engine.pulse.of("egress")
            engine.on_phase = self._entered
            self._lag.beat = engine.pulse.of("loop_lag")
            board = self._board
            board.components, board.notifications = parts, engine.notifications
            board.policy, board.egress = outside.policy, outside.egress
            board.journal, board.silent = lambda: engine.store_error or store.trouble.now, engine.pulse.silent
            self._control.start(Started(engine, store, outside.renewer, pinner))
            watchdog = Watchdog(self._systemd, silent=engine.pulse.silent, status=board.line)
            feeding = asyncio.create_task(watchdog.run())
            try:
                await engine.run()
            finally:
                feeding.cancel()
            if engine.hotkey_taken:
                self._code = Exit.HOTKEY_IN_USE
        finally:
            await connections.close()

    def _values(self, store: SqliteStore, clock: Clock) -> ValueKeeper:
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        source = value_key_source(
            self._settings,
            keyring=self._state.folder / "keyring",
            credentials=Path(credentials) if credentials else None,
        )
        return make_values(self._settings, source, store=store, clock=clock)

    def _entered(self, phase: str) -> None:
        self._board.phase = phase
        if phase == "running":
            _log.info("step_5_ready", guests=self._settings["validator.http_listen"])
            self._systemd.ready()
        elif phase == "draining":
            self._systemd.stopping(self._control.settings["jobs.drain_timeout"] + ENDS_WITHIN)
        self._systemd.status(self._board.line())

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._control.signalled)
        loop.add_signal_handler(signal.SIGHUP, self._control.hung_up)

    def _servers(self) -> list[WebServer]:
        settings = self._settings
        token = _admin_token(self._state.folder)
        operators = operators_app(self._board, self._control)
        host, _ = settings["validator.admin_listen"]
        hosts = frozenset({host, "localhost", "127.0.0.1", "::1"})
        with contextlib.ExitStack() as bound:
            servers = []
            for app, where, guests in (
                (guests_app(self._board), settings["validator.http_listen"], True),
                (TokenGuard(operators, token, hosts), settings["validator.admin_listen"], False),
                (operators, self._state.prepare_socket(), False),
            ):
                server = WebServer(app, where, guests=guests)
                bound.callback(server.close)
                servers.append(server)
            bound.pop_all()
        return servers


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


def _end(error: Exception, systemd: Systemd) -> int:
    """Say why it ends, and find the code of that."""
    known = _known(error)
    if known is None:
        _log.error("daemon_died", exc_info=error, code=int(Exit.INTERNAL))
        systemd.status(f"died: {error!r}")
        return int(Exit.INTERNAL)
    reason, code = known
    _log.error("daemon_cannot_run", reason=str(reason), code=int(code))
    systemd.status(str(reason))
    return int(code)


def _known(error: Exception) -> tuple[Exception, Exit] | None:
    # What is raised while the listeners run comes wrapped in their group; of several the first counts.
    if isinstance(error, ExceptionGroup):
        return next(filter(None, map(_known, error.exceptions)), None)
    return next(((error, code) for kind, code in _CODES if isinstance(error, kind)), None)
