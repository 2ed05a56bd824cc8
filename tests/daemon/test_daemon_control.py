"""Control of a running daemon: by its commands, by signals, and by the service manager."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.daemon.process import BIN, Daemon
from waiting import wait_until

from platform_protocol.signing import Keypair
from platform_validator.daemon.run import Exit
from platform_validator.state import StateDirectory

pytestmark = pytest.mark.timeout(240)  # daemons and commands: each a second, or ten on a busy machine


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self.told: list[str] = []

    def heard(self, word: str) -> int:
        """How often a line was told until now."""
        while True:
            try:
                self.told += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.told.count(word)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon.made(tmp_path)


def up(daemon: Daemon) -> None:
    """It runs, whether or not anything answers."""
    wait_until("up", lambda: daemon.health().get("status") in ("ok", "degraded"))


@pytest.mark.slow(reason="starts the daemon")
def test_the_service_manager_hears_of_start_reload_and_end_whatever_the_network_does(
    daemon: Daemon, manager: Manager
) -> None:
    """Ready once recovered and listening, though neither Platform API nor VMM answers; fed meanwhile."""
    daemon.more = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "1000000"}
    with daemon.running(daemon.folder / "log") as process:
        wait_until("ready", lambda: manager.heard("READY=1") == 1)
        assert daemon.health()["status"] == "degraded"
        wait_until("fed", lambda: manager.heard("WATCHDOG=1") >= 3)
        why = "STATUS=degraded, 0 jobs: notifications, platform_api, vmm failing"
        wait_until("told why", lambda: manager.heard(why) > 0)
        process.send_signal(signal.SIGHUP)
        wait_until("reloaded", lambda: manager.heard("READY=1") == 2)
        assert manager.told.index("RELOADING=1") < len(manager.told) - manager.told[::-1].index("READY=1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == Exit.DRAINED
    assert manager.heard("STOPPING=1") == 1


@pytest.mark.slow(reason="starts the daemon")
def test_a_reload_applies_what_can_be_and_nothing_of_a_wrong_file(daemon: Daemon) -> None:
    """By the command and by SIGHUP; the answer names each setting."""
    config = daemon.folder / "config.toml"
    config.write_text("[jobs]\nmax_concurrent = 3\n")

    def slots() -> int:
        found: int = json.loads(daemon.command("status", "--json").stdout)["slots"]["total"]
        return found

    with daemon.running(daemon.folder / "log") as process:
        up(daemon)
        assert slots() == 3
        config.write_text("[jobs]\nmax_concurrent = 2\n[dstack]\nport_range = '20000-20010'\n")
        done = daemon.command("reload", "--json")
        assert done.returncode == 0
        answer = json.loads(done.stdout)
        assert answer["applied"] == [{"setting": "jobs.max_concurrent", "old": 3, "new": 2}]
        assert [(each["setting"], bool(each["reason"])) for each in answer["restart"]] == [
            ("dstack.port_range", True)
        ]
        assert slots() == 2
        config.write_text("[jobs]\nmax_concurrent = 1\n[resource_limits]\nmax_cvms = 5\n")
        process.send_signal(signal.SIGHUP)
        wait_until("reloaded", lambda: slots() == 1)
        assert json.loads(daemon.command("status", "--json").stdout)["quota"]["cvms"]["limit"] == 5
        config.write_text("[jobs]\nmax_concurrent = 4\nmax_concurent = 4\n")
        process.send_signal(signal.SIGHUP)
        wait_until("refused", lambda: "reload_refused" in (daemon.folder / "log").read_text())
        config.write_text("")
        refused = subprocess.run(
            [str(BIN / "validator"), "reload"],
            env=daemon.environment | {"VALIDATOR_MAX_CONCURRENT_JOBS": "none"},
            cwd=daemon.folder,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert refused.returncode == 2
        assert slots() == 1
        process.terminate()
        assert process.wait(30) == Exit.DRAINED


@pytest.mark.slow(reason="starts the daemon")
def test_a_drain_that_is_waited_for_ends_with_what_was_left(daemon: Daemon) -> None:
    """`drain --wait` returns when the daemon has ended, with exit code 0 and nothing left."""
    with daemon.running(daemon.folder / "log") as process:
        up(daemon)
        cancelled = daemon.command("jobs", "cancel", "00000000-0000-4000-8000-00000000000b", "--json")
        assert (cancelled.returncode, json.loads(cancelled.stdout)["code"]) == (1, "unknown_job")
        done = daemon.command("drain", "--wait", "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["phase"], answer["undelivered"], answer["cvms_left"]) == ("ended", 0, 0)
        assert process.wait(5) == Exit.DRAINED
    assert daemon.command("drain").returncode == 3


@pytest.mark.parametrize("words", [("drain",), ("drain", "--wait"), ("reload",), ("jobs", "cancel", "x")])
def test_commands_say_that_no_daemon_runs(daemon: Daemon, words: tuple[str, ...]) -> None:
    done = daemon.command(*words, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["code"] == "no_daemon"
    assert f"no validator runs on {daemon.folder}/state" in done.stderr


def test_commands_say_that_a_daemon_does_not_answer(daemon: Daemon) -> None:
    """It holds the lock, and there is no socket."""
    holder = StateDirectory(daemon.folder / "state" / "validator.db")
    holder.prepare()
    holder.lock()
    done = daemon.command("drain")
    holder.close()
    assert done.returncode == 3
    assert "does not answer" in done.stderr


@contextmanager
def platform_api(daemon: Daemon, folder: Path) -> Iterator[str]:
    """A real Platform API that knows the daemon's hotkey; gives its URL."""
    database = f"sqlite:///{folder / 'api.db'}"
    url = f"http://127.0.0.1:{daemon.ports[0]}"
    hotkey = Keypair.from_seed(daemon.seed).address
    api = str(BIN / "platform-api")
    subprocess.run(
        [api, "admin", "validators", "add", hotkey, "--database-url", database],
        capture_output=True,
        timeout=50,
        check=True,
    )
    with subprocess.Popen(
        [api, "serve", "--database-url", database, "--listen", url[7:], "--public-url", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as serving:
        try:
            yield url
        finally:
            serving.terminate()
            serving.wait(20)


@pytest.mark.slow(reason="starts two daemons and a Platform API")
@pytest.mark.robustness(9, "one-hotkey")
def test_a_hotkey_that_another_instance_uses_ends_the_older_with_exit_code_5(tmp_path: Path) -> None:
    """Robustness 9: WebSocket close 4409: the older one finishes what it holds; the newer one goes on."""
    older = Daemon.made(tmp_path / "older")
    newer = Daemon.made(tmp_path / "newer", older.seed)
    newer.ports[0] = older.ports[0]

    def notified(daemon: Daemon) -> bool:
        return bool(daemon.health().get("components", {}).get("notifications") == "ok")

    with platform_api(older, tmp_path), older.running(tmp_path / "older.log") as first:
        wait_until("notified", lambda: notified(older))
        with newer.running(tmp_path / "newer.log") as second:
            wait_until(
                "ended by the newer one, which runs",
                lambda: first.poll() is not None or second.poll() is not None,
                within=50,
            )
            assert second.poll() is None, (tmp_path / "newer.log").read_text()[-2000:]
            assert first.poll() == Exit.HOTKEY_IN_USE
            assert "hotkey_in_use" in (tmp_path / "older.log").read_text()
            wait_until("notified", lambda: notified(newer))
            second.terminate()
            assert second.wait(30) == Exit.DRAINED


@pytest.mark.slow(reason="kills the daemon and starts it again")
def test_commands_that_read_the_journal_do_not_keep_a_daemon_from_starting(daemon: Daemon) -> None:
    """The lock that a command has for a moment is waited for."""
    with daemon.running(daemon.folder / "first.log") as process:
        up(daemon)
        process.kill()
        process.wait(10)
    holder = StateDirectory(daemon.folder / "state" / "validator.db")
    holder.lock()
    with daemon.running(daemon.folder / "second.log") as process:
        holder.close()
        up(daemon)
        process.terminate()
        assert process.wait(30) == Exit.DRAINED
