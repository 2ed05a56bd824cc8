"""What is done to the processes, in which order: drawn from a seed before anything starts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

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
_WORK_EVERY = 5


class Version(StrEnum):
    """What kind of version an author pushes."""

    GOOD = "good"
    BROKEN = "broken"
    LARGE = "large"
    """Its CVM fits only where nothing else is."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A validator's life that ends by SIGKILL at the `nth` passing of a crashpoint.

    `update`: the new version that the challenge gets once that life has its challenge Active, if any.
    `meanwhile` is killed, too, `after` seconds into that life, and comes back `down` seconds later.
    """

    point: str
    nth: int = 1
    update: Version | None = None
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
    """Every crashpoint, most of them twice, every toxic, three stops; each part killed at other moments."""
    rng = random.Random(seed)
    twice = [(point, again) for again in (True, False) for point in POINTS if again or point not in _ONCE]
    others = [_OTHERS[number % len(_OTHERS)] for number in range(len(twice))]
    rng.shuffle(others)
    strikes = [
        _strike(rng, point, other, again=again) for (point, again), other in zip(twice, others, strict=True)
    ]
    kills: list[Step] = [
        Kill(target, after=rng.uniform(0.2, 3.0), down=rng.uniform(0.2, 2.5))
        for target in [VALIDATOR] * 3 + [API] * 3 + [VMM] * 3
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
    rng = random.Random(seed)
    return [
        Strike("result_stored"),
        Strike("submit_sent", meanwhile=API, after=0.3, down=0.5),
        Strike("running", meanwhile=VMM, after=rng.uniform(0.8, 1.5), down=0.5),
        Fault((BlackHole(),), _ANSWERS, seconds=3.0, kill=1.5),
        Strike("create_sent"),
        Work(1),
    ]


_OTHERS = (None, API, None, VMM, API, None)
_AT_START = frozenset({"instance_fetched", "instance_booted", "instance_switched"})
_ONCE = frozenset(point for point in POINTS if point.startswith("instance_")) - _AT_START
"""They need an update each; for that of draining a candidate must have waited two minutes for room."""
_UPDATES = {"instance_failed": Version.BROKEN, "instance_draining": Version.LARGE}
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


def _strike(rng: random.Random, point: str, other: str | None, *, again: bool) -> Strike:
    update, nth = None, rng.randint(1, 3)
    if point.startswith("instance_"):
        update, nth = _UPDATES.get(point, Version.GOOD), 1
        if point in _AT_START:
            # What served before comes up again at a start: the second passing is the update's.
            update, nth = (Version.GOOD, 2) if again else (None, 1)
    return Strike(point, nth, update, other, after=rng.uniform(0.0, 1.5), down=rng.uniform(0.2, 2.0))


def _with_work(steps: list[Step]) -> list[Step]:
    found: list[Step] = []
    for number, step in enumerate(steps, 1):
        found.append(step)
        if number % _WORK_EVERY == 0:
            found.append(Work())
    return found
