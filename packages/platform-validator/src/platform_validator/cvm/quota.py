"""What all CVMs together may use: reserved before a CVM is made, released exactly once when it is gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from platform_protocol.resources import Resources
from platform_validator.errors import ValidatorError

_KINDS = (("cpu", "cpu_cores"), ("memory", "memory_mb"), ("disk", "disk_mb"), ("gpu", "gpu_count"))


class ReservationSpent(ValidatorError):
    """A reservation was released twice: a fault of the caller."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Totals for all CVMs of this validator."""

    resources: Resources
    max_cvms: int


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A share of the limits. Compared by identity."""

    owner: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no room: `reason` is cpu, memory, disk, gpu or cvms."""

    reason: str
    wanted: int
    free: int

    def __str__(self) -> str:
        return f"{self.reason}: {self.wanted} wanted, {self.free} free"


@dataclass(frozen=True, slots=True)
class QuotaView:
    """The quota now."""

    limits: Limits
    used: Resources
    free: Resources
    cvms: int
    max_cvms: int
    refused: dict[str, int]


def decide(limits: Limits, held: Iterable[Resources], request: Resources) -> Refusal | None:
    """None when one more CVM of this size fits, else the first reason in the guide's order."""
    shares = list(held)
    free = subtract(limits.resources, shares)
    for reason, name in _KINDS:
        wanted, left = getattr(request, name), getattr(free, name)
        if wanted > left:
            return Refusal(reason, wanted, left)
    if len(shares) >= limits.max_cvms:
        return Refusal("cvms", 1, 0)
    return None


def subtract(total: Resources, shares: Iterable[Resources]) -> Resources:
    """What is left of a total; never below zero (a lowered limit leaves nothing, not less)."""
    cores, memory, disk, gpus = total.cpu_cores, total.memory_mb, total.disk_mb, total.gpu_count
    for share in shares:
        cores -= share.cpu_cores
        memory -= share.memory_mb
        disk -= share.disk_mb
        gpus -= share.gpu_count
    return Resources(
        cpu_cores=max(0, cores), memory_mb=max(0, memory), disk_mb=max(0, disk), gpu_count=max(0, gpus)
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


class Quota:
    """The account. Not thread-safe: it lives on the event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[int, Reservation] = {}
        self._refused: dict[str, int] = {}
        self._seen: QuotaView | None = None

    def resize(self, limits: Limits) -> None:
        """Other totals; what is over them keeps its share until it is gone."""
        self._limits = limits

    def reserve(self, request: Resources, owner: str) -> Reservation | Refusal:
        """Take a share, or the reason why not."""
        refusal = decide(self._limits, (share.resources for share in self._held.values()), request)
        if refusal is not None:
            self._refused[refusal.reason] = self._refused.get(refusal.reason, 0) + 1
            self._seen = None
            return refusal
        return self._hold(request, owner)

    def release(self, reservation: Reservation) -> None:
        """Give a share back.

        Raises:
            ReservationSpent: It was given back before.
        """
        if self._held.pop(id(reservation), None) is None:
            raise ReservationSpent(f"the reservation of {reservation.owner} was released twice")
        self._seen = None

    def rebuild(self, running: Iterable[tuple[str, Resources]]) -> list[Reservation]:
        """After a restart: a share for each CVM that is still there, whatever the limits say now."""
        return [self._hold(resources, owner) for owner, resources in running]

    def view(self) -> QuotaView:
        """What is used and free."""
        if self._seen is None:
            self._seen = self._look()
        return self._seen

    def _look(self) -> QuotaView:
        shares = [share.resources for share in self._held.values()]
        used = add(shares)
        return QuotaView(
            limits=self._limits,
            used=used,
            free=subtract(self._limits.resources, shares),
            cvms=len(shares),
            max_cvms=self._limits.max_cvms,
            refused=dict(self._refused),
        )

    def _hold(self, resources: Resources, owner: str) -> Reservation:
        reservation = Reservation(owner, resources)
        self._held[id(reservation)] = reservation
        self._seen = None
        return reservation
