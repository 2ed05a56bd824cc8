"""One whole system, as processes, with challenges to attack and secrets to find."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from examples.demo.guest_image import offer_guest_image
from examples.demo.ports import free_ports
from examples.demo.processes import DemoFailed
from examples.demo.repositories import commit_all, make_repository
from examples.demo.stack import make_stack, rows
from tests.canary.places import Canary
from tests.hostile.attack import Guest
from tests.hostile.bait import Bait, new_canary
from tests.hostile.watch import Watch
from tests.hostile.widening import FILE
from tests.hostile.world import INSIDE, LISTED, RESOLVER

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_ECHO = HERE.parent / "chaos" / "challenge"
_LIMITS = {
    "VALIDATOR_CPU_CORES": "16",
    "VALIDATOR_MEMORY_MB": "4096",
    "VALIDATOR_DISK_MB": "20480",
    "VALIDATOR_MAX_CONCURRENT_JOBS": "4",
    "VALIDATOR_LOG_FORMAT": "people",
}
_OUTBOUND = f"""
[sandbox_config.network_policy]
allow_outbound = true
allowed_hosts = ["{LISTED}", "{INSIDE}"]
allowed_ports = [80]
dns_servers = ["{RESOLVER}"]
"""
_DESCRIPTORS = 1024
"""Of the validator: a usual limit of a service, which an attack may try to use up."""
_READY_S = 300.0
_TICK = 0.05
_VALIDATOR = frozenset({"validator"})


class System:
    """A stack with the arena, a hostile challenge, and one with secrets.

    Args:
        state: The run's folder.
        traps_secret: What answers around it.
        open_guards: Whether its parts are those of `tests/hostile/widening`.
        ports: Host ports of its VMs.
        virtual: Whether its VMs are virtual machines and not sandboxes.
    """

    def __init__(
        self, state: Path, traps_secret: str, *, open_guards: bool, ports: str, virtual: bool = False
    ) -> None:
        self._open = open_guards
        self.virtual = virtual
        self.stack = make_stack(state, level="Vm" if virtual else "Container")
        self.stack.validators[0] = replace(self.stack.validator, port_range=ports)
        self._widen = state / "widen"
        self._widen.write_text("")
        self.canaries: list[Canary] = []
        self.watch = Watch(state / "vmm")
        self.challenges: dict[str, str] = {}
        self.restarts = 0
        self._secrets: dict[str, str] = {"arena": new_canary("arena"), "vault": new_canary("vault")}
        folder = state / "bait"
        folder.mkdir(mode=0o755)
        self.bait_folder = folder
        host = new_canary("host")
        (folder / "secret").write_text(host)
        (folder / "secret").chmod(0o644)
        self.bait = Bait(folder / "secret")
        self.canaries += [
            Canary("a host's file", host.encode(), (folder,)),
            Canary("the traps' secret", traps_secret.encode()),
        ]
        self.vmm_port = 0

    @property
    def state(self) -> Path:
        """Its folder."""
        return self.stack.state

    def start(self, names: set[str], *, honest: bool) -> None:
        """Start the three processes and serve the challenges.

        Raises:
            DemoFailed: Something did not come up.
        """
        stack = self.stack
        stack.start_api()
        self._start_vmm()
        limits = _LIMITS | ({"VALIDATOR_CPU_CORES": "3"} if self.virtual else {})
        stack.validator_environment = limits | {"DSTACK_VMM_URL": f"http://127.0.0.1:{self.vmm_port}"}
        self.start_validator()
        self.watch.start()
        self._plant()
        for name in sorted(names):
            self._register(name)
        if honest:
            commit = make_repository(_ECHO, self.state / "repositories" / "echo")
            self.challenges["echo"] = stack.add_challenge(
                "echo", self.state / "repositories" / "echo", commit, 60, memory_mb=256
            )
        for name in sorted(names):
            kind = name.partition("-")[0]
            if kind in self._secrets:
                self._give(name, f"{kind.upper()}_SECRET", self._secrets[kind])
        self._until("every challenge serves", self._serve, _READY_S * (3 if self.virtual else 1))

    def stop(self) -> dict[str, int]:
        """Drain and end everything. Exit codes by name."""
        self.watch.stop()
        self.bait.close()
        code = self.stack.processes.stop("validator", 90) if "validator" in self.stack.processes.parts else 0
        return self.stack.stop() | {"validator": code}

    def job(self, job: str) -> dict[str, Any]:
        """A job, by the Platform API's database."""
        return rows(
            self.stack.database,
            f"SELECT status, outcome, score, result FROM jobs WHERE id = '{job}'",
        )[0]

    def guest(self, job: str) -> Guest:
        """What the host saw of the VM that a job had last."""
        found = rows(
            self.stack.validator.database,
            "SELECT cvms_journal.vm_id AS vm FROM jobs_journal"
            " JOIN cvms_journal ON cvms_journal.name = jobs_journal.vm"
            f" WHERE jobs_journal.job_id = '{job}'",
        )
        return self.watch.guests.get(found[-1]["vm"], Guest()) if found else Guest()

    def bundle(self, name: str) -> str:
        """The digest of a challenge's bundle, by which the validator's listener names it."""
        found = rows(
            self.stack.validator.database,
            "SELECT bundle_sha256 AS digest FROM challenges_instances"
            f" WHERE challenge_id = '{self.challenges[name]}' AND bundle_sha256 IS NOT NULL",
        )
        return str(found[-1]["digest"])

    def memory(self) -> int:
        """Of the validator and the processes that it started."""
        total = 0
        with contextlib.suppress(psutil.Error):
            validator = psutil.Process(self.stack.processes.parts["validator"].process.pid)
            for process in (validator, *validator.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    @property
    def log(self) -> Path:
        """The validator's."""
        return self.stack.processes.parts["validator"].log

    def _start_vmm(self) -> None:
        stack = self.stack
        self.vmm_port = free_ports(1)[0]
        if self.virtual:
            offer_guest_image(self.state / "vmm")
        command = _program("platform-vmm", "vmm", open_guards=self._open)
        command += ["serve", "--listen", f"127.0.0.1:{self.vmm_port}", "--state-dir", str(self.state / "vmm")]
        command += [
            "--guest-port",
            str(stack.validator.guest_port),
            "--guest-port",
            str(stack.validator.egress_port),
        ]
        stack.processes.start("vmm", command, self._environment())
        stack.processes.wait_for("vmm", "answering", self._vmm_answers, 60)

    def _vmm_answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.vmm_port), timeout=1).close()
        except OSError:
            return False
        return True

    def start_validator(self) -> None:
        stack, part = self.stack, self.stack.validator
        if not part.folder.exists():
            part.write()
            with part.config.open("a") as file:
                file.write(_OUTBOUND)
        command = _program("validator", "validator", open_guards=self._open)
        command += ["run", "--config", str(part.config)]
        settings = part.environment() | dict(stack.validator_environment) | self._environment()
        started = stack.processes.start("validator", command, settings)
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
        stack.processes.wait_for("validator", "ready", part.ready, 60)

    def _environment(self) -> dict[str, str]:
        if not self._open:
            return {}
        return {"PYTHONPATH": str(ROOT), FILE: str(self._widen), "HOSTILE_SCRATCH": str(self.state)}

    def _plant(self) -> None:
        """The host's secrets, also where everyone may read them: only the VM's walls keep them then."""
        part = self.stack.validator
        hotkey, token, admin = (
            part.folder.with_suffix(".hotkey"),
            self.state / "vmm" / "token",
            part.folder / "admin.token",
        )
        master = part.folder / "keyring" / "master.key"
        for name, path in (("hotkey", hotkey), ("token", token), ("admin", admin)):
            copy = self.bait_folder / name
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o644)
        text = hotkey.read_text().strip()
        self.canaries += [
            Canary("hotkey", text.removeprefix("0x").encode(), (hotkey, self.bait_folder)),
            Canary("VMM token", token.read_text().strip().encode(), (token, self.bait_folder), _VALIDATOR),
            Canary("operators' token", admin.read_text().strip().encode(), (admin, self.bait_folder)),
            Canary("master key", master.read_bytes(), (part.folder / "keyring",)),
            Canary("administrator's token of the Platform API", self.stack.admin_token.encode()),
            Canary("environment value of the arena", self._secrets["arena"].encode()),
            Canary("environment value of another challenge", self._secrets["vault"].encode()),
            Canary("dynamic value of another challenge", self._secrets["vault"][::-1].encode()),
        ]

    def _register(self, name: str) -> None:
        """`arena`, `rogue`, `vault`; `arena-NAME` is the arena with `widening/open_NAME.py` as its entry."""
        kind, _, opened = name.partition("-")
        repository = self.state / "repositories" / name
        commit = make_repository(HERE / kind, repository)
        toml = (repository / "platform.toml").read_text()
        if opened:
            source = HERE / "widening" / f"open_{opened}.py"
            (repository / source.name).write_text(source.read_text())
            toml = toml.replace(f'entry = "{kind}"', f'entry = "open_{opened}"').replace(
                "ready = 1", "ready = 0"
            )
        (repository / "platform.toml").write_text(toml.replace(f'name = "{kind}"', f'name = "{name}"'))
        if opened:
            commit = commit_all(repository, "with guards that can be widened")
        self.challenges[name] = self.stack.add_challenge(name, repository, commit, 30, memory_mb=512)

    def _give(self, name: str, variable: str, secret: str) -> None:
        challenge = self.challenges[name]
        self._until(
            f"{name} is listed",
            lambda: challenge in json.dumps((self.stack.status() or {}).get("challenges")),
            _READY_S,
        )
        path = self.state / "given"
        path.write_text(secret)
        done = self.stack.validator_command("env", "set", challenge, variable, "--file", str(path))
        path.unlink()
        if done.returncode:
            raise DemoFailed(f"validator env set: {done.stderr}")

    def _serve(self) -> bool:
        shown = (self.stack.status() or {}).get("challenges", [])
        states = {each["id"]: each["state"] for each in shown if "id" in each}
        broken = [each for each in shown if each["state"] == "Failed"]
        if broken:
            raise DemoFailed(f"a challenge failed: {broken}")
        return all(states.get(each) == "Active" for each in self.challenges.values())

    def _until(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise DemoFailed(f"not so that {what} after {seconds:.0f} s")
            time.sleep(_TICK)

    def widen(self, guard: str) -> None:
        """Widen one guard, and no other."""
        self._widen.write_text(guard)


def _program(name: str, module: str, *, open_guards: bool) -> list[str]:
    """The product's own command, or the same with guards that can be widened."""
    if open_guards:
        return [sys.executable, "-m", f"tests.hostile.widening.{module}"]
    return [str(Path(sys.executable).parent / name)]
