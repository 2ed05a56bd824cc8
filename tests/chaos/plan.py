"""What is done to the processes, in which order: drawn from a seed before anything starts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.network.toxics import (
    BOTH,
    Bandwidth,
    BlackHole,
    Direction,
    Down,
    Latency,
    Limit,
    Reset,
    Slicer,
    Toxic,
)

from platform_validator.crashpoint import POINTS

VALIDATOR, API, VMM = "validator", "platform-api", "vmm"

_ANSWERS = (Direction.DOWNSTREAM,)
_REQUESTS = (Direction.UPSTREAM,)
_WORK_EVERY = 4


@dataclass(frozen=True, slots=True)
class Strike:
    """A validator's life that ends by SIGKILL at the `nth` passing of a crashpoint.

    `update`: the challenge gets a new version once that life has its challenge Active. `meanwhile` is killed,
    too, `after` seconds into that life, and comes back `down` seconds later.
    """

    point: str
    nth: int = 1
    update: bool = False
    meanwhile: str | None = None
    after: float = 0.0
    down: float = 1.0


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL of a part at some moment, `after` seconds from the begin of the step, back after `down`."""

    target: str
    after: float
    down: float


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGSTOP of the validator for so many lease terms, with a second validator there to take over."""

    terms: float = 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A network that fails between validator and Platform API for `seconds`.

    `kill` seconds into it, the validator is killed; it comes back into the same network.
    """

    toxics: tuple[Toxic, ...]
    directions: tuple[Direction, ...]
    seconds: float
    kill: float | None


@dataclass(frozen=True, slots=True)
class Work:
    """Nothing is done: `jobs` more results must be accepted."""

    jobs: int = 2


Step = Strike | Kill | Stop | Fault | Work


def full(seed: int) -> list[Step]:
    """Every crashpoint twice, every toxic, three stops; each part killed at other moments, too."""
    rng = random.Random(seed)  # noqa: S311 - a schedule
    others: list[str | None] = [None] * 16 + [API] * 11 + [VMM] * 9
    rng.shuffle(others)
    strikes = [
        _strike(rng, point, update=again, meanwhile=others.pop())
        for again in (True, False)
        for point in POINTS
    ]
    kills: list[Step] = [
        Kill(target, after=rng.uniform(0.2, 3.0), down=rng.uniform(0.2, 2.5))
        for target in [VALIDATOR] * 4 + [API] * 3 + [VMM] * 3
    ]
    faults = [
        Fault(toxics, directions, seconds=rng.uniform(5, 9), kill=rng.uniform(0.5, 4))
        for toxics, directions in _FAULTS
    ]
    steps: list[Step] = [*strikes, *kills, *faults, Stop(), Stop(), Stop()]
    rng.shuffle(steps)
    return _with_work(steps)


def short(seed: int) -> list[Step]:
    """The most telling points, each part once, and the answer that is lost after it was committed."""
    rng = random.Random(seed)  # noqa: S311 - a schedule
    return [
        Strike("result_stored"),
        Strike("submit_sent", meanwhile=API, after=0.3, down=0.5),
        Strike("running", meanwhile=VMM, after=rng.uniform(0.8, 1.5), down=0.5),
        Fault((BlackHole(),), _ANSWERS, seconds=3.0, kill=1.5),
        Strike("create_sent"),
        Work(1),
    ]


_FAULTS: tuple[tuple[tuple[Toxic, ...], tuple[Direction, ...]], ...] = (
    ((Latency(0.4, 0.3),), BOTH),
    ((Down(),), BOTH),
    ((BlackHole(),), BOTH),
    ((BlackHole(),), _ANSWERS),
    ((Reset(after_bytes=900),), _REQUESTS),
    ((Reset(after_bytes=300),), _ANSWERS),
    ((Slicer(size=1), Latency(0.05)), BOTH),
    ((Bandwidth(4_000),), BOTH),
    ((Limit(after_bytes=700),), _ANSWERS),
)


def _strike(rng: random.Random, point: str, *, update: bool, meanwhile: str | None) -> Strike:
    instance = point.startswith("instance_")
    # A start brings an instance up, too: the second passing is the update's. Only an update recycles one.
    nth = rng.randint(1, 3)
    if instance:
        nth = 2 if update and point != "instance_recycled" else 1
    return Strike(
        point,
        nth,
        update=instance and (update or point == "instance_recycled"),
        meanwhile=meanwhile,
        after=rng.uniform(0.0, 1.5),
        down=rng.uniform(0.2, 2.0),
    )


def _with_work(steps: list[Step]) -> list[Step]:
    found: list[Step] = []
    for number, step in enumerate(steps, 1):
        found.append(step)
        if number % _WORK_EVERY == 0:
            found.append(Work())
    return found
