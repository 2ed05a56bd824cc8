"""The daemon as a process: faults at once, degraded and back, locked state, a clean end, no secret logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from tests.daemon.process import BIN, Daemon
from waiting import wait_until

from platform_protocol.signing import Keypair

pytestmark = pytest.mark.timeout(240)  # daemons and commands: each a second, or ten on a busy machine


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon.made(tmp_path)


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
        wait_until("degraded", lambda: daemon.health().get("status") == "degraded")
        wait_until(
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
        wait_until("degraded", lambda: daemon.health().get("components", {}).get("platform_api") == "fails")
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
                wait_until("found", lambda: daemon.health().get("components", {}).get("platform_api") == "ok")
                wait_until("notified", lambda: daemon.health()["components"]["notifications"] == "ok", 40)
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
