"""`make chaos`: real processes under `kill -9`, SIGSTOP and a failing network; the last line is one object.

Every figure is counted: kills by exit status, results by the Platform API's database, VMs by the VMM.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.demo.interrupts import run_command
from examples.demo.processes import DemoFailed
from examples.demo.run_folder import RunFolder
from examples.demo.stack import Stack, make_stack
from rich.console import Console
from tests.chaos.display import Display
from tests.chaos.evidence import watch
from tests.chaos.plan import VALIDATOR, full, short
from tests.chaos.run import RIVAL, ChaosRun
from tests.network.proxy import TcpProxy

from platform_validator.crashpoint import POINTS

ROOT = Path(__file__).resolve().parents[2]
TERM_S = 6
"""A lease's term: short, so that stops and outages outlast it; renewed every 2 s."""
KILLS = 60
_QUEUE, _SHORT_QUEUE = 12, 5


def main() -> int:
    """Run. Returns 0 when nothing was lost, doubled, leaked or left, and enough was killed to say so."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument("--short", action="store_true", help="a few kills at the most telling points")
    parser.add_argument("--output", type=Path, default=ROOT / ".chaos", metavar="DIR")
    asked = parser.parse_args()
    console = Console(stderr=True)
    folder = RunFolder(asked.output, "platform-chaos-")
    state = folder.begin(console)
    stack = make_stack(state, (VALIDATOR, RIVAL))
    try:
        report, faults = _run(stack, asked.seed, console, short_plan=asked.short)
    except DemoFailed as error:
        console.print(f"chaos: {error}", soft_wrap=True, highlight=False, markup=False)
        return 1
    finally:
        _keep(stack, asked.output)
        folder.end()
    for fault in faults:
        console.print(f"does not hold: {fault}", soft_wrap=True, highlight=False, markup=False)
    sys.stdout.write(json.dumps(report) + "\n")
    return int(bool(faults))


def _run(stack: Stack, seed: int, console: Console, *, short_plan: bool) -> tuple[dict[str, Any], list[str]]:
    began = time.monotonic()
    with TcpProxy(("127.0.0.1", stack.api_port)) as proxy, Display(console) as display:
        stack.validators[0] = replace(stack.validator, api=proxy.url)
        stack.api_environment = {
            "PLATFORM_API_LEASE_TERM": f"{TERM_S}s",
            "PLATFORM_API_AUDIENCES": f"{stack.base},{proxy.url}",
        }
        stack.start_api()
        watch(stack.database)
        stack.start_vmm()
        run = ChaosRun(
            stack,
            proxy,
            term=TERM_S,
            rng=random.Random(seed),
            queue=_SHORT_QUEUE if short_plan else _QUEUE,
            say=display.say,
            shown=display.show,
        )
        run.begin()
        run.carry_out((short if short_plan else full)(seed))
        run.end()
        vms, leftovers = run.leaks()
        found, tally = run.figures(), run.tally
    report = {
        "kills": tally.kills.total(),
        "results_lost": len(found.lost),
        "results_double": len(found.double),
        "vms_leaked": len(vms) + sum(map(len, leftovers.values())),
        "unrecovered": len(tally.unrecovered) + len(found.unended),
        "results_wrong": len(found.wrong),
        "jobs": sum(found.outcomes.values()),
        "outcomes": found.outcomes,
        "by_target": dict(tally.kills),
        "points": len(tally.points),
        "stored": len(run.stored.results),
        "undelivered_at_kills": run.stored.waiting,
        "stops": tally.stops,
        "taken_over": len(found.taken_over),
        "fenced": len(found.fenced),
        "versions": run.feed.versions,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }
    faults = [
        *(f"result lost: job {job}, attempt {attempt}" for job, attempt in found.lost),
        *(f"second result: job {job}, attempt {attempt}" for job, attempt in found.double),
        *(f"wrong score: job {job}" for job in found.wrong),
        *(f"VM left: {name}" for name in vms),
        *(f"{kind} left: {', '.join(names)}" for kind, names in leftovers.items()),
        *tally.unrecovered,
        *(f"job without an end: {job}" for job in found.unended),
        *_too_little(report, tally.missed, short_plan=short_plan),
    ]
    return report, faults


def _too_little(report: dict[str, Any], missed: list[str], *, short_plan: bool) -> list[str]:
    """A run that did not do enough to prove anything has not held either."""
    found = [f"never struck: {each}" for each in missed]
    if report["undelivered_at_kills"] == 0:
        found.append("no result lay undelivered at any kill: nothing could be lost")
    if short_plan:
        return found
    if report["kills"] < KILLS:
        found.append(f"{report['kills']} kills, expected at least {KILLS}")
    if report["points"] < len(POINTS):
        found.append(f"{report['points']} of {len(POINTS)} crashpoints struck")
    if report["taken_over"] == 0:
        found.append("no job was taken over from a stopped validator")
    return found


def _keep(stack: Stack, output: Path) -> None:
    """Logs and databases outlive the run, until the next."""
    kept = output / "last"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in [stack.state / "logs", stack.database, *(part.database for part in stack.validators)]:
        if path.is_dir():
            shutil.copytree(path, kept / path.name)
        elif path.exists():
            shutil.copy(path, kept / f"{path.parent.name}-{path.name}")


if __name__ == "__main__":
    run_command(main)
