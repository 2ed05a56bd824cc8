"""`make canary`: secrets of every kind over a full run, and a search for them in everything that is left.

The last line of stdout is one JSON object: how many secrets, in how many places and bytes they were looked
for, and `found`, which must be 0. A secret belongs where it was put (the hotkey's file, the keyring, the
VMM's own record of a VM): there it is not counted. `planted_found`: each is found where it was planted.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo.interrupts import run_command
from examples.demo.processes import DemoFailed, marked
from examples.demo.repositories import make_repository
from examples.demo.run_folder import RunFolder
from examples.demo.stack import Stack, make_stack
from rich.console import Console
from tests.canary.places import (
    Canary,
    Search,
    core_limit,
    launch_secrets,
    search_commands,
    search_files,
    search_pages,
    search_processes,
    search_support_bundle,
)
from tests.canary.spy.challenge import KEY

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_PATIENCE = 180.0


def main() -> int:
    """Returns 0 only if nothing was found where it does not belong."""
    parser = argparse.ArgumentParser(prog="make canary", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".canary", metavar="DIR")
    run = RunFolder(parser.parse_args().output, "platform-canary-")
    console = Console(stderr=True)
    state = run.begin(console)
    began = time.monotonic()
    stack = make_stack(state)
    try:
        report, found = Run(stack, console).all()
    except DemoFailed as error:
        console.print(f"canary: {error}")
        return 1
    finally:
        stack.stop()
        run.end()
    for name, place in found:
        console.print(f"FOUND {name} in {place}", soft_wrap=True)
    print(json.dumps(report | {"wall_s": round(time.monotonic() - began, 1)}))
    clean = not report["found"] and not report["found_by_a_cvm"] and not report["core_bytes_allowed"]
    return 0 if clean and report["planted_found"] == report["canaries"] else 1


class Run:
    """One run."""

    def __init__(self, stack: Stack, console: Console) -> None:
        self._stack = stack
        self._console = console
        self._given = f"canary-env-{secrets.token_hex(16)}"

    def all(self) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """Seed, run, search."""
        stack, state = self._stack, self._stack.state
        stack.start()
        self._console.print("canary: seeding secrets")
        keeper, spy = self._challenge("keeper"), self._challenge("spy")
        given = state / "given"
        given.write_text(self._given)
        self._until(
            "keeper is listed", lambda: keeper in json.dumps((stack.status() or {}).get("challenges"))
        )
        done = stack.validator_command("env", "set", keeper, "KEEPER_SECRET", "--file", str(given))
        if done.returncode:
            raise DemoFailed(f"env set: {done.stderr}")
        given.unlink()
        stack.add_job(keeper, {}, 60)
        canaries = self._canaries()
        self._until("a CVM runs", lambda: bool(list(launch_secrets(state / "vmm"))))
        canaries += [
            Canary(f"launch secret {n}", secret, (state / "vmm",))
            for n, secret in enumerate(launch_secrets(state / "vmm"))
        ]
        self._until("the keeper has ended", lambda: self._ended() == 1)
        masked = [bytes(byte ^ KEY for byte in canary.secret).hex() for canary in canaries]
        spying = stack.add_job(spy, {"masked": masked}, 60)
        self._until("the spy has ended", lambda: self._ended() == 2)
        return self._searched(canaries, spying)

    def _searched(self, canaries: list[Canary], spying: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        stack, state = self._stack, self._stack.state
        pids = {part.process.pid: name for name, part in stack.processes.parts.items()}
        pids |= {process.pid: "validator" for process in marked(state) if process.pid not in pids}
        search = Search(canaries)
        self._console.print("canary: searching files, pages, commands, processes")
        search_files(search, state)
        search_pages(search, stack)
        search_commands(search, stack)
        search_support_bundle(search, stack, state)
        search_processes(search, pids)
        results = {job["id"]: json.loads(job["result"]) for job in stack.jobs()}
        kept = [body["score"] for job, body in results.items() if job != spying]
        if kept != [1.0]:
            raise DemoFailed(f"the keeper did not have its secret: {kept}")
        spied = results[spying]["metrics"]
        report = {
            "canaries": len(canaries),
            "planted_found": _planted(canaries, state / "planted"),
            "places": search.places,
            "bytes_searched": search.size,
            "found": len(search.found),
            "read_by_a_cvm": int(spied["read"]),
            "found_by_a_cvm": int(spied["found"]),
            "core_bytes_allowed": core_limit(stack.processes.parts["validator"].process.pid),
        }
        return report, search.found

    def _canaries(self) -> list[Canary]:
        stack, state = self._stack, self._stack.state
        folder = stack.validator.folder
        hotkey = folder.with_suffix(".hotkey")
        token, admin = (state / "vmm" / "token"), folder / "admin.token"
        keyring = folder / "keyring"
        return [
            Canary("hotkey", bytes.fromhex(hotkey.read_text().strip().removeprefix("0x")), (hotkey,)),
            Canary("VMM token", token.read_text().strip().encode(), (token,), frozenset({"validator"})),
            Canary("operators' token", admin.read_text().strip().encode(), (admin,)),
            Canary("master key", (keyring / "master.key").read_bytes(), (keyring,)),
            Canary("values key", next((keyring / "values").glob("*.key")).read_bytes(), (keyring,)),
            Canary("administrator's token", stack.admin_token.encode()),
            Canary("environment value", self._given.encode()),
            Canary("dynamic value", self._given[::-1].encode()),
        ]

    def _challenge(self, name: str) -> str:
        repository = self._stack.state / "repositories" / name
        commit = make_repository(HERE / name, repository)
        return self._stack.add_challenge(name, repository, commit, 60, memory_mb=192)

    def _ended(self) -> int:
        return sum(job["status"] in ("completed", "failed", "cancelled") for job in self._stack.jobs())

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        self._console.print(f"canary: until {what}")
        deadline = time.monotonic() + _PATIENCE
        while not holds():
            if time.monotonic() > deadline:
                raise DemoFailed(f"not so that {what} after {_PATIENCE:.0f} s")
            time.sleep(0.1)


def _planted(canaries: list[Canary], folder: Path) -> int:
    """How many are found where they were planted: a search that finds nothing proves nothing."""
    folder.mkdir()
    for number, canary in enumerate(canaries):
        form = canary.forms()[number % len(canary.forms())]
        (folder / str(number)).write_bytes(b"before " + form + b" after")
    control = Search(canaries)
    search_files(control, folder)
    return len({name for name, _ in control.found})


if __name__ == "__main__":
    run_command(main)
