"""A world of the simulation for each crashpoint, in which nothing goes wrong but one `kill -9` there.

Prints what became of each, as JSON. It is a process of its own because a simulation takes logging over.
"""

from __future__ import annotations

import json
import sys

from tests.simulation.plan import NodePlan, Plan
from tests.simulation.seed import run_seed

from platform_validator.crashpoint import POINTS

_JOBS = 12
ELSEWHERE = frozenset({"instance_draining"})
"""Passed only where a machine has room for a single CVM, for minutes: no machine here is so small."""


def world(point: str) -> Plan:
    """One validator that is killed here once; its challenge is updated to a good and a bad version."""
    node = NodePlan(
        crashes=(),
        crashpoints=((point, 1),),
        stops=(),
        wall_jumps=(),
        full_disk=(),
        vmm_down=(),
        cut_off=(),
        drains=(),
        meddling=(),
        vmm_restarts=(),
    )
    return Plan(
        seed=3,
        validators=1,
        challenges=1,
        jobs=_JOBS,
        arrive_within=300.0,
        faults_until=400.0,
        lost=0.0,
        late=0.0,
        repeated=0.0,
        hint_faults=0.0,
        vmm_faults=0.0,
        deaths=0.0,
        disk=0.0,
        api_down=(),
        api_restarts=(),
        updates=((100.0, True), (250.0, False)),
        cancels=(),
        forgeries=(),
        removing_hours=False,
        nodes=(node,),
    )


def main() -> None:
    """Every point's world."""
    found = {}
    for point in (each for each in POINTS if each not in ELSEWHERE):
        plan = world(point)
        outcome = run_seed(plan.seed, plan=plan)
        found[point] = {
            "struck": outcome.counts[f"at_{point}"],
            "queued": plan.jobs,
            "ended": sum(count for name, count in outcome.counts.items() if name.startswith("ended_")),
            "violations": outcome.violations,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
