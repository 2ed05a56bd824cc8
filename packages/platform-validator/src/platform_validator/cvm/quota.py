"""What all CVMs together may use: reserved before a CVM is made, released exactly once when it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from platform_protocol.resources import Resources
from platform_validator.cvm.placement import (
    REASONS,
    HostState,
    Limits,
    Refusal,
    Share,
    Wish,
    add,
    decide,
    keeper,
    placement,
    subtract,
)
from platform_validator.errors import ValidatorError
from platform_validator.host_name import DEFAULT_HOST, HostName

__all__ = [
    "HostView",
    "Limits",
    "Quota",
    "QuotaView",
    "Refusal",
    "Reservation",
    "ReservationSpent",
    "Use",
    "UseView",
    "add",
    "decide",
    "subtract",
]


class ReservationSpent(ValidatorError):
    """A reservation was released twice: a fault of the caller."""


class Use(StrEnum):
    """What a CVM is for now: a version of a challenge that is being proved or shared, a job, or the pool."""

    CHALLENGE = "challenge"
    JOB = "job"
    READY = "ready"


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A share of the limits on one host. Compared by identity. `use` is what it was taken for."""

    owner: str
    resources: Resources
    host: HostName = DEFAULT_HOST
    use: Use = Use.JOB
    probe: bool = False


@dataclass(frozen=True, slots=True)
class UseView:
    """What CVMs of one use hold."""

    used: Resources
    cvms: int


@dataclass(frozen=True, slots=True)
class HostView:
    """What is held on one host. `limits` None: the totals alone bound it."""

    used: Resources
    cvms: int
    limits: Limits | None


@dataclass(frozen=True, slots=True)
class QuotaView:
    """The quota now; `by_use` and `by_host` are parts of the same account."""

    limits: Limits
    used: Resources
    free: Resources
    cvms: int
    max_cvms: int
    refused: dict[str, int]
    by_use: dict[Use, UseView]
    by_host: dict[HostName, HostView]


class Quota:
    """The account. Not thread-safe: it lives on the event loop.

    Args:
        limits: The totals for all CVMs.
        hosts: Says which hosts there are, as they are now; the first in the order of the configuration.
    """

    def __init__(
        self, limits: Limits, hosts: Callable[[], Sequence[HostState]] = lambda: (HostState(),)
    ) -> None:
        self._limits = limits
        self._hosts = hosts
        self._held: dict[int, tuple[Reservation, Use]] = {}
        self._probes: set[int] = set()
        self._refused: dict[str, int] = {}
        self._seen: QuotaView | None = None
        self._shares: list[Share] | None = None

    def resize(self, limits: Limits) -> None:
        """Other totals; what is over them keeps its share until it is gone."""
        self._limits = limits
        self._changed()

    def would(self, wish: Wish, *, kept: Share | None = None) -> Refusal | None:
        """Why there is no room for a CVM now, or None. `kept` is room that is left to another."""
        answer = placement(self._limits, self._hosts(), self._all(kept), wish)
        return answer if isinstance(answer, Refusal) else None

    def keep(self, wish: Wish) -> Share | None:
        """The room that is left to a CVM which fits nowhere now; None: it is too large for every host."""
        host = keeper(self._limits, self._hosts(), self._all(None), wish)
        return None if host is None else Share(host, wish.resources)

    def reserve(
        self,
        request: Resources,
        owner: str,
        *,
        image: str | None = None,
        use: Use = Use.JOB,
        kept: Share | None = None,
    ) -> Reservation | Refusal:
        """Take a share, or the reason why not. `kept` is room that is left to another."""
        answer = placement(self._limits, self._hosts(), self._all(kept), Wish(request, image))
        if isinstance(answer, Refusal):
            self._refused[answer.reason] = self._refused.get(answer.reason, 0) + 1
            self._changed()
            return answer
        return self._hold(Reservation(owner, request, answer.host, use, answer.probe))

    def release(self, reservation: Reservation) -> None:
        """Give a share back.

        Raises:
            ReservationSpent: It was given back before.
        """
        if self._held.pop(id(reservation), None) is None:
            raise ReservationSpent(f"the reservation of {reservation.owner} was released twice")
        self._probes.discard(id(reservation))
        self._changed()

    def tried(self, reservation: Reservation) -> None:
        """Its CVM came up, or did not: where it was to try a half-open host, the next may."""
        self._probes.discard(id(reservation))
        self._changed()

    def reassign(self, reservation: Reservation, use: Use) -> None:
        """A share is for something else now: a ready CVM was given a job. Spent ones are passed over."""
        if id(reservation) in self._held:
            self._held[id(reservation)] = reservation, use
            self._changed()

    def rebuild(
        self, running: Iterable[tuple[str, Resources]], *, host: HostName = DEFAULT_HOST, use: Use = Use.JOB
    ) -> list[Reservation]:
        """After a restart: a share for each CVM that is still there, whatever the limits say now."""
        return [self._hold(Reservation(owner, resources, host, use)) for owner, resources in running]

    def view(self) -> QuotaView:
        """What is used and free."""
        if self._seen is None:
            self._seen = self._look()
        return self._seen

    def _look(self) -> QuotaView:
        held = [share for share, _ in self._held.values()]
        used = add(share.resources for share in held)
        return QuotaView(
            limits=self._limits,
            used=used,
            free=subtract(self._limits.resources, [used]),
            cvms=len(held),
            max_cvms=self._limits.max_cvms,
            refused={reason: self._refused[reason] for reason in REASONS if reason in self._refused},
            by_use={use: self._of_use(use) for use in Use},
            by_host={host.name: self._of_host(host) for host in self._hosts()},
        )

    def _of_use(self, use: Use) -> UseView:
        shares = [share.resources for share, now in self._held.values() if now is use]
        return UseView(add(shares), len(shares))

    def _of_host(self, host: HostState) -> HostView:
        shares = [share.resources for share, _ in self._held.values() if share.host == host.name]
        return HostView(add(shares), len(shares), host.limits)

    def _all(self, kept: Share | None) -> list[Share]:
        if self._shares is None:
            self._shares = [
                Share(each.host, each.resources, key in self._probes) for key, (each, _) in self._held.items()
            ]
        return self._shares if kept is None else [*self._shares, kept]

    def _changed(self) -> None:
        self._seen = self._shares = None

    def _hold(self, reservation: Reservation) -> Reservation:
        self._held[id(reservation)] = reservation, reservation.use
        if reservation.probe:
            self._probes.add(id(reservation))
        self._changed()
        return reservation
