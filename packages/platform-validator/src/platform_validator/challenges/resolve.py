"""From platform.toml and what the VMM offers to a plan for CVMs, or the reason why not: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from platform_protocol.compose import ComposeInvalid, app_compose, compose_hash
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.challenges.environment import GivenEnv
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.vmm import VmmFacts, VmmImage
from platform_validator.errors import ValidatorError

DEFAULT_TIMEOUT_S = 3600


class Unfit(ValidatorError):
    """This challenge cannot run here. `reason` is a stable word; `lasting`: trying again will not help."""

    def __init__(self, reason: str, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class HostRules:
    """The operator's side.

    `level` is the least isolation; `limits` the totals for all CVMs; `runtime` the default
    `repository@sha256:…` for images without a table of their own.
    """

    level: IsolationLevel
    limits: Resources
    runtime: str | None = None


def resolve(
    wanted: ActiveChallenge,
    spec: ChallengeSpec,
    *,
    key: str,
    bundle_sha256: str,
    compose_file: str | None,
    facts: VmmFacts,
    rules: HostRules,
    env: GivenEnv,
) -> CvmPlan:
    """The plan of an instance's CVMs.

    Raises:
        Unfit: `does_not_fit`, `image_unknown`, `image_below_level`, `runtime_unknown`,
            `compose_hash_mismatch`, `env_needs_confirmation`, `env_unreadable`, `env_missing`.
    """
    resources = cvm_size(wanted, spec)
    _fits(resources, rules.limits)
    image = choose_image(facts.images, named=spec.cvm.os_image, level=rules.level)
    runtime = choose_runtime(spec.cvm.runtime, image, rules.runtime)
    try:
        compose = app_compose(spec, bundle_sha256=bundle_sha256, runtime=runtime, compose_file=compose_file)
    except ComposeInvalid as error:
        raise Unfit("runtime_unknown", str(error)) from error
    ours = compose_hash(compose)
    if wanted.compose_hash is not None and wanted.compose_hash != ours:
        raise Unfit(
            "compose_hash_mismatch", f"the API publishes {wanted.compose_hash}, this tree gives {ours}"
        )
    return CvmPlan(
        challenge_id=wanted.id,
        instance_key=key,
        commit=wanted.github_commit,
        image=image.name,
        compose=compose,
        compose_hash=ours,
        bundle_sha256=bundle_sha256,
        resources=resources,
        timeout=timedelta(seconds=spec.execution.timeout_s or DEFAULT_TIMEOUT_S),
        env=_env(wanted, spec, env),
        network=spec.network,
    )


def cvm_size(wanted: ActiveChallenge, spec: ChallengeSpec) -> Resources:
    """The size of a challenge's CVMs: platform.toml's, and where it is silent the API's."""
    cvm, listed = spec.cvm, wanted.resources
    return Resources(
        cpu_cores=listed.cpu_cores if cvm.cpu_cores is None else cvm.cpu_cores,
        memory_mb=listed.memory_mb if cvm.memory_mb is None else cvm.memory_mb,
        disk_mb=listed.disk_mb if cvm.disk_mb is None else cvm.disk_mb,
        gpu_count=listed.gpu_count if cvm.gpu_count is None else cvm.gpu_count,
    )


def choose_image(images: Sequence[VmmImage], *, named: str | None, level: IsolationLevel) -> VmmImage:
    """The named image, or the strongest one at or above the level; among equals the last by name.

    Raises:
        Unfit: `image_unknown` or `image_below_level`.
    """
    known = ", ".join(sorted(f"{image.name} ({image.level.value})" for image in images)) or "none"
    chosen = [image for image in images if named is None or image.name == named]
    if not chosen:
        raise Unfit("image_unknown", f"the VMM has no image {named!r}; it has: {known}", lasting=False)
    strong = [image for image in chosen if image.level.rank >= level.rank]
    if not strong:
        raise Unfit(
            "image_below_level", f"isolation_level is {level.value}; the VMM has: {known}", lasting=False
        )
    return max(strong, key=lambda image: (image.level.rank, image.name))


def choose_runtime(runtime: str, image: VmmImage, configured: str | None) -> str:
    """The runtime with its digest: from the image's own table, from platform.toml, or from the configuration.

    Raises:
        Unfit: `runtime_unknown`.
    """
    digest = image.runtimes.get(runtime)
    if digest is not None:
        return f"{runtime}@{digest}"
    if "@sha256:" in runtime and not image.local:
        return runtime
    if configured is not None and not image.local:
        return configured
    raise Unfit(
        "runtime_unknown",
        f"image {image.name} has no runtime {runtime!r}, only {sorted(image.runtimes)}; "
        "name one as repository@sha256:… in platform.toml or in [cvm] runtime of the configuration",
        lasting=False,
    )


def _fits(resources: Resources, limits: Resources) -> None:
    for what in ("cpu_cores", "memory_mb", "disk_mb", "gpu_count"):
        wanted, limit = getattr(resources, what), getattr(limits, what)
        if wanted > limit:
            raise Unfit("does_not_fit", f"one CVM wants {what} = {wanted}, the limit for all is {limit}")


def _env(wanted: ActiveChallenge, spec: ChallengeSpec, given: GivenEnv) -> dict[str, str]:
    moved = [name for name in sorted(spec.env) if name in given.elsewhere]
    if moved:
        raise Unfit(
            "env_needs_confirmation",
            f"{', '.join(moved)} was given for {given.elsewhere[moved[0]]}, and github_repo is now "
            f"{wanted.github_repo}: if its code may have it, give it again: {_commands(wanted, moved)}",
        )
    damaged = [name for name in sorted(spec.env) if name in given.unreadable]
    if damaged:
        raise Unfit(
            "env_unreadable",
            f"{', '.join(damaged)} does not open with this keyring: {_commands(wanted, damaged)}",
        )
    missing = [
        name
        for name, declared in sorted(spec.env.items())
        if name not in given.values and not declared.optional
    ]
    if missing:
        wants = "; ".join(f"{name} ({spec.env[name].description or 'not described'})" for name in missing)
        raise Unfit("env_missing", f"it wants {wants}: {_commands(wanted, missing)}")
    return {name: given.values[name] for name in spec.env if name in given.values}


def _commands(wanted: ActiveChallenge, names: Sequence[str]) -> str:
    return "; ".join(f"validator env set {wanted.id} {name}" for name in names)
