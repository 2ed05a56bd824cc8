"""Each exit code of the daemon, from `run()` itself; 0 and 5 need processes and are beside this file."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from tests.daemon.process import Daemon
from waiting import wait_until

from platform_protocol.signing import Keypair
from platform_validator.config import Settings, load_settings
from platform_validator.daemon.run import Exit, run
from platform_validator.state import StateDirectory
from platform_validator.telemetry.logging import Directives, configure_logging


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the daemon writes."""
    before, out = structlog.get_config(), io.StringIO()
    configure_logging(Directives("info"), "json", out)
    yield out
    structlog.configure(**before)


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon.made(tmp_path)


def settings_of(daemon: Daemon, **more: object) -> Settings:
    return load_settings(daemon.environment, flags=more, folder=daemon.folder)


def ends(daemon: Daemon, log: io.StringIO, **more: object) -> tuple[int, str]:
    """The exit code, and the last reason in the log."""
    code = run(settings_of(daemon, **more), Keypair.from_seed(daemon.seed))
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return code, str(lines[-1].get("reason") or lines[-1].get("exception"))


def test_the_codes_are_these() -> None:
    """They are documented, and written into the service's unit."""
    assert {code.name: int(code) for code in Exit} == {
        "DRAINED": 0,
        "CONFIGURATION": 2,
        "STATE_LOCKED": 3,
        "STATE_UNUSABLE": 4,
        "HOTKEY_IN_USE": 5,
        "INTERNAL": 70,
    }


def test_drained_is_0(daemon: Daemon, log: io.StringIO) -> None:
    """SIGTERM as soon as the daemon listens to it, in the middle of its start."""

    def stop() -> None:
        wait_until("up", lambda: daemon.health() != {})
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert run(settings_of(daemon), Keypair.from_seed(daemon.seed)) == Exit.DRAINED
    stopping.join(10)


@pytest.mark.parametrize("setting", ["validator.http_listen", "validator.admin_listen"])
def test_an_address_that_is_taken_is_2(daemon: Daemon, log: io.StringIO, setting: str) -> None:
    """Nothing is left behind: the state directory is free for the next try."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, reason = ends(daemon, log, **{setting: address})
    assert code == Exit.CONFIGURATION
    assert f"{address} cannot be bound" in reason
    again = StateDirectory(settings_of(daemon).db_path)
    again.lock()
    again.close()


def test_a_crashpoint_that_is_none_is_2(
    daemon: Daemon, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATFORM_VALIDATOR_CRASHPOINT", "nowhere")
    code, reason = ends(daemon, log)
    assert code == Exit.CONFIGURATION
    assert "nowhere" in reason


@pytest.mark.robustness(7, "second-daemon")
def test_a_state_directory_in_use_is_3(daemon: Daemon, log: io.StringIO) -> None:
    """Robustness 7: a second daemon on the same state directory."""
    holder = StateDirectory(settings_of(daemon).db_path)
    holder.lock()
    code, reason = ends(daemon, log)
    holder.close()
    assert code == Exit.STATE_LOCKED
    assert "another validator uses" in reason


@pytest.mark.parametrize(
    ("file", "content"), [("validator.db", b"no database" * 1000), ("keyring/master.key", b"short")]
)
@pytest.mark.robustness(7, "corrupt")
def test_a_damaged_state_is_4(daemon: Daemon, log: io.StringIO, file: str, content: bytes) -> None:
    """Robustness 7: also when it is found in the middle of the start."""
    path = daemon.folder / "state" / file
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(content)
    code, reason = ends(daemon, log)
    assert code == Exit.STATE_UNUSABLE
    assert str(path.parent) in reason or "database" in reason


def test_a_root_file_that_is_not_there_is_4(daemon: Daemon, log: io.StringIO) -> None:
    code, reason = ends(
        daemon,
        log,
        **{
            "sandbox_config.isolation_level": "Container",
            "attestation.allow_simulated": True,
            "attestation.simulated_root_file": "/nowhere/root.pem",
        },
    )
    assert code == Exit.STATE_UNUSABLE
    assert "/nowhere/root.pem" in reason


def test_a_fault_of_ours_is_70(daemon: Daemon, log: io.StringIO) -> None:
    """With its traceback in the log, and the state directory free again."""
    unmade = Keypair.__new__(Keypair)
    assert run(settings_of(daemon), unmade) == Exit.INTERNAL
    assert "AttributeError" in log.getvalue()
    again = StateDirectory(settings_of(daemon).db_path)
    again.lock()
    again.close()
