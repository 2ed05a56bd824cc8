"""What is in force for a challenge: its platform.toml, narrowed by the operator's side; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec, NetworkSpec
from platform_validator.cvm.plan import CvmPlan


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """The operator's: `allow_outbound` with no hosts allows nothing."""

    allow_outbound: bool
    hosts: tuple[str, ...]
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EffectiveNetwork:
    """What a CVM may reach by both sides' word, and what the challenge asked for beyond it."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    refused_hosts: tuple[str, ...]
    refused_ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Effective:
    """A challenge as it runs here. `env` says of each declared variable whether it was given."""

    image: str
    compose_hash: str
    bundle_sha256: str
    resources: dict[str, int]
    limits: dict[str, int]
    timeout_s: float
    cvm: str
    concurrency: int
    ready: int
    max_result_bytes: int
    network: EffectiveNetwork
    filesystem: dict[str, Any]
    scoring: dict[str, Any]
    env: dict[str, str]


def effective(
    spec: ChallengeSpec,
    plan: CvmPlan,
    *,
    limits: Resources,
    policy: NetworkPolicy,
    filesystem: FilesystemPolicy,
    scoring: dict[str, Any],
) -> Effective:
    """What is in force; `scoring` is the rule under the challenge's own."""
    return Effective(
        image=plan.image,
        compose_hash=plan.compose_hash,
        bundle_sha256=plan.bundle_sha256,
        resources=plan.resources.model_dump(),
        limits=limits.model_dump(),
        timeout_s=plan.timeout.total_seconds(),
        cvm=spec.execution.cvm,
        concurrency=spec.execution.concurrency,
        ready=spec.execution.ready,
        max_result_bytes=spec.result.max_bytes,
        network=narrowed(spec.network, policy),
        filesystem=filesystem.model_dump(mode="json"),
        scoring=scoring,
        env={name: "given" if name in plan.env else "not given" for name in sorted(spec.env)},
    )


def narrowed(wanted: NetworkSpec, policy: NetworkPolicy) -> EffectiveNetwork:
    """The hosts and ports that both sides name; a pattern `*.x` names every name below x, and not x."""
    allowed_hosts = policy.hosts if policy.allow_outbound else ()
    allowed_ports = policy.ports if policy.allow_outbound and allowed_hosts else ()
    hosts = {
        theirs if _covers(ours, theirs) else ours
        for theirs in wanted.hosts
        for ours in allowed_hosts
        if _covers(ours, theirs) or _covers(theirs, ours)
    }
    ports = [port for port in allowed_ports if port in wanted.ports or not wanted.ports] if hosts else []
    return EffectiveNetwork(
        hosts=tuple(sorted(hosts)),
        ports=tuple(ports),
        refused_hosts=_beyond(wanted.hosts, hosts),
        refused_ports=tuple(port for port in wanted.ports if port not in ports),
    )


def _beyond(wanted: Sequence[str], hosts: Collection[str]) -> tuple[str, ...]:
    return tuple(host for host in wanted if not any(_covers(host, reached) for reached in hosts))


def _covers(pattern: str, host: str) -> bool:
    return pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]))
