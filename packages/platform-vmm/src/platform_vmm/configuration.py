"""VmConfiguration: what CreateVm is given, by dstack's JSON rules (any field may be missing)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from platform_vmm.errors import VmmError

U32 = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]
_APP_ID = re.compile(r"[0-9a-f]{40}")
_HEX = re.compile(r"(0x)?([0-9a-fA-F]{2})*")
_PORT_MAX = 65535
_NAME = r"^[A-Za-z0-9_\-. @~!$^()]*$"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PortMapping(_Message):
    """A host port that leads into the guest. `host_address` empty: the VMM's own choice, 127.0.0.1."""

    protocol: str = "tcp"
    host_port: U32 = 0
    vm_port: U32 = 0
    host_address: str = ""


class Networking(_Message):
    """How the guest is joined to the network; here always dstack's "user" mode."""

    mode: str = ""


class GpuSlot(_Message):
    """A PCI slot."""

    slot: str = ""


class GpuConfig(_Message):
    """GPUs; the local VMM has none to give."""

    attach_mode: Literal["listed", "all"]
    gpus: list[GpuSlot] = Field(default_factory=list)


class VmConfiguration(_Message):
    """Memory in MB, disk in GB."""

    name: Annotated[str, Field(pattern=_NAME, max_length=128)] = ""
    image: str = ""
    compose_file: str = ""
    vcpu: U32 = 0
    memory: U32 = 0
    disk_size: U32 = 0
    ports: list[PortMapping] = Field(default_factory=list)
    encrypted_env: str = ""
    app_id: str | None = None
    user_config: Annotated[str, Field(repr=False)] = ""
    hugepages: bool = False
    pin_numa: bool = False
    gpus: GpuConfig | None = None
    kms_urls: list[str] = Field(default_factory=list)
    gateway_urls: list[str] = Field(default_factory=list)
    stopped: bool = False
    no_tee: bool = False
    networking: Networking | None = None
    simulated_tee: str | None = None

    @property
    def given_app_id(self) -> str | None:
        """Forty hex digits in lower case, where the caller gave some."""
        return (self.app_id or "").lower().removeprefix("0x") or None


def read_configuration(value: object) -> VmConfiguration:
    """Read and check a CreateVm message.

    Raises:
        VmmError: A wrong type, a value out of range, or something that the local VMM does not have.
    """
    try:
        configuration = VmConfiguration.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]
        )
        raise VmmError(f"Failed to decode request: {faults}") from error
    _check_kind(configuration)
    _check_identity(configuration)
    _check_size(configuration)
    for port in configuration.ports:
        _check_port(port)
    return configuration


def _check_kind(configuration: VmConfiguration) -> None:
    if not configuration.no_tee:
        raise VmmError(
            "no_tee = false: this is a local VMM without TDX; it makes no TEE (isolation level below Tee)"
        )
    if configuration.simulated_tee not in (None, "", "dstack-tdx"):
        raise VmmError(
            f"simulated_tee {configuration.simulated_tee!r}: the local VMM simulates dstack-tdx only"
        )
    if configuration.networking is not None and configuration.networking.mode not in ("", "user"):
        raise VmmError(f"networking mode {configuration.networking.mode!r}: the local VMM has user only")


def _check_identity(configuration: VmConfiguration) -> None:
    if configuration.given_app_id is not None and not _APP_ID.fullmatch(configuration.given_app_id):
        raise VmmError("app_id: expected 40 hex digits")
    if not _HEX.fullmatch(configuration.encrypted_env):
        raise VmmError("Failed to decode request: encrypted_env: expected hex")


def _check_size(configuration: VmConfiguration) -> None:
    gpus = configuration.gpus
    if gpus is not None and (gpus.gpus or gpus.attach_mode == "all"):
        raise VmmError("GPU is not enabled")
    if not (configuration.vcpu and configuration.memory and configuration.disk_size):
        raise VmmError("vcpu, memory (MB) and disk_size (GB): expected at least 1 each")


def _check_port(port: PortMapping) -> None:
    if port.protocol != "tcp":
        raise VmmError(f"ports: the local VMM maps tcp only, not {port.protocol!r}")
    if not (1 <= port.host_port <= _PORT_MAX and 1 <= port.vm_port <= _PORT_MAX):
        raise VmmError(f"ports: {port.host_port}:{port.vm_port} is out of range")
    if port.host_address not in ("", "127.0.0.1"):
        raise VmmError(f"ports: the local VMM maps on 127.0.0.1 only, not {port.host_address!r}")
