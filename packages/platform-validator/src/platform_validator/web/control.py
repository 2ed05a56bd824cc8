"""What an operator may ask of the running daemon."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from platform_protocol.ids import JobId, VmName
from platform_validator.attestation.os_image import Shape
from platform_validator.challenges.environment import EnvCommand
from platform_validator.host_name import HostName
from platform_validator.values.commands import ValueCommand


@dataclass(frozen=True, slots=True)
class Draining:
    """A drain that was asked for: jobs that still run, results not delivered, and the seconds it may take."""

    phase: str
    jobs: int
    undelivered: int
    within_s: float
    hurried: bool


class Cancelling(StrEnum):
    """What became of the wish to cancel a job."""

    CANCELLED = "cancelled"
    UNKNOWN = "unknown_job"
    CLAIMING = "being_claimed"
    STORED = "result_stored"
    ENDED = "job_ended"


@dataclass(frozen=True, slots=True)
class HostDraining:
    """What became of a wish about a host: its `state`, and how many CVMs it still has."""

    host: HostName
    state: str
    cvms: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did.

    Attributes:
        applied: `{setting, old, new}` of each that came into force.
        restart: The same, with `reason`, of each that waits for a restart.
        faults: What is wrong with the configuration; then nothing was applied.
    """

    applied: list[dict[str, Any]] = field(default_factory=list)
    restart: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class NotStarted(Exception):
    """The daemon is not as far yet: ask again when it is running."""


class PinBusy(Exception):
    """The measurements of another image or shape are being taken."""


class Control(Protocol):
    """Carried out at once, on the daemon's loop."""

    def drain(self, reason: str, *, hurry: bool = False) -> Draining:
        """Claim no more, finish what runs, end. Twice is as once; `hurry` cancels what runs."""

    async def cancel_job(self, job_id: JobId) -> Cancelling:
        """End a job that runs here and give it back.

        Raises:
            NotStarted: Jobs are not known yet.
            StoreUnavailable: The journal, which knows jobs that ended, cannot be read.
        """

    async def reclaim(self, names: Collection[VmName]) -> list[VmName]:
        """Destroy VMs that carry our state id and are not in our journal; returns those that are such.

        Raises:
            NotStarted: CVMs are not known yet.
            VmmError: The VMM cannot be asked.
        """

    async def drain_host(self, name: HostName) -> HostDraining:
        """Make no more CVMs on a VMM host; what runs there goes on.

        Raises:
            NotStarted: Hosts are not known yet.
            UnknownHost: There is no such host.
            StoreUnavailable: The journal, which is to remember it, cannot be written.
        """

    async def undrain_host(self, name: HostName) -> HostDraining:
        """It may have CVMs again. Raises as `drain_host`."""

    async def values(self, command: ValueCommand) -> dict[str, Any]:
        """Read or change dynamic values.

        Raises:
            NotStarted: They are not open yet.
            ValueRefused: Or what else `values.commands.perform` names.
        """

    async def env(self, command: EnvCommand) -> dict[str, Any]:
        """Give or take a challenge's environment, or list its names.

        Raises:
            NotStarted: Challenges are not known yet.
            EnvRefused: Or StoreUnavailable, as `challenges.environment.Environments.perform` says.
        """

    def pinning(self) -> dict[str, Any]:
        """How far the last `pin` is.

        Raises:
            NotStarted: CVMs are not known yet.
        """

    def pin(self, image: str, shape: Shape) -> dict[str, Any]:
        """Have a CVM of an image booted at a shape, to see what it measures.

        Raises:
            NotStarted: CVMs are not known yet.
            PinBusy: Another one is under way.
        """

    def reload(self) -> Reloaded:
        """Read the configuration anew and apply what can be.

        Raises:
            NotStarted: There is nothing yet to apply it to.
        """
