"""Platform API, VMM and validator as separate processes, wired together on loopback and Unix sockets."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.processes import DemoFailed, Processes

from platform_protocol.signing import Keypair

_BIN = Path(sys.executable).parent
_TIMEOUT = 10


@dataclass(slots=True)
class Stack:
    """The running system. `base` is the Platform API's URL."""

    state: Path
    processes: Processes
    api_port: int
    guest_port: int
    admin_port: int
    keypair: Keypair
    validator_environment: dict[str, str] = field(default_factory=dict)
    admin_token: str = field(default="", repr=False)

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
        self._start_api()
        self._start_vmm()
        self._start_validator()

    def kill_api(self) -> None:
        """End the Platform API as a crash would."""
        self.processes.kill("platform-api")

    def restart_api(self) -> None:
        """Start it again and wait."""
        self.processes.restart("platform-api")
        self.processes.wait_for("platform-api", "answering", lambda: self._answers(f"{self.base}/health"))

    def kill_validator(self) -> None:
        """End the validator as a crash would."""
        self.processes.kill("validator")

    def restart_validator(self) -> None:
        """Start it again and wait until it is ready."""
        self.processes.restart("validator")
        self._wait_for_validator()

    def stop(self) -> dict[str, int]:
        """End all three in order: the validator drains, then the VMM ends its guests. Exit codes by name."""
        seconds = {"validator": 60.0, "vmm": 15.0, "platform-api": 10.0}
        running = [name for name in seconds if name in self.processes.parts]
        return {name: self.processes.stop(name, seconds[name]) for name in running}

    def add_challenge(
        self, name: str, repository: Path, commit: str, timeout_s: int, *, memory_mb: int = 512
    ) -> str:
        """Register a challenge; returns its id."""
        made = self._admin(
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

    def add_job(self, challenge_id: str, payload: dict[str, Any], timeout_s: int) -> str:
        """Queue a job without a submission; returns its id."""
        body = {"challenge_id": challenge_id, "payload": payload, "timeout_s": timeout_s}
        return str(self._admin("POST", "/jobs", body)["id"])

    def jobs(self) -> list[dict[str, Any]]:
        """Every job, read from the Platform API's database."""
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=_TIMEOUT)
        connection.row_factory = sqlite3.Row
        try:
            query = "SELECT id, challenge_id, miner_hotkey, status, outcome, score, attempt, result FROM jobs"
            return [dict(row) for row in connection.execute(query)]
        finally:
            connection.close()

    def leaderboard(self, challenge_id: str) -> list[dict[str, Any]]:
        """A challenge's leaderboard, as the public sees it."""
        url = f"{self.base}/challenges/{challenge_id}/leaderboard"
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310 - our own loopback URL
            board: list[dict[str, Any]] = json.load(answer)["leaderboard"]
        return board

    def vms(self) -> list[dict[str, Any]]:
        """Every VM, as the VMM sees it."""
        token = (self.state / "vmm" / "token").read_text().strip()
        connection = _UnixConnection(self.vmm_socket)
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
        connection = _UnixConnection(self.state / "validator" / "validator.sock")
        try:
            connection.request("GET", "/api/v1/status")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return found

    def _start_api(self) -> None:
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
        self.processes.start("platform-api", [*command, "--public-url", self.base, "--database-url", url], {})
        self.processes.wait_for("platform-api", "answering", lambda: self._answers(f"{self.base}/health"))
        self._admin("POST", "/validators", {"hotkey": self.keypair.address})

    def _start_vmm(self) -> None:
        command = [str(_BIN / "platform-vmm"), "serve", "--listen", f"unix:{self.vmm_socket}"]
        command += ["--state-dir", str(self.state / "vmm"), "--guest-port", str(self.guest_port)]
        self.processes.start("vmm", command, {})
        self.processes.wait_for("vmm", "answering", self._vmm_answers, 60)

    def _start_validator(self) -> None:
        folder = self.state / "validator"
        folder.mkdir(mode=0o700)
        config = folder / "config.toml"
        config.write_text(
            "\n".join(
                [
                    "[attestation]",
                    "allow_simulated = true",
                    f'simulated_root_file = "{self.state / "vmm" / "simulated-root.pem"}"',
                    "[sandbox_config]",
                    'isolation_level = "Container"',
                    "[sources]",
                    'allow = ["https", "file"]',
                    "",
                ]
            )
        )
        environment = {
            "VALIDATOR_HOTKEY": self.keypair.address,
            "VALIDATOR_HOTKEY_FILE": str(self.state / "hotkey"),
            "PLATFORM_BASE_API": self.base,
            "DSTACK_VMM_URL": f"unix:{self.vmm_socket}",
            "DSTACK_VMM_TOKEN": (self.state / "vmm" / "token").read_text().strip(),
            "VALIDATOR_DB_PATH": str(folder / "validator.db"),
            "VALIDATOR_HTTP_LISTEN": f"127.0.0.1:{self.guest_port}",
            "VALIDATOR_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "VALIDATOR_BASE_URL": f"http://10.0.2.2:{self.guest_port}",
            **self.validator_environment,
        }
        self.processes.start(
            "validator", [str(_BIN / "validator"), "run", "--config", str(config)], environment
        )
        self._wait_for_validator()

    def _wait_for_validator(self) -> None:
        ready = f"http://127.0.0.1:{self.guest_port}/health"
        self.processes.wait_for("validator", "ready", lambda: self._answers(ready))

    def _admin(self, verb: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.admin_token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, json.dumps(body).encode(), headers, method=verb)  # noqa: S310 - our own loopback URL
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310 - as above
            made: dict[str, Any] = json.load(answer)
        return made

    def _vmm_answers(self) -> bool:
        try:
            self.vms()
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return False
        return True

    @staticmethod
    def _answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own loopback URL
                return bool(answer.status == http.client.OK)
        except (OSError, http.client.HTTPException):
            return False


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(str(self._path))


def make_stack(state: Path) -> Stack:
    """A stack on free ports, with a hotkey made for it."""
    seed = secrets.token_bytes(32)
    descriptor = os.open(state / "hotkey", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"0x{seed.hex()}")
    ports = _free_ports(3)
    return Stack(state, Processes(state), ports[0], ports[1], ports[2], Keypair.from_seed(seed))


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
