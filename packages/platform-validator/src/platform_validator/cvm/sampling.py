"""Asks the VMMs what CVMs use, from time to time; a VMM that cannot say is asked ever more rarely."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import structlog

from platform_protocol.ids import VmName
from platform_validator.clock import Clock
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.members import Member
from platform_validator.cvm.usage import CpuSample, VmUsage, merged
from platform_validator.cvm.vmm import VmmError
from platform_validator.host_name import HostName

SAMPLE_EVERY = timedelta(seconds=5)
_WITHIN = 4.0
_LAST_WITHIN = 2.0
_RAREST = 300.0
_APART = 1.0
"""Seconds between two samples, at least, for a share of the CPU: what is nearer says little."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Patience:
    """A CVM whose VMM did not say: not asked before `until` (monotonic), then after a longer `pause`."""

    until: float
    pause: float


class UsageSampler:
    """Made by a fleet. What it fails at is counted and harms nothing.

    Args:
        hosts: Have the VMMs.
        held: The fleet's CVMs.
        clock: Time.
        every: Between two looks at a host; None: nothing is ever asked.

    Attributes:
        heard: Told of each try: `sampled`, `unknown` or `failed`, and by how much CPU time (ms) and network
            bytes grew.
    """

    def __init__(
        self,
        *,
        hosts: Hosts,
        held: Callable[[], Mapping[VmName, Member]],
        clock: Clock,
        every: timedelta | None,
    ) -> None:
        self._hosts = hosts
        self._held = held
        self._clock = clock
        self._every = every
        self._known: dict[VmName, VmUsage] = {}
        self._patience: dict[VmName, _Patience] = {}
        self._cpu: dict[VmName, CpuSample] = {}
        self.heard: Callable[[str, int, int], None] = lambda _answer, _cpu_time_ms, _network_bytes: None

    def of(self, name: VmName) -> VmUsage | None:
        """What is known of a CVM; None: nothing yet, or never anything."""
        return self._known.get(name)

    async def last(self, name: VmName) -> VmUsage | None:
        """The same after one more sample, which has two seconds."""
        member = self._held().get(name)
        if self._every is not None and member is not None and name not in self._patience:
            await self._sample(member, _LAST_WITHIN)
        return self.of(name)

    async def run(self) -> None:
        """Sample every CVM that is up, each host in a task of its own, until cancelled."""
        if self._every is None:
            return
        async with asyncio.TaskGroup() as group:
            for host in self._hosts.names:
                group.create_task(self._watch(host, self._every))

    async def _watch(self, host: HostName, every: timedelta) -> None:
        while True:
            self._forget()
            for name, member in list(self._held().items()):
                patience = self._patience.get(name)
                due = patience is None or self._clock.monotonic() >= patience.until
                if member.record.host == host and due:
                    await self._sample(member, _WITHIN)
            await self._clock.sleep(every.total_seconds())

    async def _sample(self, member: Member, within: float) -> None:
        record = member.record
        if member.vm_id is None or member.stage == "destroying":
            return
        sample, answer = None, "unknown"
        try:
            async with asyncio.timeout(within):
                sample = await self._hosts.get(record.host).vmm.usage(member.vm_id)
        except (VmmError, TimeoutError) as error:
            answer = "failed"
            _log.debug("usage_not_sampled", vm=record.name, reason=str(error) or type(error).__name__)
        if sample is None:
            before = self._patience.get(record.name)
            pause = min(2 * before.pause, _RAREST) if before else SAMPLE_EVERY.total_seconds()
            self._patience[record.name] = _Patience(self._clock.monotonic() + pause, pause)
            self.heard(answer, 0, 0)
            return
        self._patience.pop(record.name, None)
        old = self._known.get(record.name) or VmUsage()
        new = merged(old, sample, cpu_percent=self._cpu_percent(record.name, old, sample))
        self._known[record.name] = new
        self.heard(
            "sampled",
            (new.cpu_time_ms or 0) - (old.cpu_time_ms or 0),
            (new.network_bytes or 0) - (old.network_bytes or 0),
        )

    def _cpu_percent(self, name: VmName, old: VmUsage, sample: VmUsage) -> float | None:
        if sample.cpu_time_ms is None:
            return None
        before, now = self._cpu.get(name), CpuSample(self._clock.monotonic(), sample.cpu_time_ms)
        if before is not None and now.at - before.at < _APART:
            return old.cpu_percent
        self._cpu[name] = now
        return None if before is None else before.percent(now)

    def _forget(self) -> None:
        """Of CVMs that are gone."""
        held = self._held()
        for name in (self._known.keys() | self._patience.keys()) - held.keys():
            self._known.pop(name, None)
            self._cpu.pop(name, None)
            self._patience.pop(name, None)
