"""Platform API, VMM and validator as separate processes, wired together on loopback and Unix sockets."""

from __future__ import annotations

import http.client
import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.ports import free_ports
from examples.demo.processes import DemoFailed, Processes
from examples.demo.unix_http import TIMEOUT, UnixConnection, answers
from examples.demo.validator import ValidatorPart, new_hotkey

_BIN = Path(sys.executable).parent
_DRAIN_S = 60.0


@dataclass(slots=True)
class Stack:
    """The running system. `validators`: the first is started with the rest, others when they are asked for.

    `api_environment`, `validator_environment`: settings that differ from the defaults.
    """

    state: Path
    processes: Processes
    api_port: int
    validators: list[ValidatorPart]
    api_environment: Mapping[str, str] = field(default_factory=dict)
    validator_environment: Mapping[str, str] = field(default_factory=dict)
    admin_token: str = field(default="", repr=False)

    @property
    def validator(self) -> ValidatorPart:
        """The validator."""
        return self.validators[0]

    @property
    def base(self) -> str:
        """The Platform API."""
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def database(self) -> Path:
        """The Platform API's database."""
        return self.state / "platform-api.db"

    @property
    def vmm_socket(self) -> Path:
        """The VMM's."""
        return self.state / "vmm.sock"

    def start(self) -> None:
        """Start all three and wait until each answers.

        Raises:
            DemoFailed: One of them did not come up.
        """
        self.start_api()
        self.start_vmm()
        self.start_validator()

    def restart_api(self) -> None:
        """Start the Platform API again and wait."""
        self.processes.restart("platform-api")
        self.processes.wait_for("platform-api", "answering", lambda: answers(f"{self.base}/health"))

    def restart_vmm(self) -> None:
        """Start the VMM again and wait."""
        self.processes.restart("vmm")
        self.processes.wait_for("vmm", "answering", self._vmm_answers, 60)

    def kill_validator(self) -> None:
        """End the validator as a crash would."""
        self.processes.kill("validator")

    def restart_validator(self) -> None:
        """Start it again and wait until it is ready."""
        self.processes.restart("validator")
        self.processes.wait_for("validator", "ready", self.validator.ready)

    def stop(self) -> dict[str, int]:
        """End all in order: validators drain, then the VMM ends its guests. Exit codes by name."""
        seconds = dict.fromkeys((each.name for each in self.validators), _DRAIN_S)
        seconds |= {"vmm": 15.0, "platform-api": 10.0}
        running = [name for name in seconds if name in self.processes.parts]
        return {name: self.processes.stop(name, seconds[name]) for name in running}

    def add_challenge(
        self, name: str, repository: Path, commit: str, timeout_s: int, *, memory_mb: int = 512
    ) -> str:
        """Register a challenge; returns its id."""
        made = self.admin(
            "POST",
            "/challenges",
            {
                "name": name,
                "github_repo": repository.as_uri(),
                "github_commit": commit,
                "timeout_s": timeout_s,
                "resources": {"cpu_cores": 1, "memory_mb": memory_mb, "disk_mb": 1024, "gpu_count": 0},
            },
        )
        return str(made["id"])

    def update_challenge(self, challenge_id: str, commit: str) -> None:
        """Publish another commit; the validator is told by a push."""
        self.admin("PATCH", f"/challenges/{challenge_id}", {"github_commit": commit})

    def add_job(self, challenge_id: str, payload: dict[str, Any], timeout_s: int) -> str:
        """Queue a job without a submission; returns its id."""
        body = {"challenge_id": challenge_id, "payload": payload, "timeout_s": timeout_s}
        return str(self.admin("POST", "/jobs", body)["id"])

    def jobs(self) -> list[dict[str, Any]]:
        """Every job, read from the Platform API's database."""
        return rows(
            self.database,
            "SELECT id, challenge_id, miner_hotkey, status, outcome, score, attempt, result FROM jobs",
        )

    def leaderboard(self, challenge_id: str) -> list[dict[str, Any]]:
        """A challenge's leaderboard, as the public sees it."""
        url = f"{self.base}/challenges/{challenge_id}/leaderboard"
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310 - our own loopback URL
            board: list[dict[str, Any]] = json.load(answer)["leaderboard"]
        return board

    def receipt(self, job_id: str) -> dict[str, Any] | None:
        """A job's receipt, as the public sees it; None where it has none."""
        try:
            with urllib.request.urlopen(f"{self.base}/jobs/{job_id}/receipt", timeout=TIMEOUT) as answer:  # noqa: S310 - our own loopback URL
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError:
            return None
        return found

    def vms(self) -> list[dict[str, Any]]:
        """Every VM, as the VMM sees it."""
        token = (self.state / "vmm" / "token").read_text().strip()
        connection = UnixConnection(self.vmm_socket)
        try:
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", "/prpc/Status?json", "{}", headers)
            vms: list[dict[str, Any]] = json.loads(connection.getresponse().read())["vms"]
        finally:
            connection.close()
        return vms

    def validator_command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A `validator` command beside the daemon, with its settings."""
        part = self.processes.parts["validator"]
        return subprocess.run(
            [str(_BIN / "validator"), *words],
            env={**os.environ, **part.environment},
            cwd=self.state,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def status(self) -> dict[str, Any] | None:
        """The validator's own view, for the live display; None while it does not answer."""
        return self.validator.status()

    def start_api(self) -> None:
        """Make its database, start it, register the validator.

        Raises:
            DemoFailed: It did not come up.
        """
        url = f"sqlite:///{self.database}"
        made = subprocess.run(
            [str(_BIN / "platform-api"), "admin", "init", "--json", "--database-url", url],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if made.returncode != 0:
            raise DemoFailed(f"platform-api admin init: {made.stderr.strip()}")
        self.admin_token = json.loads(made.stdout)["token"]
        command = [str(_BIN / "platform-api"), "serve", "--listen", f"127.0.0.1:{self.api_port}"]
        self.processes.start(
            "platform-api", [*command, "--public-url", self.base, "--database-url", url], self.api_environment
        )
        self.processes.wait_for("platform-api", "answering", lambda: answers(f"{self.base}/health"))
        for part in self.validators:
            self.admin("POST", "/validators", {"hotkey": part.keypair.address})

    def start_vmm(self) -> None:
        """Start it and wait.

        Raises:
            DemoFailed: It did not come up.
        """
        command = [str(_BIN / "platform-vmm"), "serve", "--listen", f"unix:{self.vmm_socket}"]
        command += ["--state-dir", str(self.state / "vmm")]
        for part in self.validators:
            command += ["--guest-port", str(part.guest_port), "--guest-port", str(part.egress_port)]
        self.processes.start("vmm", command, {})
        self.processes.wait_for("vmm", "answering", self._vmm_answers, 60)

    def start_validator(
        self, part: ValidatorPart | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start one (the stack's own unless another is given) and wait until it is ready.

        Raises:
            DemoFailed: It did not come up.
        """
        part = part or self.validator
        self.launch_validator(part, environment)
        self.processes.wait_for(part.name, "ready", part.ready)

    def launch_validator(self, part: ValidatorPart, environment: Mapping[str, str] | None = None) -> None:
        """Start one without waiting."""
        if not part.folder.exists():
            part.write()
        command = [str(_BIN / "validator"), "run", "--config", str(part.config)]
        settings = part.environment() | dict(self.validator_environment) | dict(environment or {})
        self.processes.start(part.name, command, settings)

    def admin(self, verb: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the Platform API as its administrator.

        Raises:
            OSError: It refused, or does not answer.
        """
        headers = {"Authorization": f"Bearer {self.admin_token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, json.dumps(body).encode(), headers, method=verb)  # noqa: S310 - our own loopback URL
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310 - as above
            made: dict[str, Any] = json.load(answer)
        return made

    def _vmm_answers(self) -> bool:
        try:
            self.vms()
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return False
        return True


def make_stack(state: Path, names: tuple[str, ...] = ("validator",), *, level: str = "Container") -> Stack:
    """A stack on free ports, with a validator and a hotkey made for each name; their isolation level."""
    api_port, *ports = free_ports(1 + 3 * len(names))
    parts = [
        ValidatorPart(
            name=name,
            folder=state / name,
            keypair=new_hotkey(state / f"{name}.hotkey"),
            guest_port=ports[3 * index],
            admin_port=ports[3 * index + 1],
            egress_port=ports[3 * index + 2],
            api=f"http://127.0.0.1:{api_port}",
            vmm=state / "vmm",
            port_range=f"{10_000 + 2_500 * index}-{12_499 + 2_500 * index}",
            level=level,
        )
        for index, name in enumerate(names)
    ]
    return Stack(state, Processes(state), api_port, parts)


def rows(database: Path, query: str) -> list[dict[str, Any]]:
    """What a query finds in somebody's SQLite database, which it does not touch."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=TIMEOUT)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()
