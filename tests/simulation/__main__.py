"""`make simulate SEEDS=1000`: many seeds on all cores; the last line of stdout is one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tests.simulation.bugs import BUGS, apply
from tests.simulation.many import run_many
from tests.simulation.seed import Outcome, run_seed

_HASH_SEED = "0"
_EVERY_S = 10.0


def main() -> int:
    """Run; 0 when no law was broken."""
    _hash_alike()
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="replay this one, and show what happened")
    parser.add_argument("--jobs", type=int, default=101, help="queued in each seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bug", choices=sorted(BUGS), help="break the validator like this first")
    parser.add_argument("--until", help="end with the seed that breaks this law, as I2 or liveness")
    asked = parser.parse_args()
    if asked.seed is not None:
        return _replay(asked.seed, asked.jobs, asked.bug)
    return _many(asked)


def _many(asked: argparse.Namespace) -> int:
    seeds = range(asked.first, asked.first + asked.seeds)
    began = said = time.monotonic()
    console, ended = Console(stderr=True), 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("seeds", total=len(seeds))

        def tell(outcome: Outcome) -> None:
            nonlocal said, ended
            ended += 1
            for violation in outcome.violations[:3]:
                console.print(f"seed {outcome.seed}: {violation}", markup=False, highlight=False)
            if outcome.violations:
                console.print(f"replay: make simulate ARGS='--seed {outcome.seed}'", highlight=False)
            progress.advance(bar)
            if not console.is_terminal and time.monotonic() - said > _EVERY_S:
                said = time.monotonic()
                console.print(f"{ended} of {len(seeds)} seeds, {said - began:.0f} s", highlight=False)

        figures = run_many(
            seeds,
            jobs=asked.jobs,
            processes=asked.processes,
            bug=asked.bug,
            until=asked.until,
            on_outcome=tell,
        )
    _say(figures.as_json() | {"wall_s": round(time.monotonic() - began, 1)})
    return 1 if figures.violations else 0


def _replay(seed: int, jobs: int, bug: str | None) -> int:
    with apply(bug):
        outcome = run_seed(seed, jobs=jobs, keep=1_000_000)
    for line in outcome.tail:
        sys.stdout.write(f"{line}\n")
    for violation in outcome.violations:
        sys.stderr.write(f"{violation}\n")
    _say({"seed": seed, "digest": outcome.digest, "violations": len(outcome.violations)})
    return 1 if outcome.violations else 0


def _say(figures: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")


def _hash_alike() -> None:
    """The order of a set of texts is part of what a replay must repeat."""
    if os.environ.get("PYTHONHASHSEED") != _HASH_SEED:
        os.environ["PYTHONHASHSEED"] = _HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])  # noqa: S606 - ourselves


if __name__ == "__main__":
    raise SystemExit(main())
