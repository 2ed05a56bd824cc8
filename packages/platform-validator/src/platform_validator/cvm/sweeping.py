"""Compares the journal with what each host's VMM shows, and has destroyed what nobody holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

import structlog

from platform_protocol.ids import VmName
from platform_validator.clock import Clock
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.reclaim import plan_reclaim
from platform_validator.cvm.vmm import VmmError
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import VmRecord

_log = structlog.get_logger(__name__)


class Sweeper:
    """Made once a fleet.

    Args:
        hosts: Where VMs are.
        store: The journal.
        clock: Time.
        state_id: In the names of ours.
        held: Names that a boot, a job, the pool or destruction holds now.
        destroy: Has one of ours destroyed on its host.
    """

    def __init__(
        self,
        *,
        hosts: Hosts,
        store: Store,
        clock: Clock,
        state_id: str,
        held: Callable[[], Collection[VmName]],
        destroy: Callable[[VmName, HostName], None],
    ) -> None:
        self._hosts = hosts
        self._store = store
        self._clock = clock
        self._state_id = state_id
        self._held = held
        self._destroy = destroy
        self._strays: dict[HostName, tuple[VmName, ...]] = {}
        self._errors: dict[HostName, str] = {}

    @property
    def strays(self) -> dict[VmName, HostName]:
        """VMs with our state id that are not in our journal, and where they are."""
        return {name: host for host, names in self._strays.items() for name in names}

    @property
    def error(self) -> str | None:
        """Why the last sweep was not complete, or None."""
        if list(self._errors) == [DEFAULT_HOST]:
            return self._errors[DEFAULT_HOST]
        said = dict.fromkeys(f"{host}: {error}" for host, error in self._errors.items())
        return "; ".join(said) or None

    async def sweep(self) -> None:
        """Every host, side by side; never raises for what a VMM or the store cannot do now."""
        async with asyncio.TaskGroup() as group:
            for host in self._hosts.names:
                group.create_task(self.sweep_host(host))

    async def sweep_host(self, host: HostName) -> None:
        """One host: what the others do not answer keeps nobody from it, and nothing of theirs is judged."""
        try:
            records = await self._store.open_vms()
            shown = await self._hosts.get(host).vmm.list(f"pv-{self._state_id}-")
            seen = {vm.name: vm for vm in shown}
            unknown = seen.keys() - {record.name for record in records}
            ended = {name for name in sorted(unknown) if await self._store.vm(name) is not None}
        except (VmmError, StoreUnavailable) as error:
            self._errors[host] = str(error)
            return
        self._errors.pop(host, None)
        plan = plan_reclaim(
            [record for record in records if record.host == host],
            seen,
            {*self._held(), *_elsewhere(records, host)},
            ended=ended,
            state_id=self._state_id,
            now=self._clock.now(),
        )
        for name in plan.destroy:
            self._destroy(name, host)
        if plan.strays != self._strays.get(host, ()):
            _log.warning(
                "vms_not_in_our_journal", host=host, vms=plan.strays, remedy="validator cvms reclaim"
            )
        self._strays[host] = plan.strays


def _elsewhere(records: Sequence[VmRecord], host: HostName) -> set[VmName]:
    return {record.name for record in records if record.host != host}
