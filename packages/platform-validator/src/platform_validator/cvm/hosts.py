"""The VMM hosts: how each is reached, what it offers, and whether it takes CVMs now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from platform_validator.clock import Clock
from platform_validator.cvm.cordon import Cordon
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.placement import HostState, Limits
from platform_validator.cvm.probe import Probe
from platform_validator.cvm.vmm import VmmClient, VmmError, VmmFacts, VmmImage, VmmUnavailable
from platform_validator.errors import ValidatorError
from platform_validator.host_name import DEFAULT_HOST, HostName

_log = structlog.get_logger(__name__)


class UnknownHost(ValidatorError):
    """The configuration has no host of that name."""


@dataclass(frozen=True, slots=True)
class VmmHost:
    """One VMM, and how its CVMs are reached.

    Attributes:
        name: The configuration's.
        vmm: Makes and removes VMs there.
        probe: Waits for one to come up.
        ports: Host ports; hosts whose ports are reached under one address share them.
        base_url: This validator, as a CVM there reaches it; None: as everywhere.
        limits: What may be used of it; None: the totals alone bound it.
        labels: The operator's words for it.
        url: Where its VMM is, for people.
    """

    name: HostName
    vmm: VmmClient
    probe: Probe
    ports: HostPorts
    base_url: str | None = None
    limits: Limits | None = None
    labels: tuple[str, ...] = ()
    url: str = ""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host as status, CLI and pages show it.

    `state` is open, cordoned, half_open or drained; `why` and `since` say what it is closed for. `error` is
    what its VMM said at the last look, None where it answered.
    """

    name: HostName
    url: str
    state: str
    why: str | None
    since: datetime | None
    error: str | None
    version: str
    labels: tuple[str, ...]


@dataclass(slots=True)
class _Watched:
    host: VmmHost
    cordon: Cordon = field(default_factory=Cordon)
    facts: VmmFacts | None = None
    error: str | None = "not asked yet"
    drained_at: datetime | None = None
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)  # so that looks of two do not count twice


class Hosts:
    """All hosts, in the order of the configuration.

    Args:
        hosts: They.
        clock: Time.
    """

    def __init__(self, hosts: Sequence[VmmHost], *, clock: Clock) -> None:
        self._clock = clock
        self._watched = {host.name: _Watched(host) for host in hosts}
        self.beat: Callable[[], None] = lambda: None
        self.on_silent: Callable[[HostName], None] = lambda _name: None
        self.on_back: Callable[[HostName], None] = lambda _name: None

    @property
    def names(self) -> tuple[HostName, ...]:
        """Their names."""
        return tuple(self._watched)

    def get(self, name: HostName) -> VmmHost:
        """One host.

        Raises:
            VmmUnavailable: The configuration has none of that name any more.
        """
        watched = self._watched.get(name)
        if watched is None:
            raise VmmUnavailable(f"VMM host {name!r} is not in the configuration: put its [[vmm]] back")
        return watched.host

    def states(self) -> list[HostState]:
        """As placement sees them, now."""
        now = self._clock.monotonic()
        return [
            HostState(
                name=name,
                limits=each.host.limits,
                closed="drained" if each.drained_at is not None else each.cordon.closed(now),
                half_open=each.cordon.half_open(now),
                images=self._offers(each),
            )
            for name, each in self._watched.items()
        ]

    def status(self) -> list[HostStatus]:
        """As people see them."""
        return [self._status(each) for each in self._watched.values()]

    @property
    def error(self) -> str | None:
        """What is wrong, or None: of the only host as it is, of several with their names."""
        errors = {name: each.error for name, each in self._watched.items() if each.error is not None}
        if list(errors) == [DEFAULT_HOST]:
            return errors[DEFAULT_HOST]
        return "; ".join(f"{name}: {error}" for name, error in errors.items()) or None

    @property
    def version(self) -> str:
        """Their VMMs' versions, each once."""
        found = (each.facts.version for each in self._watched.values() if each.facts is not None)
        return ", ".join(dict.fromkeys(found))

    async def facts(self) -> VmmFacts:
        """What they offer together: of images of one name the first counts.

        A host that does not answer now offers what it did.

        Raises:
            VmmError: None of them answers.
        """
        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(self._ask(each)) for each in self._watched.values()]
        failures = [error for look in looks if (error := look.result()) is not None]
        if len(failures) == len(looks):
            raise failures[0] if failures else VmmUnavailable("no VMM host is configured")
        return VmmFacts(self.version, tuple(self._images().values()))

    # What happens to them

    async def watch(self) -> None:
        """Look at each from time to time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name in self._watched:
                group.create_task(self._watch(name))

    async def look(self, name: HostName) -> str | None:
        """Look at a host now: None when its VMM answers, else why not."""
        each = self._watched.get(name)
        if each is None:
            return "not in the configuration"
        async with each.looking:
            error = await self._ask(each)
            before = each.cordon
            if error is None:
                each.cordon = before.answered()
            else:
                each.cordon = before.unanswered(str(error), self._clock.now())
        if before.silenced and not each.cordon.silenced:
            _log.info("host_back", host=name)
            self.on_back(name)
        elif each.cordon.silenced and not before.silenced:
            _log.warning("host_cordoned", host=name, reason=each.cordon.why)
            self.on_silent(name)
        return each.error

    def made(self, name: HostName) -> None:
        """A CVM came up there."""
        self._tell(name, lambda cordon: cordon.made())

    def failed(self, name: HostName, why: str) -> None:
        """Its VMM could not make a CVM."""
        now, at = self._clock.monotonic(), self._clock.now()
        self._tell(name, lambda cordon: cordon.failed(why, now, at))

    def full(self, name: HostName, why: str) -> None:
        """Its VMM has no room, although our account has."""
        now, at = self._clock.monotonic(), self._clock.now()
        self._tell(name, lambda cordon: cordon.full(why, now, at))

    def freed(self, name: HostName) -> None:
        """A CVM there is gone."""
        now = self._clock.monotonic()
        self._tell(name, lambda cordon: cordon.freed(now))

    def drained(self, drained: Mapping[HostName, datetime]) -> None:
        """The operator's wish for each host, as the journal has it."""
        for name, each in self._watched.items():
            each.drained_at = drained.get(name)

    def known(self, name: HostName) -> None:
        """Whether there is such a host.

        Raises:
            UnknownHost: There is not.
        """
        if name not in self._watched:
            known = ", ".join(self._watched)
            raise UnknownHost(f"no VMM host is called {name!r}: there are {known}")

    # Inside

    async def _watch(self, name: HostName) -> None:
        while True:
            await self.look(name)
            self.beat()
            await self._clock.sleep(self._watched[name].cordon.look_after)

    async def _ask(self, each: _Watched) -> VmmError | None:
        before = each.error
        try:
            each.facts = await each.host.vmm.facts()
        except VmmError as error:
            each.error = str(error)
            if before is None:
                _log.warning("vmm_unreachable", host=each.host.name, reason=each.error)
            return error
        each.error = None
        if before is not None:
            _log.info("vmm_reachable", host=each.host.name)
        return None

    def _tell(self, name: HostName, event: Callable[[Cordon], Cordon]) -> None:
        each = self._watched.get(name)
        if each is None:
            return
        before, each.cordon = each.cordon, event(each.cordon)
        if each.cordon.closed(self._clock.monotonic()) is not None and each.cordon != before:
            _log.warning("host_cordoned", host=name, reason=each.cordon.why)
        elif each.cordon.why is None and before.why is not None:
            _log.info("host_works_again", host=name)

    def _images(self) -> dict[str, VmmImage]:
        found: dict[str, VmmImage] = {}
        for each in self._watched.values():
            for image in each.facts.images if each.facts is not None else ():
                found.setdefault(image.name, image)
        return found

    def _offers(self, each: _Watched) -> frozenset[str] | None:
        """Names of its images that are what plans take them for; a lone host offers what it is asked for."""
        if len(self._watched) == 1 or each.facts is None:
            return None
        agreed = self._images()
        return frozenset(image.name for image in each.facts.images if agreed[image.name] == image)

    def _status(self, each: _Watched) -> HostStatus:
        now, cordon = self._clock.monotonic(), each.cordon
        state, why, since = "open", None, None
        if cordon.why is not None:
            state = "half_open" if cordon.half_open(now) else "cordoned"
            why, since = cordon.why, cordon.since
        if each.drained_at is not None:
            state, why, since = "drained", why or "drained by the operator", each.drained_at
        version = each.facts.version if each.facts is not None else ""
        host = each.host
        return HostStatus(host.name, host.url, state, why, since, each.error, version, host.labels)
