"""The quota and the hosts, as the status shows them."""

from __future__ import annotations

from typing import Any

from platform_protocol.resources import Resources
from platform_validator.cvm.hosts import HostStatus
from platform_validator.cvm.placement import UNBOUNDED
from platform_validator.cvm.quota import HostView, QuotaView

KINDS = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count")


def shown_quota(view: QuotaView) -> dict[str, Any]:
    """The account in all, by what CVMs are for, and what was refused."""
    limits = counts(view.limits.resources, view.max_cvms)
    used = counts(view.used, view.cvms)
    return {
        "quota": {kind: {"used": used[kind], "limit": limit} for kind, limit in limits.items()},
        "quota_by_use": {use.value: counts(part.used, part.cvms) for use, part in view.by_use.items()},
        "refused": view.refused,
    }


def shown_host(status: HostStatus, account: HostView) -> dict[str, Any]:
    """A host: its state, and what is used of it. A limit of None is that of all hosts together."""
    own = account.limits
    limits = {} if own is None else counts(own.resources, own.max_cvms)
    used = counts(account.used, account.cvms)
    return {
        "name": status.name,
        "url": status.url,
        "state": status.state,
        "why": status.why,
        "since": None if status.since is None else status.since.isoformat().replace("+00:00", "Z"),
        "error": status.error,
        "version": status.version,
        "labels": list(status.labels),
        "quota": {
            kind: {"used": count, "limit": None if (most := limits.get(kind)) == UNBOUNDED else most}
            for kind, count in used.items()
        },
    }


def counts(resources: Resources, cvms: int) -> dict[str, int]:
    """A size and a number of CVMs, kind by kind."""
    return {kind: int(getattr(resources, kind)) for kind in KINDS} | {"cvms": cvms}
