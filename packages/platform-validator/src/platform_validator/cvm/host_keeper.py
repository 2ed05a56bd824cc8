"""What becomes of a host's CVMs when it is drained, falls silent, or comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta

import structlog

from platform_protocol.ids import VmName
from platform_validator.clock import Clock
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.errors import CreateFailed, NoCapacity
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.members import Member
from platform_validator.cvm.sweeping import Sweeper
from platform_validator.cvm.vmm import VmmError
from platform_validator.errors import ValidatorError
from platform_validator.host_name import HostName
from platform_validator.store.port import Store

_log = structlog.get_logger(__name__)


class HostKeeper:
    """Made by a fleet, for its hosts.

    Args:
        hosts: Tell when one falls silent, and when it is back.
        store: Remembers which are drained.
        clock: Time.
        destroyer: Ends what was given up.
        sweeper: Looks for what nobody knows of.
        held: The fleet's CVMs.
        alive: Within that a CVM shows that it lives although its VMM is silent.
    """

    def __init__(
        self,
        *,
        hosts: Hosts,
        store: Store,
        clock: Clock,
        destroyer: Destroyer,
        sweeper: Sweeper,
        held: Callable[[], Mapping[VmName, Member]],
        alive: timedelta,
    ) -> None:
        self._hosts = hosts
        self._store = store
        self._clock = clock
        self._destroyer = destroyer
        self._sweeper = sweeper
        self._held = held
        self._alive = alive
        self.tasks: asyncio.TaskGroup | None = None
        self.on_let_go: Callable[[frozenset[VmName]], None] = lambda _names: None
        hosts.on_silent, hosts.on_back = self._fell_silent, self._came_back

    async def trouble(self, name: VmName) -> str | None:
        """Why a CVM's host cannot be relied on: it is asked now. None: its VMM answers."""
        member = self._held().get(name)
        return None if member is None else await self._hosts.look(member.record.host)

    async def drain(self, name: HostName) -> None:
        """Make no more CVMs there; what runs goes on, what stands ready is let go.

        Raises:
            UnknownHost: There is no such host.
            StoreUnavailable: The journal, which is to remember it, cannot be written.
        """
        self._hosts.known(name)
        await self._store.drain_host(name, at=self._clock.now())
        self._hosts.drained(await self._store.drained_hosts())
        _log.info("host_drained", host=name)
        self.on_let_go(self._names_on(name))

    async def undrain(self, name: HostName) -> None:
        """It may have CVMs again.

        Raises:
            UnknownHost: There is no such host.
            StoreUnavailable: The journal cannot be written.
        """
        self._hosts.known(name)
        await self._store.undrain_host(name)
        self._hosts.drained(await self._store.drained_hosts())
        _log.info("host_undrained", host=name)

    def judge(self, host: HostName, error: BaseException) -> None:
        """What a boot that failed says of its host: nothing where challenge or guest are to blame."""
        if isinstance(error, NoCapacity):
            self._hosts.full(host, str(error))
        elif isinstance(error, CreateFailed | VmmError):
            self._hosts.failed(host, str(error))

    def _names_on(self, host: HostName) -> frozenset[VmName]:
        there = {name for name, member in self._held().items() if member.record.host == host}
        return frozenset(there - self._destroyer.names)

    def _fell_silent(self, host: HostName) -> None:
        """Its VMM does not answer: whatever is there is asked whether it lives."""
        if self.tasks is not None:
            for name in sorted(self._names_on(host)):
                self.tasks.create_task(self._confirm(self._held()[name]))

    async def _confirm(self, member: Member) -> None:
        """A CVM whose VMM is silent goes on for as long as its session does; a dead one is let go at once."""
        session = member.session
        if session is None:
            return
        try:
            async with asyncio.timeout(self._alive.total_seconds()):
                await session.confirm()
        except (TimeoutError, ValidatorError):
            _log.warning("cvm_lost_with_its_host", vm=member.record.name, host=member.record.host)
            # Before its session ends: what stands ready did not end by itself.
            self.on_let_go(frozenset({member.record.name}))
            session.close()

    def _came_back(self, host: HostName) -> None:
        """What was given up meanwhile is destroyed at once, and what nobody knows of is looked for."""
        self._destroyer.hurry(host)
        if self.tasks is not None:
            self.tasks.create_task(self._sweeper.sweep_host(host))
