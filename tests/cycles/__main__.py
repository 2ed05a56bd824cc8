"""`make cycles`: sandboxes made and destroyed by the thousand; the last line is one object, all counted.

It fails when anything of a sandbox is left, or when the VMM's memory grows.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from examples.demo.interrupts import run_command
from examples.demo.run_folder import RunFolder
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tests.cycles.run import Cycles
from tests.cycles.vmm import Vmm, VmmFailed

ROOT = Path(__file__).resolve().parents[2]
_LEAST = 20
_LINES = 10
"""How often it says how far it is where nobody sees a bar."""


def main() -> int:
    """Run. Returns 0 when nothing is left."""
    parser = argparse.ArgumentParser(prog="python -m tests.cycles", description=__doc__)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3, help="of the VMM, by SIGKILL, in the first half")
    parser.add_argument("--seed", type=int, default=1, help="of the moments at which VMs are killed")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds that what goes has to be gone")
    parser.add_argument("--output", type=Path, default=ROOT / ".cycles", metavar="DIR")
    parser.add_argument(
        "--vmm", nargs="+", default=["-m", "platform_vmm"], help="what Python runs as the VMM"
    )
    asked = parser.parse_args()
    if asked.cycles < _LEAST:
        parser.error(f"--cycles: expected at least {_LEAST}")
    console = Console(stderr=True)
    folder = RunFolder(asked.output, "platform-cycles-")
    state = folder.begin(console)
    vmm = Vmm(state, asked.vmm)
    try:
        with _progress(console) as progress:
            bar = progress.add_task("cycles", total=asked.cycles)
            cycles = Cycles(
                state,
                vmm,
                seed=asked.seed,
                settle=asked.settle,
                say=lambda text: progress.console.print(text, soft_wrap=True, markup=False, highlight=False),
            )

            def show(done: int) -> None:
                progress.update(bar, completed=done)
                if not console.is_terminal and done * _LINES % asked.cycles < _LINES:
                    progress.console.print(f"{done} of {asked.cycles} cycles", highlight=False)

            report = cycles.run(asked.cycles, asked.kills, show)
    except VmmFailed as error:
        console.print(f"cycles: {error}", soft_wrap=True, markup=False, highlight=False)
        return 1
    finally:
        vmm.end(signal.SIGKILL)
        folder.end()
    sys.stdout.write(json.dumps(report) + "\n")
    return int(report["leaks"] > 0)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


if __name__ == "__main__":
    run_command(main)
