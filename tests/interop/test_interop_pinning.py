"""`validator attestation pin` from end to end: command, daemon, local VMM, sandbox, simulated quote, file.

There is no TDX here: what is pinned is what the local VMM simulates, and the file says so.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from examples.demo.ports import free_ports
from tests.daemon.process import Daemon
from waiting import wait_until

pytestmark = [
    pytest.mark.slow(reason="builds the runtime image, starts the daemon and a sandbox"),
    pytest.mark.needs("root", "bwrap"),
]


@contextmanager
def local_vmm(folder: Path, guest_port: int) -> Iterator[tuple[Path, Path]]:
    """A local VMM's socket and state, until the block ends."""
    path, state = folder / "vmm.sock", folder / "vmm"
    command = [str(Path(sys.executable).parent / "platform-vmm"), "serve", "--listen", f"unix:{path}"]
    with subprocess.Popen(
        [*command, "--state-dir", str(state), "--guest-port", str(guest_port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until("listening", path.exists, 50)
            yield path, state
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_an_image_is_pinned_while_the_daemon_runs(tmp_path: Path) -> None:
    """One CVM is booted and gone again; the file names the origin, and the same again adds an alternative."""
    daemon = Daemon.made(tmp_path)
    with local_vmm(tmp_path, daemon.ports[2]) as (path, state):
        config = tmp_path / "config.toml"
        first = free_ports(1)[0]
        config.write_text(
            '[sandbox_config]\nisolation_level = "Container"\n[attestation]\nallow_simulated = true\n'
            f'simulated_root_file = "{state / "simulated-root.pem"}"\n'
            f'[dstack]\nport_range = "{first}-{first + 20}"\n'
        )
        daemon.more |= {
            "DSTACK_VMM_URL": f"unix:{path}",
            "DSTACK_VMM_TOKEN": (state / "token").read_text().strip(),
            "VALIDATOR_CONFIG": str(config),
        }
        log = tmp_path / "log"
        with daemon.running(log) as process:
            wait_until("up", lambda: daemon.health().get("status") in ("running", "degraded"))
            asked = ["attestation", "pin", "--image", "local-sandbox", "--cpu", "1", "--memory", "256"]
            done = daemon.command(*asked, "--yes", "--json")
            assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
            found = json.loads(done.stdout)
            assert (found["state"], found["attestation"]) == ("measured", "simulated")
            images = tmp_path / "state" / "images.toml"
            assert found["written"] == str(images)
            [pinned] = tomllib.loads(images.read_text())["pinned"]
            assert (pinned["image"], pinned["cpu"], pinned["memory_mb"]) == ("local-sandbox", 1, 256)
            assert pinned["origin"].startswith("first use (simulated, measured ")
            # Asked without an answer, nothing is written; for people the values and their origin are shown.
            again = daemon.command(*asked)
            assert again.returncode == 1
            assert pinned["mrtd"] in again.stdout
            assert "trust on first use" in again.stdout
            assert len(tomllib.loads(images.read_text())["pinned"]) == 1
            wrong = daemon.command(*asked[:2], "--image", "nothing", *asked[4:], "--yes")
            assert wrong.returncode == 1
            assert "the VMM has no image 'nothing'" in wrong.stderr
            wait_until("gone", lambda: json.loads(daemon.command("cvms", "list", "--json").stdout) == [])
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    """Exit code 3: the daemon boots the CVM."""
    done = Daemon.made(tmp_path).command(
        "attestation", "pin", "--image", "local-sandbox", "--cpu", "1", "--memory", "256"
    )
    assert done.returncode == 3
    assert "no validator runs" in done.stderr
