"""What a CVM uses, as its VMM tells; and what is known of it after one more sample."""

from __future__ import annotations

from dataclasses import dataclass

from platform_protocol.platform_messages import ResourceUsage


@dataclass(frozen=True, slots=True)
class VmUsage:
    """A whole CVM's, with all that runs in it, since its boot. None: its VMM cannot say.

    `memory_bytes` is in use now, `memory_peak_bytes` was at most; `disk_bytes` is what its disks hold;
    `network_bytes` went in and out. `cpu_percent` is of one CPU, between the last two samples; None also
    before there are two.
    """

    cpu_time_ms: int | None = None
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    disk_bytes: int | None = None
    network_bytes: int | None = None
    cpu_percent: float | None = None

    def reported(self) -> ResourceUsage:
        """As a result has it, which knows no "unknown": 0 stands for that too."""
        return ResourceUsage(
            cpu_time_ms=self.cpu_time_ms or 0,
            memory_peak_bytes=self.memory_peak_bytes or 0,
            disk_bytes=self.disk_bytes or 0,
            network_bytes=self.network_bytes or 0,
        )


def merged(old: VmUsage | None, sample: VmUsage, *, cpu_percent: float | None = None) -> VmUsage:
    """What is known after a sample: counters and peaks never fall, the memory in use is the sample's.

    A peak that the VMM does not keep is the most that any sample showed; `disk_bytes` likewise.
    """
    before = old or VmUsage()
    return VmUsage(
        cpu_time_ms=_most(before.cpu_time_ms, sample.cpu_time_ms),
        memory_bytes=sample.memory_bytes,
        memory_peak_bytes=_most(before.memory_peak_bytes, sample.memory_peak_bytes, sample.memory_bytes),
        disk_bytes=_most(before.disk_bytes, sample.disk_bytes),
        network_bytes=_most(before.network_bytes, sample.network_bytes),
        cpu_percent=cpu_percent,
    )


@dataclass(frozen=True, slots=True)
class CpuSample:
    """So much CPU time at a moment of the monotonic clock (seconds)."""

    at: float
    cpu_time_ms: int

    def percent(self, later: CpuSample) -> float:
        """The share of one CPU between two: 100 is all of it, 200 is two CPUs. A counter that fell is 0."""
        grown = max(later.cpu_time_ms - self.cpu_time_ms, 0)
        return round(grown / 10 / (later.at - self.at), 1)


def _most(*given: int | None) -> int | None:
    return max((one for one in given if one is not None), default=None)
