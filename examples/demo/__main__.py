"""`make demo`: starts everything, evaluates every example submission, proves that nothing is left."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
from examples.demo import display
from examples.demo.guest_image import offer_guest_image
from examples.demo.interrupts import run_command
from examples.demo.leftovers import Machine, left, look
from examples.demo.miners import Upload, find_uploads, upload
from examples.demo.processes import DemoFailed
from examples.demo.repositories import make_repository
from examples.demo.run_folder import RunFolder
from examples.demo.stack import Stack, make_stack
from rich.console import Console
from rich.live import Live

from platform_protocol.signing import Keypair

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
_SANDBOX, _QEMU = "local-sandbox", "local-qemu"
_PATIENCE = {_SANDBOX: 240.0, _QEMU: 900.0}
"""Seconds for all jobs."""
_FEWER = {"centroid", "crash", "deflate", "spy"}
"""One of each kind, for virtual machines whose processor may be emulated."""
_FINISHED = ("completed", "failed", "cancelled")


def main() -> int:
    """Run the demo. Returns the exit code: 0 only if every expectation held."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running and print the URLs")
    parser.add_argument(
        "--outage", type=float, default=0, metavar="SECONDS", help="kill the Platform API for so long"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / ".demo", metavar="DIR", help="where report.json goes"
    )
    parser.add_argument(
        "--image",
        choices=[_SANDBOX, _QEMU],
        default=_SANDBOX,
        help="what CVMs are made of; with local-qemu fewer submissions",
    )
    arguments = parser.parse_args()
    console = Console()
    output: Path = arguments.output
    folder = RunFolder(output, "platform-demo-")
    state = folder.begin(console)
    before = look(state)
    virtual = arguments.image == _QEMU
    stack = make_stack(state, level="Vm" if virtual else "Container")
    try:
        if virtual:
            offer_guest_image(stack.state / "vmm")
            stack.validator_environment = {"VALIDATOR_CPU_CORES": "2"}  # machines at once
        uploads = [one for one in find_uploads(EXAMPLES) if not virtual or one.name in _FEWER]
        demo = Demo(stack, console, before, output, uploads, keep=arguments.keep, outage=arguments.outage)
        return demo.run()
    except (DemoFailed, psutil.Error) as error:
        console.print(f"[red]demo: {error}[/]", soft_wrap=True, highlight=False)
        return 1
    finally:
        if not arguments.keep:
            stack.stop()
            folder.end()


class Demo:
    """One run."""

    def __init__(
        self,
        stack: Stack,
        console: Console,
        before: Machine,
        output: Path,
        uploads: list[Upload],
        *,
        keep: bool,
        outage: float,
    ) -> None:
        self._stack = stack
        self._console = console
        self._before = before
        self._output = output
        self._uploads = uploads
        self._patience = _PATIENCE[_QEMU if stack.validator.level == "Vm" else _SANDBOX]
        self._keep = keep
        self._outage = outage
        self._began = time.monotonic()
        self._made: dict[str, Upload] = {}
        self._challenges: dict[str, str] = {}
        self._miners: dict[str, Keypair] = {}
        self._receipts = 0

    def run(self) -> int:
        """The whole of it."""
        stack, console = self._stack, self._console
        console.print(
            f"demo: starting Platform API, VMM and validator (state in {stack.state})", soft_wrap=True
        )
        stack.start()
        self._register()
        self._submit()
        console.print(f"demo: {len(self._made)} submissions of {len(self._miners)} miners are queued")
        self._watch()
        jobs = stack.jobs()
        boards = {name: self._board(identity) for name, identity in self._challenges.items()}
        self._keep_receipts(jobs)
        if self._keep:
            report, faults = self._report(jobs, boards, vms_left=0, left_over={}), self._faults(jobs)
            self._finish(report, faults)
            console.print(f"still running: Platform API {stack.base} (docs at /docs), state {stack.state}")
            console.print(
                f"validator http://127.0.0.1:{stack.validator.guest_port}/health, logs in {stack.state}/logs"
            )
            return int(bool(faults))
        vms_left, codes = self._stop()
        found = left(self._before, look(stack.state))
        report = self._report(jobs, boards, vms_left=vms_left, left_over=found)
        faults = self._faults(jobs) + [f"{kind} left: {', '.join(names)}" for kind, names in found.items()]
        faults += [f"{name} ended with exit code {code}" for name, code in codes.items() if code]
        faults += [f"{vms_left} VMs left"] if vms_left else []
        self._finish(report, faults)
        return int(bool(faults))

    def _keep_receipts(self, jobs: list[dict[str, Any]]) -> None:
        """Beside the report, with what verifies them: `validator verify`, `examples/verify_receipt.py`."""
        folder = self._output / "receipts"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for job in jobs:
            found = self._stack.receipt(job["id"])
            if found is not None:
                self._receipts += 1
                (folder / f"{self._made[job['id']].name}.json").write_text(json.dumps(found))
        shutil.copy(self._stack.state / "vmm" / "simulated-root.pem", folder / "simulated-root.pem")
        for kept in (self._stack.state / "validator" / "cache" / "collateral").glob("*/*.json"):
            shutil.copy(kept, folder / "collateral.json")

    def _register(self) -> None:
        for name in sorted({one.challenge for one in self._uploads}):
            repository = self._stack.state / "repositories" / name
            commit = make_repository(EXAMPLES / name, repository)
            self._challenges[name] = self._stack.add_challenge(name, repository, commit, timeout_s=60)

    def _submit(self) -> None:
        for what in self._uploads:
            if what.miner not in self._miners:
                seed = what.miner.encode().ljust(32, b".")
                self._miners[what.miner] = Keypair.from_seed(seed)
            miner = self._miners[what.miner]
            answer = upload(self._stack.base, self._challenges[what.challenge], miner, what)
            self._made |= dict.fromkeys(answer["jobs"], what)

    def _watch(self) -> None:
        down_since: float | None = None
        outage_done = self._outage <= 0
        note = ""
        with Live(console=self._console, refresh_per_second=4, transient=False) as screen:
            while True:
                jobs = self._stack.jobs()
                finished = sum(job["status"] in _FINISHED for job in jobs)
                now = time.monotonic()
                if not outage_done and down_since is None and finished >= len(jobs) // 3:
                    self._stack.processes.kill("platform-api")
                    down_since = now
                if down_since is not None and now - down_since >= self._outage:
                    self._stack.restart_api()
                    down_since, outage_done = None, True
                note = f"Platform API killed {now - down_since:.0f} s ago" if down_since is not None else ""
                frame = display.live(
                    jobs, self._made, self._stack.status(), self._stack.vms(), note, now - self._began
                )
                screen.update(frame)
                if finished == len(jobs) and outage_done:
                    return
                if now - self._began > self._patience:
                    raise DemoFailed(f"{len(jobs) - finished} jobs did not end within {self._patience:.0f} s")
                time.sleep(0.25)

    def _stop(self) -> tuple[int, dict[str, int]]:
        """Drain the validator, look at the VMM, end the rest. (VMs left, exit codes)."""
        with self._console.status("demo: draining the validator"):
            code = self._stack.processes.stop("validator", 90)
            vms_left = len(self._stack.vms())
            codes = self._stack.stop()
        return vms_left, {**codes, "validator": code}

    def _board(self, challenge_id: str) -> list[dict[str, Any]]:
        names = {keypair.address: name for name, keypair in self._miners.items()}
        return [
            {
                "rank": entry["rank"],
                "miner": names[entry["miner_hotkey"]],
                "submission": self._made[entry["job_id"]].name,
                "score": entry["score"],
                "attestation": entry["attestation"],
            }
            for entry in self._stack.leaderboard(challenge_id)
        ]

    def _report(
        self,
        jobs: list[dict[str, Any]],
        boards: dict[str, Any],
        *,
        vms_left: int,
        left_over: dict[str, list[str]],
    ) -> dict[str, Any]:
        outcomes = [job["outcome"] for job in jobs]
        return {
            "jobs": len(jobs),
            "scored": outcomes.count("succeeded"),
            "failed_submissions": outcomes.count("failed") + outcomes.count("timeout"),
            "infra_errors": outcomes.count("infra_error") + outcomes.count("sandbox_died"),
            "receipts": self._receipts,
            "results_lost": sum(job["status"] not in _FINISHED for job in jobs),
            "vms_left": vms_left,
            "processes_left": len(left_over.get("processes", [])),
            "wall_s": round(time.monotonic() - self._began, 1),
            "leaderboards": boards,
        }

    def _faults(self, jobs: list[dict[str, Any]]) -> list[str]:
        """What differs from examples/expectations.json."""
        table = json.loads((EXAMPLES / "expectations.json").read_text())["submissions"]
        expected = {(row["challenge"], row["miner"], row["name"]): row for row in table}
        faults = [f"{self._receipts} receipts for {len(jobs)} jobs"] if self._receipts != len(jobs) else []
        for job in jobs:
            what = self._made[job["id"]]
            wanted = expected[what.challenge, what.miner, what.name]
            name = f"{what.challenge}/{what.miner}/{what.name}"
            error = (json.loads(job["result"])["error"] if job["result"] else None) or ""
            if job["outcome"] != wanted["outcome"]:
                faults.append(f"{name}: expected {wanted['outcome']}, got {job['outcome']} ({error})")
            elif wanted["outcome"] != "succeeded" and (job["score"] != 0.0 or wanted["error"] not in error):
                faults.append(
                    f"{name}: expected score 0 and {wanted['error']!r}, got {job['score']} and {error!r}"
                )
            elif "score" in wanted and not wanted["score"][0] <= job["score"] <= wanted["score"][1]:
                faults.append(f"{name}: expected a score in {wanted['score']}, got {job['score']}")
        return faults

    def _finish(self, report: dict[str, Any], faults: list[str]) -> None:
        report["wall_s"] = round(time.monotonic() - self._began, 1)
        (self._output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        display.summary(report, faults, self._console)
        print(json.dumps(report))


if __name__ == "__main__":
    run_command(main)
