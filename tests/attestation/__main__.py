"""`make attest-matrix`: every check against real and generated quotes; the last line has the figures."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter

import structlog
from tests.attestation.evidence import ACCEPTED, World, judged
from tests.attestation.honest import honest, real_chains, real_measurements, real_replays
from tests.attestation.tampered_receipts import receipts
from tests.attestation.tampering import cases


async def run() -> int:
    """Returns the exit code: 0 when all that is honest is accepted, and all else refused for its reason."""
    began, world = time.monotonic(), World()
    wrong = [f"not accepted: {name}" for name, good in honest(world) if await judged(good) != ACCEPTED]
    accepted, answers, areas = 0, set[str](), Counter[str]()
    for case in cases():
        answer = await judged(case.make(world))
        accepted += answer == ACCEPTED
        answers.add(answer)
        areas[case.area] += 1
        if answer != case.answer:
            wrong.append(f"{case}: expected {case.answer}, got {answer}")
    for lie in receipts():
        refuted = lie.refuted(world)
        accepted += not refuted
        answers.add(f"refuted {lie.check}")
        areas["receipt"] += 1
        if lie.check not in refuted:
            wrong.append(f"{lie}: expected {lie.check} to refute it, got {refuted}")
    for line in wrong:
        sys.stdout.write(f"WRONG {line}\n")
    for area, count in areas.items():
        sys.stdout.write(f"{area:<14} {count:>4} kinds of tampering\n")
    figures = {
        "real_verified": real_chains(),
        "real_registers_replayed": real_replays(),
        "real_registers_computed": real_measurements(),
        "honest_accepted": len(list(honest(world))) - sum(one.startswith("not accepted") for one in wrong),
        "tampered": sum(areas.values()),
        "tampered_accepted": accepted,
        "wrong_reason": sum(not one.startswith("not accepted") for one in wrong),
        "claims_tested": len(answers - {ACCEPTED}),
        "wall_s": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    raise SystemExit(asyncio.run(run()))
