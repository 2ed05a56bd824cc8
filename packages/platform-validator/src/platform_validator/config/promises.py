"""Limits that promise more than this machine has, where VMMs run on it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from platform_protocol.resources import Resources
from platform_validator.config.settings import Settings
from platform_validator.machine import beyond, is_here


def promised_beyond(settings: Settings, has: Resources) -> Iterator[str]:
    """A line for each. The totals are judged where every host is here, else those of the hosts that are."""
    here = [host for host in settings.hosts if is_here(host.url)]
    if len(here) == len(settings.hosts):
        yield from (f"resource_limits.{line}" for line in beyond(settings.limits, has))
    nothing = Resources(cpu_cores=0, memory_mb=0, disk_mb=0, gpu_count=0)
    for host in here:
        given = {kind: most for kind, most in (host.limits or {}).items() if kind != "max_cvms"}
        yield from (f"vmm {host.name}: {line}" for line in beyond(nothing.model_copy(update=given), has))
