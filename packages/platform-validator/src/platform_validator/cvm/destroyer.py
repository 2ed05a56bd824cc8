"""Destroys CVMs: stop, wait, remove, wait, confirm; for ever with backoff, and never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from platform_protocol.ids import VmId, VmName
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.vmm import VmmClient, VmmError, VmNotFound, VmState
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.port import Store, StoreUnavailable, UnknownRecord
from platform_validator.store.records import VmPhase

_FIRST, _MOST = 0.5, 60.0
_POLL = 0.1
_POLL_MOST = 2.0
_PATIENCE = 120.0
_GONE = frozenset({VmState.STOPPED, VmState.EXITED})

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Doomed:
    """A CVM on its way out, as the operator sees it; a stray is in no journal."""

    name: VmName
    host: HostName
    tries: int = 0
    last_error: str | None = None
    journaled: bool = True


class Destroyer:
    """Owns every CVM that was given up.

    Args:
        hosts: Whose VMMs do it.
        store: Knows their ids, and is told.
        clock: Time.
        on_gone: Called once for each, when the VMM has confirmed that it is gone.
    """

    def __init__(
        self, *, hosts: Hosts, store: Store, clock: Clock, on_gone: Callable[[VmName], None]
    ) -> None:
        self._hosts = hosts
        self._store = store
        self._clock = clock
        self._on_gone = on_gone
        self._doomed: dict[VmName, Doomed] = {}
        self._begun: set[VmName] = set()
        self._fresh = asyncio.Event()
        self._hurried: dict[HostName, asyncio.Event] = {}
        self.destroyed = 0

    def give(
        self,
        name: VmName,
        reason: str | None = None,
        *,
        host: HostName = DEFAULT_HOST,
        journaled: bool = True,
    ) -> None:
        """Take a CVM over that is on a host. Giving it twice changes nothing."""
        if name not in self._doomed:
            self._doomed[name] = Doomed(name, host, last_error=reason, journaled=journaled)
            self._fresh.set()

    def hurry(self, host: HostName) -> None:
        """A host is back: what is there is tried again at once, whatever it was to wait for."""
        hurried = self._hurried.pop(host, None)
        if hurried is not None:
            hurried.set()

    @property
    def names(self) -> set[VmName]:
        """CVMs on their way out."""
        return set(self._doomed)

    def views(self) -> list[Doomed]:
        """The same, with tries and last error."""
        return list(self._doomed.values())

    async def run(self) -> None:
        """Until cancelled; what is then unfinished goes on when it is run again, or at the next start."""
        self._begun.clear()
        async with asyncio.TaskGroup() as tasks:
            while True:
                for name in [each for each in self._doomed if each not in self._begun]:
                    self._begun.add(name)
                    tasks.create_task(self._destroy(self._doomed[name]))
                self._fresh.clear()
                await self._fresh.wait()

    async def finish(self) -> None:
        """Wait until nothing is on its way out."""
        while self._doomed:
            await self._clock.sleep(_POLL)

    async def _destroy(self, doomed: Doomed) -> None:
        pause = _FIRST
        while True:
            try:
                await self._note(doomed)
                await self._once(doomed.name, self._hosts.get(doomed.host).vmm)
                if doomed.journaled:
                    await self._store.vm_phase(doomed.name, VmPhase.GONE, at=self._clock.now())
                crashpoint("destroyed")
                break
            except UnknownRecord:
                break
            except (VmmError, StoreUnavailable, TimeoutError) as error:
                doomed.tries += 1
                doomed.last_error = str(error) or type(error).__name__
                _log.warning(
                    "cvm_not_destroyed", vm=doomed.name, tries=doomed.tries, reason=doomed.last_error
                )
                await self._wait(pause, doomed.host)
                pause = min(_MOST, pause * 2)
        del self._doomed[doomed.name]
        self._begun.discard(doomed.name)
        self.destroyed += 1
        self._on_gone(doomed.name)
        _log.info("cvm_destroyed", vm=doomed.name, tries=doomed.tries + 1)

    async def _wait(self, seconds: float, host: HostName) -> None:
        """For so long, or until the host is back."""
        hurried = self._hurried.setdefault(host, asyncio.Event())
        either = asyncio.ensure_future(self._clock.sleep(seconds)), asyncio.ensure_future(hurried.wait())
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in either:
                each.cancel()

    async def _note(self, doomed: Doomed) -> None:
        """Journal that it ends. A store that cannot be written delays no end: the record stays open."""
        if not doomed.journaled:
            return
        try:
            await self._store.vm_phase(
                doomed.name, VmPhase.DESTROYING, at=self._clock.now(), reason=doomed.last_error
            )
        except StoreUnavailable as error:
            _log.warning("destruction_not_journaled", vm=doomed.name, reason=str(error))

    async def _once(self, name: VmName, vmm: VmmClient) -> None:
        for vm_id in sorted(await self._ids(name, vmm)):
            try:
                await vmm.stop(vm_id)
                await self._until(vmm, vm_id, stopped=True)
                await vmm.remove(vm_id)
                crashpoint("destroy_sent")
            except VmNotFound:
                pass
            await self._until(vmm, vm_id, stopped=False)

    async def _ids(self, name: VmName, vmm: VmmClient) -> set[VmId]:
        """Every VM of exactly that name: a create that was answered late may have made a second one."""
        found = {vm.id for vm in await vmm.list(name) if vm.name == name}
        try:
            record = await self._store.vm(name)
        except StoreUnavailable:
            return found
        if record is not None and record.vm_id is not None:
            found.add(record.vm_id)
        return found

    async def _until(self, vmm: VmmClient, vm_id: VmId, *, stopped: bool) -> None:
        pause = _POLL
        async with asyncio.timeout(_PATIENCE):
            while (vm := await vmm.get(vm_id)) is not None:
                if stopped and vm.state in (_GONE | {VmState.REMOVING}):
                    return
                await self._clock.sleep(pause)
                pause = min(_POLL_MOST, pause * 1.5)
