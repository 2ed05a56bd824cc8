"""Builds the VMM hosts of a configuration: their clients, credentials, limits and host ports."""

from __future__ import annotations

from platform_protocol.resources import Resources
from platform_validator.clock import Clock
from platform_validator.config import Settings
from platform_validator.config.hosts import Credentials, CredentialsUnusable, HostSettings, read_credentials
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import VmmHost
from platform_validator.cvm.placement import UNBOUNDED, Limits
from platform_validator.cvm.probe import HttpProbe
from platform_validator.state import StateUnusable

_KINDS = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count")


def make_vmms(settings: Settings) -> tuple[DstackVmm, ...]:
    """The clients of the hosts' VMMs, in their order.

    Raises:
        StateUnusable: A host's credentials file cannot be used.
    """
    return tuple(
        DstackVmm(
            host.url,
            token=given.token,
            user=given.user,
            password=given.password,
            port_address=host.port_address,
        )
        for host, given in ((host, _credentials(host, settings)) for host in settings.hosts)
    )


def make_hosts(settings: Settings, vmms: tuple[DstackVmm, ...], clock: Clock) -> tuple[VmmHost, ...]:
    """The hosts; those whose ports are reached under one address share their host ports."""
    shared: dict[str, HostPorts] = {}
    made = []
    for host, vmm in zip(settings.hosts, vmms, strict=True):
        ports = shared.setdefault(host.port_address, HostPorts(*settings["dstack.port_range"]))
        made.append(
            VmmHost(
                name=host.name,
                vmm=vmm,
                probe=HttpProbe(vmm=vmm, clock=clock),
                ports=ports if host.port_range is None else HostPorts(*host.port_range),
                base_url=host.base_url,
                limits=_limits(host),
                labels=host.labels,
                url=host.url,
            )
        )
    return tuple(made)


def _credentials(host: HostSettings, settings: Settings) -> Credentials:
    if not settings["vmm"]:
        return Credentials(
            settings["dstack.token"], settings["dstack.auth_user"], settings["dstack.auth_password"]
        )
    if host.credentials_file is None:
        return Credentials()
    try:
        return read_credentials(host.credentials_file)
    except CredentialsUnusable as error:
        raise StateUnusable(f"VMM host {host.name}: credentials_file: {error}") from error


def _limits(host: HostSettings) -> Limits | None:
    if host.limits is None:
        return None
    kinds = {kind: host.limits.get(kind, UNBOUNDED) for kind in _KINDS}
    return Limits(Resources(**kinds), host.limits.get("max_cvms", UNBOUNDED))
