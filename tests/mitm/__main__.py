"""`make mitm`: every attack on the session between validator and guest; the last line has the figures.

Version 2 under the policy of level Tee, then version 1 as a policy below Tee allows it: against challenges
that speak nothing else, and, for the downgrades, against one that speaks version 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import structlog
from tests.mitm.catalogue import RELAY, SHORT, catalogue
from tests.mitm.house import MitmHouse, Outcome

_AT_ONCE = 4


async def run(names: list[str], folder: Path) -> int:
    """Returns the exit code: 0 when nothing succeeded in version 2, all was tried, and the relays passed."""
    began, house = time.monotonic(), MitmHouse(folder)
    new = await _all(house, [(name, False, False) for name in names])
    old = await _all(house, [(name, True, True) for name in names])
    downgrades = [(name, True, False) for name in names if name.startswith("downgrade")]
    mixed = await _all(house, downgrades)
    for title, outcomes in (("version 2", new), ("version 1", old), ("version 1 allowed", mixed)):
        for each in outcomes:
            sys.stdout.write(f"{title:<18} {_line(each)}\n")
    relayed = [each for each in (*new, *old) if each.attack == RELAY]
    figures = {
        "attacks": len(new),
        "v2_succeeded": sum(bool(each.won) for each in new),
        "v2_not_reached": [each.attack for each in new if not each.reached],
        "tampered": sum(each.report.tampered for each in new),
        "tampered_accepted": sum(each.report.survived for each in new),
        "plaintext_seen": sum(len(each.read) for each in new),
        "forged_results": sum("result" in each.won for each in new),
        "results_despite_attack": sum(each.result is not None for each in new if each.attack != RELAY),
        "v1_succeeded": [each.attack for each in old if each.won],
        "v1_not_reached": [each.attack for each in old if not each.reached],
        "v1_allowed_v2_guest_succeeded": [each.attack for each in mixed if each.won],
        "relays_passed": sum(each.result is not None and not each.won for each in relayed),
        "wall_s": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    held = figures["v2_succeeded"] == 0 and not figures["v2_not_reached"]
    return 0 if held and figures["relays_passed"] == len(relayed) else 1


async def _all(house: MitmHouse, wanted: list[tuple[str, bool, bool]]) -> list[Outcome]:
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str, allow_v1: bool, old: bool) -> Outcome:
        async with places:
            return await house.run(name, allow_v1=allow_v1, old=old)

    async with asyncio.TaskGroup() as tasks:
        made = [tasks.create_task(one(*each)) for each in wanted]
    return [each.result() for each in made]


def _line(outcome: Outcome) -> str:
    if not outcome.reached:
        what = "no moment for it"
    elif outcome.won:
        what = f"SUCCEEDED: {', '.join(outcome.won)}"
    else:
        what = "nothing gained"
    ended = "the honest result came" if outcome.result is not None and "result" not in outcome.won else ""
    return f"{outcome.attack:<44} {what}; {ended or outcome.why or 'his result was taken'}"[:200]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="make mitm", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one attack of each kind")
    parser.add_argument("--only", metavar="WORD", default="", help="attacks whose name has it")
    given = parser.parse_args()
    names = [name for name in (SHORT if given.short else catalogue()) if given.only in name]
    with tempfile.TemporaryDirectory(prefix="mitm-") as folder:
        return asyncio.run(run(names, Path(folder)))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    raise SystemExit(main())
