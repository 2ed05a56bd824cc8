"""`make hostile`: every attack of cases 22 to 28 on a running system, each beside its control.

Platform API, local VMM and validator run as processes in a network namespace whose every address is a
trap; honest miners' jobs flow meanwhile. Beside them a second system has one guard widened at a time: there
the same attack must succeed, or it would show nothing. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples.demo.guest_image import offer_guest_image
from examples.demo.interrupts import run_command
from examples.demo.processes import DemoFailed
from examples.demo.run_folder import RunFolder
from rich.console import Console
from tests.hostile import world
from tests.hostile.attack import Attack
from tests.hostile.bait import new_canary
from tests.hostile.catalogue import ATTACKS, SHORT
from tests.hostile.house import House
from tests.hostile.machine import changes, look_at_host
from tests.hostile.run import Run
from tests.hostile.system import System

_SANDBOX, _QEMU = "local-sandbox", "local-qemu"
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run. Returns 0 only if every attack was contained, every control live, and nothing left or leaked."""
    parser = argparse.ArgumentParser(prog="make hostile", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the subset that make test runs")
    parser.add_argument(
        "--only",
        metavar="WORD[,WORD]",
        default="",
        help="attacks whose case, name or clause has it, or another after a comma",
    )
    parser.add_argument("--list", action="store_true", help="name the attacks and their controls, and end")
    parser.add_argument(
        "--image",
        choices=[_SANDBOX, _QEMU],
        default=_SANDBOX,
        help="what is attacked; against local-qemu, attacks that are judged without a look inside",
    )
    parser.add_argument("--output", type=Path, default=ROOT / ".hostile", metavar="DIR")
    asked = parser.parse_args()
    attacks = [
        each
        for each in ATTACKS
        if (each.name in SHORT or not asked.short)
        and not (each.watched and asked.image == _QEMU)
        and any(word in f"{each.case} {each.name} {each.clause}" for word in asked.only.split(","))
    ]
    if asked.list:
        for each in attacks:
            row = (each.case, each.clause, each.name, each.by, each.control.setting, each.control.means)
            sys.stdout.write(" | ".join(map(str, row)) + "\n")
        return 0
    console = Console(stderr=True)
    virtual = asked.image == _QEMU
    try:
        if virtual:
            # While there is a network: later it is found.
            with tempfile.TemporaryDirectory() as scratch:
                offer_guest_image(Path(scratch) / "vmm")
        world.enter()
    except PermissionError as error:
        console.print(f"hostile: {error}: run it as root, who can see from outside what an attack does")
        return 2
    return _run(attacks, console, asked.output, virtual=virtual)


def _run(attacks: list[Attack], console: Console, output: Path, *, virtual: bool) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        seconds = time.monotonic() - began
        console.print(f"{seconds:6.1f} s  {text}", soft_wrap=True, markup=False, highlight=False)

    folders = [RunFolder(output / name, f"platform-hostile-{name}-") for name in ("attacks", "controls")]
    states = tuple(folder.begin(console) for folder in folders)
    before = look_at_host(states)
    traps = world.Traps(new_canary("trap"))
    traps.start()
    closed = System(states[0], traps.secret, open_guards=False, ports="10500-10539", virtual=virtual)
    opened = System(states[1], traps.secret, open_guards=True, ports="12500-12539")
    run = Run(House(closed, traps), House(opened, traps), say, virtual)
    figures: dict[str, Any] = {}
    try:
        say("starting both systems")
        with ThreadPoolExecutor() as both:
            starts = [
                both.submit(closed.start, _wanted(attacks, widened=False), honest=True),
                both.submit(opened.start, _wanted(attacks, widened=True), honest=False),
            ]
        for start in starts:
            start.result()
        say(f"{len(attacks)} attacks")
        run.carry_out(attacks)
        run.settle()
        figures = run.figures()
    except DemoFailed as error:
        say(f"hostile: {error}")
    finally:
        for system in (closed, opened):
            system.stop()
        traps.stop()
        for folder, state in zip(folders, states, strict=True):
            _keep(state, folder.output)
        after = look_at_host(states)
        for folder in folders:
            folder.end()
    if not figures:
        return 1
    changed = changes(before, after)
    for each in changed:
        say(f"the host has changed: {each}")
    figures |= {"host_changes": len(changed), "wall_s": round(time.monotonic() - began, 1)}
    zero = ("canary_leaks", "host_changes", "validator_restarts", "other_jobs_failed")
    order = ("attacks", "contained", "controls_live", *zero)
    sys.stdout.write(json.dumps({key: figures[key] for key in order} | figures) + "\n")
    held = figures["attacks"] == figures["contained"] == figures["controls_live"]
    return 0 if held and not any(figures[key] for key in zero) and figures["other_jobs"] else 1


def _wanted(attacks: list[Attack], *, widened: bool) -> set[str]:
    return {name for attack in attacks for name in attack.challenges(widened=widened)}


def _keep(state: Path, output: Path) -> None:
    """Logs outlive the run, until the next."""
    kept = output / "last"
    shutil.rmtree(kept, ignore_errors=True)
    if (state / "logs").is_dir():
        shutil.copytree(state / "logs", kept)


if __name__ == "__main__":
    run_command(main)
