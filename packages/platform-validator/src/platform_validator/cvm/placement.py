"""On which host a CVM is made: by fit, then spread. Pure: what is free is said, nothing is remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from platform_protocol.resources import Resources
from platform_validator.host_name import DEFAULT_HOST, HostName

KINDS = (("cpu", "cpu_cores"), ("memory", "memory_mb"), ("disk", "disk_mb"), ("gpu", "gpu_count"))
REASONS = ("host", "image", "cpu", "memory", "disk", "gpu", "cvms")
"""Why there is no room, in the order in which it is looked for."""


UNBOUNDED = 2**31 - 1
"""A host's limit that is not given: the totals alone bound it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What CVMs together may use: those of a host, or all of this validator."""

    resources: Resources
    max_cvms: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no room: `reason` is cpu, memory, disk, gpu or cvms; host or image where none qualifies.

    `host` is the one that came nearest; None: the totals of all hosts are what lacks.
    """

    reason: str
    wanted: int
    free: int
    host: HostName | None = None
    detail: str = ""

    @property
    def figures(self) -> str:
        """What is wanted and what is free, and where."""
        where = f" on {self.host}" if self.host is not None else ""
        return self.detail or f"{self.wanted} wanted, {self.free} free{where}"

    def __str__(self) -> str:
        return f"{self.reason}: {self.figures}"


@dataclass(frozen=True, slots=True)
class HostState:
    """A host as far as placement is concerned.

    Attributes:
        name: The configuration's.
        limits: What it may be used for; None: the totals alone bound it.
        closed: Why it takes no CVM now, or None.
        half_open: It failed, and takes one CVM to see whether it works again.
        images: Names of those that it can boot; None: not known, any.
    """

    name: HostName = DEFAULT_HOST
    limits: Limits | None = None
    closed: str | None = None
    half_open: bool = False
    images: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A CVM's part of a host. `probe`: it was let onto a half-open host."""

    host: HostName
    resources: Resources
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Wish:
    """A CVM that is wanted. `image` None: any host has it."""

    resources: Resources
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where it is made."""

    host: HostName
    probe: bool = False


def placement(
    totals: Limits, hosts: Sequence[HostState], held: Sequence[Share], wish: Wish
) -> Placement | Refusal:
    """Decide for one CVM. Of several reasons against it the first of the guide's order is given."""
    # 1. Hosts that are closed, or that another CVM is probing, take none.
    probed = {share.host for share in held if share.probe}
    why = {host.name: _closed(host, probed) for host in hosts}
    opened = [host for host in hosts if why[host.name] is None]
    if not opened:
        detail = "; ".join(f"{name}: {reason}" for name, reason in why.items()) or "no host is configured"
        return Refusal("host", 1, 0, detail=detail)
    # 2. Hosts that cannot boot it take none.
    able = [host for host in opened if host.images is None or wish.image is None or wish.image in host.images]
    if not able:
        return Refusal("image", 1, 0, detail=f"no host that is open has the image {wish.image}")
    # 3. It fits beneath the totals and on one host at least.
    refused = [decide(totals, (share.resources for share in held), wish.resources)]
    rooms = {host.name: _on(host, held) for host in able}
    answers = {
        # One without limits of its own has what the totals have.
        host.name: decide(_bound(host, totals), rooms[host.name], wish.resources, host.name)
        if host.limits
        else None
        for host in able
    }
    fitting = [host for host in able if answers[host.name] is None]
    if not fitting:
        refused.append(_nearest(filter(None, answers.values())))
    reasons = [refusal for refusal in refused if refusal is not None]
    if reasons:
        return min(reasons, key=lambda refusal: REASONS.index(refusal.reason))
    # 4. Where GPUs would lie idle beneath a CVM without one only if there is no other host; then the one
    #    that is used the least afterwards; among equals the first of the configuration.
    best = min(fitting, key=lambda host: _rank(host, totals, rooms[host.name], wish.resources))
    return Placement(best.name, probe=best.half_open)


def keeper(totals: Limits, hosts: Sequence[HostState], held: Sequence[Share], wish: Wish) -> HostName | None:
    """The host whose room is kept for a CVM that fits nowhere now: it is large enough, and used the least."""
    if decide(totals, (), wish.resources) is not None:
        return None
    large = [
        host
        for host in hosts
        if host.closed is None
        and (host.images is None or wish.image is None or wish.image in host.images)
        and decide(_bound(host, totals), (), wish.resources) is None
    ]
    if not large:
        return None
    return min(large, key=lambda host: _rank(host, totals, _on(host, held), wish.resources)).name


def decide(
    limits: Limits, held: Iterable[Resources], request: Resources, host: HostName | None = None
) -> Refusal | None:
    """None when one more CVM of this size fits, else the first reason in the guide's order."""
    total = limits.resources
    free = [total.cpu_cores, total.memory_mb, total.disk_mb, total.gpu_count]
    count = 0
    for share in held:
        free[0] -= share.cpu_cores
        free[1] -= share.memory_mb
        free[2] -= share.disk_mb
        free[3] -= share.gpu_count
        count += 1
    wants = request.cpu_cores, request.memory_mb, request.disk_mb, request.gpu_count
    for (reason, _), wanted, left in zip(KINDS, wants, free, strict=True):
        if wanted > left:
            return Refusal(reason, wanted, max(left, 0), host)
    if count >= limits.max_cvms:
        return Refusal("cvms", 1, 0, host)
    return None


def subtract(total: Resources, shares: Iterable[Resources]) -> Resources:
    """What is left of a total; never below zero (a lowered limit leaves nothing, not less)."""
    used = add(shares)
    return Resources(
        cpu_cores=max(0, total.cpu_cores - used.cpu_cores),
        memory_mb=max(0, total.memory_mb - used.memory_mb),
        disk_mb=max(0, total.disk_mb - used.disk_mb),
        gpu_count=max(0, total.gpu_count - used.gpu_count),
    )


def add(shares: Iterable[Resources]) -> Resources:
    """All of them together."""
    cores = memory = disk = gpus = 0
    for share in shares:
        cores += share.cpu_cores
        memory += share.memory_mb
        disk += share.disk_mb
        gpus += share.gpu_count
    return Resources(cpu_cores=cores, memory_mb=memory, disk_mb=disk, gpu_count=gpus)


def _bound(host: HostState, totals: Limits) -> Limits:
    """What a host may be used for: never more than all hosts together."""
    if host.limits is None:
        return totals
    own, all_ = host.limits.resources, totals.resources
    least = {name: min(getattr(own, name), getattr(all_, name)) for _, name in KINDS}
    return Limits(Resources(**least), min(host.limits.max_cvms, totals.max_cvms))


def _closed(host: HostState, probed: set[HostName]) -> str | None:
    if host.closed is None and host.half_open and host.name in probed:
        return "a first CVM shows whether it works again"
    return host.closed


def _on(host: HostState, held: Sequence[Share]) -> list[Resources]:
    return [share.resources for share in held if share.host == host.name]


def _nearest(refusals: Iterable[Refusal]) -> Refusal:
    """Of the hosts that are all too full, the one whose reason comes last and lacks the least."""
    return max(refusals, key=lambda refusal: (REASONS.index(refusal.reason), refusal.free))


def _rank(
    host: HostState, totals: Limits, there: Sequence[Resources], request: Resources
) -> tuple[bool, float]:
    limits = _bound(host, totals)
    used = add([*there, request])
    parts = [(getattr(used, name), getattr(limits.resources, name)) for _, name in KINDS]
    parts.append((len(there) + 1, limits.max_cvms))
    wasted = limits.resources.gpu_count > 0 and request.gpu_count == 0
    return wasted, max(part / whole for part, whole in parts if whole)
