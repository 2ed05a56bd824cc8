"""What is in force for a challenge: its platform.toml, narrowed by the operator's side; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.cvm.plan import CvmPlan
from platform_validator.egress.effective import EffectiveNetwork, narrowed
from platform_validator.network_policy import NetworkPolicy


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
