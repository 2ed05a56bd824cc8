"""Robustness 8: the daemon as a process that runs out of file descriptors."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import psutil
import pytest
from tests.daemon.process import Daemon
from waiting import wait_until


@pytest.mark.robustness(8, "emfile")
@pytest.mark.slow(reason="starts the daemon and takes its file descriptors away")
def test_without_descriptors_the_daemon_lives_and_comes_back(tmp_path: Path) -> None:
    """Robustness 8: EMFILE at every accept, connect and open: nothing ends, and it comes back."""
    daemon = Daemon.made(tmp_path)
    with daemon.running(tmp_path / "log") as process:
        wait_until("degraded", lambda: daemon.health().get("status") == "degraded")
        watched = psutil.Process(process.pid)
        _, most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (watched.num_fds() + 3, most))
        held = []
        try:
            for _ in range(40):
                taken = socket.create_connection(("127.0.0.1", daemon.ports[2]), timeout=5)
                taken.sendall(b"GET /health HTTP/1.1\r\n")
                held.append(taken)
            wait_until("out of descriptors", lambda: "Too many open files" in (tmp_path / "log").read_text())
            assert process.poll() is None
        finally:
            for taken in held:
                taken.close()
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, most))
        wait_until("answering again", lambda: daemon.health().get("status") == "degraded")
        busy = watched.cpu_times().user
        assert process.poll() is None
        assert daemon.command("status", "--json").returncode == 0
        process.terminate()
        assert process.wait(30) == 0
        assert busy < 60
