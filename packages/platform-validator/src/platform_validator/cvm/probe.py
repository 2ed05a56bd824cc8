"""Waits for a VM to come up: the VMM's word on its boot, then the SDK's own health."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Protocol

import aiohttp
import structlog

from platform_protocol.ids import VmId
from platform_validator.clock import Clock
from platform_validator.cvm.errors import BootFailed, NoCapacity
from platform_validator.cvm.vmm import Vm, VmmClient, VmmError, VmmUnavailable, VmState, url_of

_FIRST, _MOST = 0.1, 2.0
_HEALTH = 5.0
_MAX_HEALTH = 16 * 1024
_LOG_LINES = 20
_CONTAINED = "namespaces"
"""What the SDK's word on how it holds submissions begins with, where nothing of it falls away."""
_MAX_CONTAINMENT = 512
ABSENCE = timedelta(seconds=45)
"""How long the VMM may be away in one piece (restarting, or its host busy) while a VM is waited for."""

_ENDED = frozenset({VmState.STOPPED, VmState.EXITED, VmState.REMOVING})

_log = structlog.get_logger(__name__)


class Probe(Protocol):
    """Waits for a VM."""

    async def until_ready(self, vm_id: VmId) -> tuple[str, int]:
        """Its address, once the SDK says `ready`.

        Raises:
            BootFailed: The VMM or the SDK says that it failed, with the reason.
            NoCapacity: Its process ended for want of memory, a GPU or the like.
            VmmUnavailable: The VMM has not answered for `ABSENCE`.
        """


class HttpProbe:
    """Asks the VMM for the VM, and the SDK for `/sdk/health`."""

    def __init__(self, *, vmm: VmmClient, clock: Clock) -> None:
        self._vmm = vmm
        self._clock = clock

    async def until_ready(self, vm_id: VmId) -> tuple[str, int]:
        """See the port."""
        pause, away_since = _FIRST, None
        timeout = aiohttp.ClientTimeout(total=_HEALTH)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                try:
                    vm = await self._vmm.get(vm_id)
                    await self._check(vm_id, vm)
                    away_since = None
                except VmmUnavailable as error:
                    # A VMM that restarts says nothing about its VMs: dstack's go on without it.
                    now = self._clock.monotonic()
                    if away_since is None:
                        away_since = now
                        _log.warning("vmm_away_while_booting", vm=vm_id, reason=str(error))
                    if now - away_since >= ABSENCE.total_seconds():
                        raise
                else:
                    if vm is not None and vm.address is not None and await _healthy(http, vm.address):
                        return vm.address
                await self._clock.sleep(pause)
                pause = min(_MOST, pause * 1.3)

    async def _check(self, vm_id: VmId, vm: Vm | None) -> None:
        if vm is None:
            raise BootFailed("the VMM has no such VM any more")
        if vm.boot_error:
            raise BootFailed(f"boot_error: {vm.boot_error}")
        if vm.lacked:
            raise NoCapacity(f"the VMM's host lacked something when it started: {vm.lacked}")
        if vm.state in _ENDED:
            raise BootFailed(
                f"it {vm.state.value} while booting; its console ends: {await self._console(vm_id)}"
            )

    async def _console(self, vm_id: VmId) -> str:
        try:
            return (await self._vmm.logs(vm_id, _LOG_LINES))[-1500:].strip() or "(empty)"
        except VmmUnavailable:
            raise
        except VmmError as error:
            return f"(not to be had: {error})"


async def _healthy(http: aiohttp.ClientSession, address: tuple[str, int]) -> bool:
    try:
        async with http.get(f"{url_of(address, 'http')}/sdk/health", allow_redirects=False) as response:
            health = json.loads(await response.content.read(_MAX_HEALTH))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError):
        return False
    status = health.get("status") if isinstance(health, dict) else None
    if status == "failed":
        raise BootFailed(f"the challenge failed to start: {str(health.get('error'))[:4096]}")
    if status == "ready":
        contained = health.get("containment")
        if isinstance(contained, str) and not contained.startswith(_CONTAINED):
            shown = contained[:_MAX_CONTAINMENT].encode("ascii", "backslashreplace").decode()
            _log.warning("submissions_contained_by_less", address=address[0], containment=shown)
    return status == "ready"
