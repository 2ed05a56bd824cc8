"""What it takes to boot a CVM for a challenge: made once an instance, used for each of its CVMs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from platform_protocol.ids import ChallengeId
from platform_protocol.resources import Resources
from platform_protocol.spec import NetworkSpec


@dataclass(frozen=True, slots=True)
class CvmPlan:
    """A CVM of one instance. `compose` are the exact app-compose bytes; `compose_hash` their SHA-256, hex.

    `timeout` is the longest run of a job; `env` the operator's values, sent only in `configure`. `pins`: it
    is booted to see what its image measures, so that an image which is not known is no fault. `network`: what
    its challenge declares that it reaches; the operator's policy narrows it.
    """

    challenge_id: ChallengeId
    instance_key: str
    commit: str
    image: str
    compose: bytes
    compose_hash: str
    bundle_sha256: str
    resources: Resources
    timeout: timedelta
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    pins: bool = False
    network: NetworkSpec = field(default_factory=NetworkSpec)
