"""Control of the running daemon: drain, cancel, reload."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog

from platform_protocol.ids import JobId, VmName
from platform_validator.attestation.os_image import Shape
from platform_validator.challenges.environment import EnvCommand, ListEnv
from platform_validator.config import ConfigFaults, Settings
from platform_validator.cvm.quota import Limits
from platform_validator.daemon.board import Board, plain
from platform_validator.daemon.engine import Engine
from platform_validator.daemon.pinning import Pinner
from platform_validator.daemon.reload import plan_reload
from platform_validator.daemon.systemd import Systemd
from platform_validator.host_name import HostName
from platform_validator.jobs.lease import LeaseRules, Renewer
from platform_validator.store.port import Store
from platform_validator.telemetry.logging import Directives, configure_logging
from platform_validator.values.commands import ValueCommand, perform
from platform_validator.web.control import Cancelling, Draining, HostDraining, NotStarted, Reloaded

ENDS_WITHIN = timedelta(seconds=150)
"""After the last job: releasing (30 s), delivering (30 s), destroying (60 s), and room."""

_log = structlog.get_logger(__name__)


_JOURNAL = 10_000


@dataclass(frozen=True, slots=True)
class Started:
    """What there is to control once the components are made. `pinner` None: no image can be measured."""

    engine: Engine
    store: Store
    renewer: Renewer
    pinner: Pinner | None = None


class DaemonControl:
    """The Control of a daemon; its signals come here too.

    Args:
        settings: In force at the start.
        reread: Reads the configuration anew. Raises ConfigFaults.
        board: Is told what is in force.
        systemd: Is told of a reload.
    """

    def __init__(
        self, settings: Settings, *, reread: Callable[[], Settings], board: Board, systemd: Systemd
    ) -> None:
        self.settings = settings
        self._reread = reread
        self._board = board
        self._systemd = systemd
        self._started: Started | None = None
        self._asked_early: list[str] = []
        self._signalled = False

    def start(self, started: Started) -> None:
        """The components are made: what was asked before is passed on."""
        self._started = started
        for reason in self._asked_early:
            started.engine.drain(reason)

    def signalled(self) -> None:
        """SIGTERM or SIGINT: drain; the second signal cancels what runs and gives it back."""
        hurry, self._signalled = self._signalled, True
        self._end("signal", hurry=hurry)

    def hung_up(self) -> None:
        """SIGHUP: reload."""
        try:
            self.reload()
        except NotStarted as error:
            _log.warning("not_reloaded", reason=str(error))

    def drain(self, reason: str, *, hurry: bool = False) -> Draining:
        """See the port."""
        self._end(reason, hurry=hurry)
        parts = self._started.engine.parts if self._started is not None else None
        return Draining(
            phase="stopping" if self._board.phase == "stopping" else "draining",
            jobs=len(parts.jobs.views()) if parts is not None else 0,
            undelivered=parts.outbox.depth if parts is not None else 0,
            within_s=self.settings.seconds("jobs.drain_timeout") + ENDS_WITHIN.total_seconds(),
            hurried=hurry,
        )

    async def cancel_job(self, job_id: JobId) -> Cancelling:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        if self._started.engine.cancel_job(job_id):
            _log.info("job_cancelled_by_operator", job_id=job_id)
            return Cancelling.CANCELLED
        store = self._started.store
        for record in await store.open_jobs():
            if record.job_id == job_id:
                if record.attempt is None:
                    return Cancelling.CLAIMING
                return Cancelling.ENDED if record.outcome is None else Cancelling.STORED
        # A claim that was refused is no job of ours.
        ended = any(
            record.job_id == job_id and record.attempt is not None
            for record in await store.recent_jobs(_JOURNAL)
        )
        return Cancelling.ENDED if ended else Cancelling.UNKNOWN

    async def reclaim(self, names: Collection[VmName]) -> list[VmName]:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        return await self._started.engine.parts.fleet.reclaim_strays(names)

    async def drain_host(self, name: HostName) -> HostDraining:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        parts = self._started.engine.parts
        await parts.fleet.keeper.drain(name)
        return self._host(name)

    async def undrain_host(self, name: HostName) -> HostDraining:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        parts = self._started.engine.parts
        await parts.fleet.keeper.undrain(name)
        # There may be room now.
        parts.jobs.wake("local")
        return self._host(name)

    def _host(self, name: HostName) -> HostDraining:
        [shown] = [row for row in self._board.hosts() if row["name"] == name]
        return HostDraining(name, shown["state"], shown["quota"]["cvms"]["used"])

    async def values(self, command: ValueCommand) -> dict[str, Any]:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        return await perform(self._started.engine.parts.values, command)

    async def env(self, command: EnvCommand) -> dict[str, Any]:
        """See the port."""
        if self._started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        parts = self._started.engine.parts
        done = await parts.env.perform(command)
        if not isinstance(command, ListEnv):
            _log.info("challenge_env_changed", challenge_id=command.challenge_id, variable=command.name)
            parts.challenges.env_changed(command.challenge_id)
        return done

    def pinning(self) -> dict[str, Any]:
        """See the port."""
        found: dict[str, Any] = plain(self._pinner().now)
        return found

    def pin(self, image: str, shape: Shape) -> dict[str, Any]:
        """See the port."""
        found: dict[str, Any] = plain(self._pinner().ask(image, shape))
        return found

    def _pinner(self) -> Pinner:
        if self._started is None or self._started.pinner is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        return self._started.pinner

    def reload(self) -> Reloaded:
        """See the port."""
        started = self._started
        if started is None:
            raise NotStarted("the daemon is starting: ask again when it is running")
        self._systemd.reloading()
        try:
            plan = plan_reload(self.settings, self._read())
            if plan.invalid:
                _log.error("reload_refused", faults=list(plan.invalid))
                return Reloaded(faults=list(plan.invalid))
            self.settings = plan.settings
            self._apply(started, plan.settings)
        finally:
            self._systemd.ready()
        _log.info("reloaded", applied=[change.setting for change in plan.applied])
        for change in plan.restart:
            _log.warning("setting_needs_a_restart", setting=change.setting, reason=change.reason)
        return Reloaded(
            applied=[{"setting": each.setting, "old": each.old, "new": each.new} for each in plan.applied],
            restart=[plain(each) for each in plan.restart],
        )

    def _read(self) -> Settings | ConfigFaults:
        try:
            return self._reread()
        except ConfigFaults as error:
            return error

    def _apply(self, started: Started, settings: Settings) -> None:
        """Everything that reloads, changed or not: each is set to what is in force."""
        parts = started.engine.parts
        configure_logging(Directives(settings["validator.log"]), settings["validator.log_format"])
        parts.quota.resize(Limits(settings.limits, settings["resource_limits.max_cvms"]))
        parts.challenges.resize(settings.limits)
        started.renewer.rules = LeaseRules(
            stall_limit=settings["jobs.stall_limit"], outage_grace=settings["jobs.outage_grace"]
        )
        parts.jobs.bear_outages(settings["jobs.outage_grace"])
        started.engine.drain_timeout = settings["jobs.drain_timeout"]
        self._board.settings = settings
        # Last: it wakes the loop, which then sees all of it.
        parts.jobs.resize(settings["jobs.max_concurrent"])

    def _end(self, reason: str, *, hurry: bool) -> None:
        engine = self._started.engine if self._started is not None else None
        begun = engine.draining if engine is not None else bool(self._asked_early)
        for _ in range((not begun) + hurry):
            if engine is None:
                self._asked_early.append(reason)
            else:
                engine.drain(reason)
