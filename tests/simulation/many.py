"""Many seeds on several processes, and their figures added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from tests.simulation.bugs import apply
from tests.simulation.faults import FAULTS
from tests.simulation.seed import Outcome, run_seed


@dataclass(slots=True)
class Figures:
    """What many seeds came to.

    Attributes:
        seeds: How many ran.
        jobs: How many were queued.
        virtual_s: Virtual seconds that passed in them.
        violations: How often a law was broken.
        counts: Everything that was counted, by name.
        broken: How often each law was.
    """

    seeds: int = 0
    jobs: int = 0
    virtual_s: float = 0.0
    violations: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """One more seed."""
        self.seeds += 1
        self.jobs += outcome.jobs
        self.virtual_s += outcome.virtual_s
        self.violations += len(outcome.violations)
        self.counts += outcome.counts
        self.broken += outcome.broken

    def as_json(self) -> dict[str, object]:
        """The figures that people look at; the outcomes of jobs by name."""
        counts = self.counts
        ended = {name.removeprefix("ended_"): n for name, n in counts.items() if name.startswith("ended_")}
        return {
            "seeds": self.seeds,
            "virtual_hours": round(self.virtual_s / 3600, 1),
            "jobs": self.jobs,
            "crashes": counts["crashes"],
            "at_crashpoints": counts["fault_crashpoint"],
            "crashpoints": sum(name.startswith("at_") for name in counts),
            "drains": counts["drains"],
            "claims": counts["claims"],
            "adopted": counts["adopted"],
            "results_stored": counts["stored"],
            "results_accepted": counts["accepted"],
            "lapses": counts["lapses"],
            "outcomes": dict(sorted(ended.items())),
            "faults": {name: counts[f"fault_{name}"] for name in FAULTS},
            "broken": dict(sorted(self.broken.items())),
            "violations": self.violations,
        }


def run_many(
    seeds: Iterable[int],
    *,
    jobs: int,
    processes: int,
    bug: str | None = None,
    until: str | None = None,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> Figures:
    """Run seeds, in their order.

    Args:
        seeds: Which.
        jobs: Queued in each.
        processes: How many at once; 1 runs them here.
        bug: Put in first, by its name in `BUGS`.
        until: End with the seed that breaks this law.
        on_outcome: Is told of each as it ends.
    """
    figures = Figures()
    work = [(seed, jobs, bug, until) for seed in seeds]

    def tell(outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            figures.add(outcome)
            on_outcome(outcome)
            if until in figures.broken:
                return

    if processes == 1:
        tell(map(_one, work))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            tell(pool.map(_one, work, chunksize=2))
            pool.shutdown(cancel_futures=True)
    return figures


def _one(work: tuple[int, int, str | None, str | None]) -> Outcome:
    seed, jobs, bug, until = work
    with apply(bug):
        return run_seed(seed, jobs=jobs, until=until)
