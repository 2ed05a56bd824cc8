"""The effective network policy: what a challenge declares, narrowed by the operator's side; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from platform_protocol.spec import NetworkSpec
from platform_validator.egress.policy import Grant, covers
from platform_validator.network_policy import NetworkPolicy


@dataclass(frozen=True, slots=True)
class EffectiveNetwork:
    """What a CVM may reach by both sides' word, and what the challenge asked for beyond it."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    refused_hosts: tuple[str, ...]
    refused_ports: tuple[int, ...]

    @property
    def grant(self) -> Grant | None:
        """What the egress proxy is told of it; None when nothing may go out."""
        return Grant(self.hosts, self.ports) if self.hosts and self.ports else None


def narrowed(wanted: NetworkSpec, policy: NetworkPolicy) -> EffectiveNetwork:
    """The hosts and ports that both sides name; a pattern `*.x` names every name below x, and not x."""
    allowed_hosts = policy.hosts if policy.allow_outbound else ()
    allowed_ports = policy.ports if policy.allow_outbound and allowed_hosts else ()
    hosts = {
        theirs if covers(ours, theirs) else ours
        for theirs in wanted.hosts
        for ours in allowed_hosts
        if covers(ours, theirs) or covers(theirs, ours)
    }
    ports = [port for port in allowed_ports if port in wanted.ports or not wanted.ports] if hosts else []
    return EffectiveNetwork(
        hosts=tuple(sorted(hosts)),
        ports=tuple(ports),
        refused_hosts=_beyond(wanted.hosts, hosts),
        refused_ports=tuple(port for port in wanted.ports if port not in ports),
    )


def _beyond(wanted: Sequence[str], hosts: Collection[str]) -> tuple[str, ...]:
    return tuple(host for host in wanted if not any(covers(host, reached) for reached in hosts))
