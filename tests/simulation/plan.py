"""What will go wrong in one seed's world, drawn before it begins."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from platform_validator.crashpoint import POINTS

LONG_OUTAGE_EVERY = 25
"""One seed in so many has outages of half an hour: they cost virtual, and some real, time."""
HOURS_EVERY = 50
"""One seed in so many has VMs that are `removing` for hours."""


@dataclass(frozen=True, slots=True)
class Window:
    """From `begin` for `lasting` virtual seconds."""

    begin: float
    lasting: float

    def holds(self, now: float) -> bool:
        """Whether it is open."""
        return self.begin <= now < self.begin + self.lasting


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One validator's bad luck. Times are virtual seconds; `crashpoints` are (name, nth passing)."""

    crashes: tuple[float, ...]
    crashpoints: tuple[tuple[str, int], ...]
    stops: tuple[Window, ...]
    wall_jumps: tuple[tuple[float, float], ...]
    full_disk: tuple[Window, ...]
    vmm_down: tuple[Window, ...]
    cut_off: tuple[Window, ...]
    drains: tuple[float, ...]
    meddling: tuple[float, ...]
    vmm_restarts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One seed's world. Chances are per call or per job; `faults_until` ends every one of them."""

    seed: int
    validators: int
    challenges: int
    jobs: int
    arrive_within: float
    faults_until: float
    lost: float
    late: float
    repeated: float
    hint_faults: float
    vmm_faults: float
    deaths: float
    disk: float
    api_down: tuple[Window, ...]
    api_restarts: tuple[float, ...]
    updates: tuple[tuple[float, bool], ...]
    cancels: tuple[float, ...]
    forgeries: tuple[float, ...]
    removing_hours: bool
    nodes: tuple[NodePlan, ...] = field(default_factory=tuple)

    @property
    def calm(self) -> bool:
        """Nothing goes wrong at all."""
        return self.faults_until == 0.0


CHALLENGE_POINTS = tuple(point for point in POINTS if point.startswith("instance_"))
JOB_POINTS = tuple(point for point in POINTS if point not in CHALLENGE_POINTS)


def draw(seed: int, dice: random.Random, *, jobs: int = 101) -> Plan:
    """The plan of a seed: one in twelve is calm, the others are bad in ways and degrees of their own."""
    calm = seed % 12 == 11
    validators = dice.choice((1, 2, 2, 3))
    arrive = dice.uniform(120, 500)
    until = 0.0 if calm else dice.uniform(400, 900)
    long = seed % LONG_OUTAGE_EVERY == 0
    strength = 0.0 if calm else dice.choice((0.3, 1.0, 1.0, 2.0))

    def windows(most: int, longest: float) -> tuple[Window, ...]:
        count = 0 if calm else dice.randint(0, most)
        return tuple(Window(dice.uniform(0, until), dice.uniform(1, longest)) for _ in range(count))

    def moments(most: int) -> tuple[float, ...]:
        return tuple(sorted(dice.uniform(0, until) for _ in range(0 if calm else dice.randint(0, most))))

    nodes = []
    for _ in range(validators):
        points = [(dice.choice(JOB_POINTS), dice.randint(1, 20)) for _ in range(dice.randint(0, 2))]
        if dice.random() < 0.2:
            points.append((dice.choice(CHALLENGE_POINTS), dice.randint(1, 3)))
        nodes.append(
            NodePlan(
                crashes=moments(2),
                crashpoints=() if calm else tuple(points),
                stops=windows(1, 300.0),
                wall_jumps=tuple((at, dice.choice((-3600.0, 3600.0))) for at in moments(1)),
                full_disk=windows(1, 60.0),
                vmm_down=windows(2, 90.0),
                cut_off=windows(2, 1800.0 if long else 150.0),
                drains=moments(1),
                meddling=moments(3),
                vmm_restarts=moments(1),
            )
        )
    return Plan(
        seed=seed,
        validators=validators,
        challenges=dice.choice((1, 2, 3)),
        jobs=jobs,
        arrive_within=arrive,
        faults_until=until,
        lost=0.02 * strength,
        late=0.005 * strength,
        repeated=0.01 * strength,
        hint_faults=0.1 * strength,
        vmm_faults=0.02 * strength,
        deaths=0.02 * strength,
        disk=0.002 * strength,
        api_down=windows(2, 1800.0 if long else 120.0),
        api_restarts=moments(1),
        updates=tuple((at, dice.random() < 0.7) for at in moments(2)),
        cancels=moments(3),
        forgeries=moments(5),
        removing_hours=seed % HOURS_EVERY == 0,
        nodes=tuple(nodes),
    )
