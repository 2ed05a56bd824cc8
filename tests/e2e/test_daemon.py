"""The daemon as a process: faults at once, degraded and back, locked state, a clean end, no secret logged."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from platform_protocol.signing import Keypair

BIN = Path(sys.executable).parent


@dataclass
class Daemon:
    """A validator's settings, and the processes started with them."""

    folder: Path
    seed: bytes
    ports: list[int]

    @property
    def environment(self) -> dict[str, str]:
        """Everything that it needs, and nothing that answers."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "VALIDATOR_HOTKEY": Keypair.from_seed(self.seed).address,
            "HOTKEY_PASSPHRASE": f"0x{self.seed.hex()}",
            "PLATFORM_BASE_API": f"http://127.0.0.1:{self.ports[0]}",
            "DSTACK_VMM_URL": f"http://127.0.0.1:{self.ports[1]}",
            "DSTACK_VMM_TOKEN": "made-up-vmm-token-0123456789",
            "VALIDATOR_DB_PATH": str(self.folder / "state" / "validator.db"),
            "VALIDATOR_HTTP_LISTEN": f"127.0.0.1:{self.ports[2]}",
            "VALIDATOR_ADMIN_LISTEN": f"127.0.0.1:{self.ports[3]}",
            "VALIDATOR_BASE_URL": f"http://10.0.2.2:{self.ports[2]}",
            "RUST_LOG": "debug",
        }

    @contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The daemon, ended with SIGKILL if the test did not end it."""
        with (
            log.open("wb") as out,
            subprocess.Popen(
                [str(BIN / "validator")], env=self.environment, stdout=out, stderr=out, cwd=self.folder
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def health(self) -> dict[str, Any]:
        """`/health`, or an empty dict."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[2]}/health", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            found = json.load(error)
        except (OSError, http.client.HTTPException):
            return {}
        return found

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A validator command with the same settings."""
        return subprocess.run(
            [str(BIN / "validator"), *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    (tmp_path / "state").mkdir(mode=0o700)
    return Daemon(tmp_path, secrets.token_bytes(32), ports)


def _until(what: str, holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not {what} within {seconds} s"
        time.sleep(0.05)


def test_all_wrong_settings_are_told_at_once_with_exit_code_2(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[resource_limits]\ncpu_coers = 4\nmemory_mb = "much"\n[validator]\nhttp_listen = "nowhere"\n'
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VALIDATOR_HOTKEY": "5abc"}
    done = subprocess.run(
        [str(BIN / "validator"), "--config", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    named = (
        "validator.hotkey",
        "validator.http_listen",
        "platform.base_api",
        "resource_limits.memory_mb",
        "cpu_coers",
    )
    assert all(any(name in line for line in lines) for name in named), done.stderr
    assert "did you mean resource_limits.cpu_cores?" in done.stderr
    assert len(lines) == len(named)


@pytest.mark.slow(reason="starts the daemon and watches it degrade and drain")
def test_unreachable_platform_and_vmm_leave_the_daemon_up_and_degraded_with_reasons(daemon: Daemon) -> None:
    log = daemon.folder / "log"
    with daemon.running(log) as process:
        _until("degraded", lambda: daemon.health().get("status") == "degraded")
        _until(
            "both failing",
            lambda: [daemon.health()["components"][n] for n in ("platform_api", "vmm")] == ["fails"] * 2,
        )
        status = json.loads(daemon.command("status", "--json").stdout)
        assert "Connect" in status["reasons"]["vmm"]
        assert status["reasons"]["platform_api"]
        locked = daemon.command("run")
        assert locked.returncode == 3
        assert "another validator uses" in locked.stderr + locked.stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    text = log.read_text()
    steps = [f"step_{number}_" for number in (1, 2, 3, 4, 5)]
    assert [text.index(step) for step in steps] == sorted(text.index(step) for step in steps)
    for secret in (daemon.seed.hex(), "made-up-vmm-token-0123456789"):
        assert secret not in text


@pytest.mark.slow(reason="starts a Platform API beside a daemon that waits for it")
def test_a_platform_api_that_appears_is_found_without_a_restart(daemon: Daemon, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'api.db'}"
    hotkey = Keypair.from_seed(daemon.seed).address
    registered = subprocess.run(
        [str(BIN / "platform-api"), "admin", "validators", "add", hotkey, "--database-url", url],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert registered.returncode == 0, registered.stderr
    with daemon.running(daemon.folder / "log"):
        _until("degraded", lambda: daemon.health().get("components", {}).get("platform_api") == "fails")
        command = [str(BIN / "platform-api"), "serve", "--database-url", url]
        listen = [
            "--listen",
            f"127.0.0.1:{daemon.ports[0]}",
            "--public-url",
            f"http://127.0.0.1:{daemon.ports[0]}",
        ]
        with subprocess.Popen(
            [*command, *listen], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as api:
            try:
                _until("found", lambda: daemon.health().get("components", {}).get("platform_api") == "ok")
                _until("notified", lambda: daemon.health()["components"]["notifications"] == "ok", 40)
            finally:
                api.terminate()


def test_check_names_what_fails_and_exits_1(daemon: Daemon) -> None:
    done = daemon.command("check", "--json")
    found = {one["check"]: one["result"] for one in json.loads(done.stdout)}
    assert done.returncode == 1
    assert (found["configuration"], found["key"], found["platform api"], found["vmm"]) == (
        "ok",
        "ok",
        "fail",
        "fail",
    )


def test_commands_without_a_daemon_read_the_journal(daemon: Daemon) -> None:
    assert json.loads(daemon.command("status", "--json").stdout)["status"] == "stopped"
    for what in ("jobs", "cvms", "challenges"):
        assert json.loads(daemon.command(what, "list", "--json").stdout) == []


def test_config_show_tells_origins_and_hides_secrets(daemon: Daemon) -> None:
    done = daemon.command("config", "show", "--json")
    rows = {row["setting"]: row for row in json.loads(done.stdout)}
    assert rows["validator.db_path"]["from"] == "environment VALIDATOR_DB_PATH"
    assert rows["jobs.max_concurrent"]["from"] == "default"
    assert "made-up-vmm-token" not in done.stdout
    assert daemon.seed.hex() not in done.stdout
