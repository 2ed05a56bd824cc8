"""A challenge in the sandbox reaches an allowed host through the egress proxy, and nothing else.

Platform API, VMM, validator and proxy are processes of their own; name server and hosts are the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from egress_world import LAUNCHER, PUBLIC, NameServer, make_tls
from examples.demo.processes import end_all
from examples.demo.repositories import make_repository
from examples.demo.stack import Stack, make_stack

HERE = Path(__file__).parent
ALLOWED, REFUSED = "api.test.example", "other.example"
METADATA = "http://169.254.169.254/latest/meta-data/"


class Hello(http.server.BaseHTTPRequestHandler):
    """Says who was asked for."""

    def do_GET(self) -> None:
        body = f"hello from {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[dict[str, int]]:
    """A TLS and a plain HTTP server, as what the proxy's public addresses lead to."""
    secure = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    plain = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    context, _ = make_tls(folder)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    servers = {f"{PUBLIC}:443": secure, f"{PUBLIC}:80": plain}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {place: server.server_address[1] for place, server in servers.items()}
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def names() -> Iterator[tuple[NameServer, int]]:
    """A name server on a loop of its own."""
    loop = asyncio.new_event_loop()
    made = NameServer({ALLOWED: [[PUBLIC]], REFUSED: [[PUBLIC]]})
    transport, _ = loop.run_until_complete(
        loop.create_datagram_endpoint(lambda: made, local_addr=("127.0.0.1", 0))
    )
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield made, transport.get_extra_info("sockname")[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        transport.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def start(stack: Stack, port: int, leads: dict[str, int]) -> None:
    """The system, with a policy that lets one of the two hosts out."""
    part = stack.validator
    part.write()
    with part.config.open("a") as config:
        config.write(
            "[sandbox_config.network_policy]\nallow_outbound = true\n"
            f'allowed_hosts = ["{ALLOWED}"]\ndns_servers = ["127.0.0.1:{port}"]\n'
        )
    stack.start_api()
    stack.start_vmm()
    command = [sys.executable, str(HERE / "launcher.py"), str(LAUNCHER), json.dumps(leads)]
    command += [str(stack.state / "tried"), "run", "--config", str(part.config)]
    stack.processes.start(part.name, command, part.environment() | {"PYTHONPATH": str(LAUNCHER.parent)})
    stack.processes.wait_for(part.name, "ready", part.ready)


def counted(stack: Stack) -> tuple[float, float, float]:
    """Connections, refused hosts and refused addresses, as /metrics has them."""
    page = f"http://127.0.0.1:{stack.validator.guest_port}/metrics"
    with urllib.request.urlopen(page, timeout=30) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
    reasons = ("host_not_allowed", "raw_address")
    refused = [f'platform_validator_egress_refused_total{{reason="{reason}"}}' for reason in reasons]
    total, hosts, addresses = ("platform_validator_egress_connections_total", *refused)
    return float(lines[total]), float(lines.get(hosts, 0)), float(lines.get(addresses, 0))


def ended(stack: Stack) -> dict[str, Any]:
    """What the challenge told of its tries."""

    def done() -> bool:
        return bool(stack.jobs()) and stack.jobs()[0]["outcome"] is not None

    stack.processes.wait_for("validator", "done with the job", done, 200)
    [job] = stack.jobs()
    assert job["outcome"] == "succeeded", job
    [line] = [line for line in json.loads(job["result"])["logs"] if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.slow(reason="starts the whole system and a CVM")
@pytest.mark.timeout(400)
@pytest.mark.robustness(23, "metadata", "vmm-api", "dns-tunnel")
def test_a_challenge_reaches_what_both_sides_allow_and_nothing_else(tmp_path: Path) -> None:
    """Through the proxy by name; not directly, not by address, not what only the challenge asks for."""
    tmp_path.chmod(0o711)
    state = tmp_path / "state"
    state.mkdir(mode=0o711)
    with hosts(tmp_path) as leads, names() as (nameserver, port):
        stack = make_stack(state)
        try:
            start(stack, port, leads)
            own = leads[f"{PUBLIC}:80"]
            ours = [f"10.0.2.2:{one}" for one in (stack.api_port, own, stack.validator.admin_port)]
            payload = {
                "fetch": [
                    f"{scheme}://{name}/" for scheme in ("https", "http") for name in (ALLOWED, REFUSED)
                ],
                "connect": [f"{PUBLIC}:443", "169.254.169.254:80", "1.1.1.1:53", "[::1]:80", *ours],
                "resolve": [ALLOWED, REFUSED],
            }
            payload["fetch"] += [METADATA, f"http://127.0.0.1.nip.example:{own}/"]
            repository = state / "repositories" / "outside"
            commit = make_repository(HERE / "challenge", repository)
            challenge = stack.add_challenge("outside", repository, commit, 120)
            stack.add_job(challenge, payload, 120)
            found = ended(stack)
            stack.processes.wait_for(
                "validator", "told of the proxy's counts", lambda: sum(counted(stack)) == 10
            )
            shown = json.loads(stack.validator_command("challenges", "show", challenge, "--json").stdout)
            status, total = stack.status(), counted(stack)
        finally:
            stack.stop()
            end_all(state)
    assert found["proxy"]
    assert found["fetched"][f"https://{ALLOWED}/"] == f"hello from {ALLOWED}"
    assert found["fetched"][f"http://{ALLOWED}/"] == f"hello from {ALLOWED}"
    assert "403" in found["fetched"][f"https://{REFUSED}/"]
    assert found["fetched"][f"http://{REFUSED}/"] == "403 host_not_allowed"
    assert found["fetched"][METADATA] == "403 raw_address"
    assert found["fetched"][f"http://127.0.0.1.nip.example:{own}/"] == "403 host_not_allowed"
    assert not any(found["connected"].values()), found["connected"]
    assert not any(found["resolved"].values())
    assert set(nameserver.asked) == {ALLOWED}
    assert set((state / "tried").read_text().split()) == {f"{PUBLIC}:443", f"{PUBLIC}:80"}
    assert shown["effective"]["network"]["hosts"] == [ALLOWED]
    assert shown["effective"]["network"]["refused_hosts"] == [REFUSED]
    assert status is not None
    assert status["egress"]["error"] is None
    assert total == (6, 3, 1)
