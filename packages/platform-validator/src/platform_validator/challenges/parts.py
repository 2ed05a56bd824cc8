"""What the runners of all challenges share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from platform_protocol.ids import ChallengeId
from platform_validator.challenges.environment import EnvSource
from platform_validator.challenges.resolve import HostRules
from platform_validator.challenges.room import CvmFleet, Images
from platform_validator.challenges.source import Source
from platform_validator.challenges.standing import Standing
from platform_validator.clock import Clock
from platform_validator.cvm.quota import Quota
from platform_validator.store.port import Store


class RoomMaker(Protocol):
    """Makes room by having idle ready CVMs of other challenges yield."""

    def make_room(self, *, beside: ChallengeId | None) -> bool:
        """Have the oldest idle ready CVM of another challenge yield; False when there is none."""

    def may_refill(self) -> bool:
        """False while a job waits for the room that a yielding CVM leaves."""


@dataclass(slots=True)
class RunnerParts:
    """What every runner shares; `rules` may change while they run."""

    store: Store
    source: Source
    vmm: Images
    fleet: CvmFleet
    quota: Quota
    rules: HostRules
    env: EnvSource
    clock: Clock
    rng: random.Random
    room: RoomMaker
    on_ready: Callable[[], None]
    standing: Standing
    on_state: Callable[[ChallengeId, str], None]
