"""The VMM port: makes, lists and removes VMs. Free of any one VMM's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.cvm.usage import VmUsage
from platform_validator.errors import ValidatorError


class VmmError(ValidatorError):
    """The VMM could not do what was asked."""


class VmmUnavailable(VmmError):
    """No answer, or not the VMM's: nothing is known about the effect; ask again later."""


class VmmUnauthorized(VmmError):
    """The VMM wants credentials that we do not have."""


class VmmRefused(VmmError):
    """The VMM understood and refused; its text is in the message. The call had no effect."""


class VmmAtCapacity(VmmRefused):
    """The VMM has no room (memory, CPU, host port, GPU): no failure of the job."""


class VmNotFound(VmmRefused):
    """No VM of that id."""


class VmState(StrEnum):
    """What the VMM says of a VM's process; UNKNOWN for a word that this version does not know."""

    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    EXITED = "exited"
    REMOVING = "removing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class VmmImage:
    """An image that the VMM can boot.

    `level` is the isolation that it gives (a TDX image: Tee); `runtimes` maps a runtime's name to its
    digest `sha256:…` where the VMM has its own table (a local one), and is empty otherwise. `guest_ports` are
    those of its host's loopback that guests reach, None where it does not say.
    """

    name: str
    level: IsolationLevel
    runtimes: dict[str, str] = field(default_factory=dict)
    local: bool = False
    guest_ports: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class VmmFacts:
    """What a VMM says of itself.

    `tee_only`: it makes nothing but TEEs, whatever is asked for. `simulates`: it has simulated TEEs.
    """

    version: str
    images: tuple[VmmImage, ...]
    tee_only: bool = False
    simulates: bool = True


@dataclass(frozen=True, slots=True)
class VmSpec:
    """A VM to be made. `disk_mb` is rounded up where a VMM counts in GB.

    `tee` asks for a real TEE; `simulated_tee` for simulated quotes (never together). GPUs are chosen by the
    VMM's side, `resources.gpu_count` of them, unless `gpus` names them. `environment` is sealed to the VM.
    """

    name: VmName
    image: str
    compose: bytes
    user_config: str
    resources: Resources
    host_port: int
    guest_port: int
    tee: bool
    simulated_tee: bool
    gpus: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class TlsAddress(tuple[str, int]):
    """(host, port) of a gateway: TLS is spoken there, and the host's name leads to the VM."""

    __slots__ = ()


def url_of(address: tuple[str, int], scheme: str) -> str:
    """`http` or `ws` to a VM's address, with the `s` of TLS where it is a gateway's."""
    host, port = address
    return f"{scheme}{'s' if isinstance(address, TlsAddress) else ''}://{host}:{port}"


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM as the VMM shows it.

    `address` is (host, port) of the mapped guest port, or a gateway's for it; None while unknown.
    `lacked`: what its process said that the host lacked when it ended; empty otherwise.
    """

    id: VmId
    name: VmName
    state: VmState
    boot_progress: str
    boot_error: str
    instance: str | None
    address: tuple[str, int] | None
    resources: Resources
    lacked: str = ""

    def lacking(self, what: str) -> Vm:
        """The same, ended for want of something."""
        return replace(self, lacked=what)


class VmmClient(Protocol):
    """Every call has a deadline of its own and may be repeated, but `create` (not idempotent).

    Raises:
        VmmUnavailable: From every method.
        VmmUnauthorized: From every method.
    """

    async def facts(self) -> VmmFacts:
        """Version and images."""

    async def create(self, spec: VmSpec) -> VmId:
        """Make and start a VM.

        Raises:
            VmmUnavailable: It may have been made all the same: look for its name.
            VmmAtCapacity: No room.
            VmmRefused: Refused for good.
        """

    async def list(self, prefix: str = "") -> Sequence[Vm]:
        """All VMs whose name begins with the prefix."""

    async def get(self, vm_id: VmId) -> Vm | None:
        """One VM, or None when the VMM has none of that id."""

    async def stop(self, vm_id: VmId) -> None:
        """Stop at once.

        Raises:
            VmNotFound: It is gone.
        """

    async def remove(self, vm_id: VmId) -> None:
        """Remove a stopped VM; may finish in the background: `get` answers None once it is gone.

        Raises:
            VmNotFound: It is gone.
            VmmRefused: Not now (still running).
        """

    async def logs(self, vm_id: VmId, lines: int) -> str:
        """The last lines of its console: guest text, untrusted.

        Raises:
            VmNotFound: It is gone.
        """

    async def usage(self, vm_id: VmId) -> VmUsage | None:
        """What it uses, or None: it does not run, does not answer, or this VMM cannot say."""

    async def close(self) -> None:
        """Close connections."""
