"""What systemd is told, over real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from platform_validator.daemon.systemd import Systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and its NOTIFY_SOCKET."""
    name = f"{tmp_path}/notify" if request.param == "path" else f"@{tmp_path.name}-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1) if name[0] == "@" else name)
        listener.settimeout(5)
        yield listener, name


def test_each_message_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    with closing(Systemd(name)) as systemd:
        systemd.ready()
        systemd.status("running:\n2 jobs")
        systemd.feed()
        systemd.reloading()
        systemd.stopping(timedelta(minutes=2))
    told = [listener.recv(4096).decode() for _ in range(5)]
    assert told[:3] == ["READY=1", "STATUS=running: 2 jobs", "WATCHDOG=1"]
    word, _, usec = told[3].partition("\nMONOTONIC_USEC=")
    assert word == "RELOADING=1"
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert told[4] == "STOPPING=1\nEXTEND_TIMEOUT_USEC=120000000"


@pytest.mark.parametrize(
    ("environment", "watchdog"),
    [
        ({"WATCHDOG_USEC": "30000000"}, timedelta(seconds=30)),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, timedelta(seconds=30)),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_when_it_names_us(
    environment: dict[str, str], watchdog: timedelta | None
) -> None:
    with closing(Systemd.from_environment({"NOTIFY_SOCKET": "/x", **environment}, pid=7)) as systemd:
        assert systemd.watchdog == watchdog


def test_without_systemd_it_is_silent() -> None:
    with closing(Systemd.from_environment({"WATCHDOG_USEC": "30000000"}, pid=7)) as systemd:
        assert systemd.watchdog is None
        systemd.ready()
        systemd.feed()


@pytest.mark.parametrize("address", ["vsock:2:1234", "relative"])
def test_a_socket_of_another_kind_is_left_alone(address: str) -> None:
    with closing(Systemd(address, timedelta(seconds=1))) as systemd:
        systemd.ready()
        assert systemd.watchdog is None


def test_a_manager_that_is_gone_or_slow_holds_nothing_up(tmp_path: Path) -> None:
    """No error, no waiting; it is told again when it is back."""
    path = tmp_path / "notify"
    with closing(Systemd(str(path))) as systemd:
        systemd.ready()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(path))
            for _ in range(10_000):
                systemd.feed()
            listener.settimeout(5)
            assert listener.recv(4096) == b"WATCHDOG=1"
