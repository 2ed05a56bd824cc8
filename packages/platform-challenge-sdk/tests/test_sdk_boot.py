"""`platform-boot`, as the process that it is; and what decides when it ends."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from platform_challenge_sdk.bundle_fetch import fetch_bundle
from platform_challenge_sdk.errors import BootFailed
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.lifetime import Lifetime
from platform_challenge_sdk.testing_validator import TestingValidator
from platform_protocol.bundle import TreeEntry, pack
from platform_protocol.session.messages import JobResult
from platform_protocol.tokens import check_bundle_authorization
from platform_protocol.user_config import UserConfig

TOML = b'name = "c"\nversion = "1"\n'
CHALLENGE = b"""
from platform_challenge_sdk import challenge, run

@challenge.on_job()
def job(ctx, payload):
    return {"score": payload["score"]}

run()
"""


class Bundles(http.server.ThreadingHTTPServer):
    """Serves one bundle; `cuts` are the sizes after which its connections break, one after the other."""

    def __init__(self, config: UserConfig, data: bytes, cuts: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.config, self.data, self.cuts = config, data, cuts
        self.ranges: list[str | None] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Bundles

    def do_GET(self) -> None:
        sha256, config = self.path.rpartition("/")[2], self.server.config
        told = self.headers["Authorization"]
        if not check_bundle_authorization(told, config.secret, config.vm, sha256):
            self.send_error(404)
            return
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        first = int(asked[6:-1]) if asked else 0
        total = len(self.server.data)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(total - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        self.end_headers()
        end = first + self.server.cuts.pop(0) if self.server.cuts else total
        self.wfile.write(self.server.data[first:end])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's own name
        """Say nothing."""


@pytest.fixture
def bundles(user_config: UserConfig) -> Iterator[Bundles]:
    tree = [TreeEntry("challenge.py", CHALLENGE), TreeEntry("platform.toml", TOML)]
    server = Bundles(user_config, pack(tree), [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def at(server: Bundles) -> UserConfig:
    """user_config that names the server."""
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return server.config.model_copy(update={"validator_base_url": url})


class TestFetch:
    def test_a_broken_download_goes_on_where_it_broke(self, bundles: Bundles) -> None:
        bundles.cuts = [1000, 2000]
        sha256 = hashlib.sha256(bundles.data).hexdigest()
        assert fetch_bundle(at(bundles), sha256) == bundles.data
        assert bundles.ranges == [None, "bytes=1000-", "bytes=3000-"]

    def test_another_bundle_than_the_measured_one_is_refused(self, bundles: Bundles) -> None:
        with pytest.raises(BootFailed, match="expected a bundle with SHA-256 0000"):
            fetch_bundle(at(bundles), "0" * 64)

    def test_a_refusal_is_final(self, bundles: Bundles) -> None:
        stranger = at(bundles).model_copy(update={"launch_secret": UserConfig.encode_secret(bytes(32))})
        with pytest.raises(BootFailed, match="HTTP 404"):
            fetch_bundle(stranger, "0" * 64)

    def test_a_validator_that_is_away_is_asked_until_the_deadline(self, user_config: UserConfig) -> None:
        with pytest.raises(BootFailed, match=r"did not arrive from http://127\.0\.0\.1:1: ConnectionRefused"):
            fetch_bundle(user_config, "0" * 64, deadline=0.3)


class Guest:
    """platform-boot as a process of its own."""

    def __init__(self, port: int, environment: dict[str, str], deadline: float) -> None:
        program = (
            "from platform_challenge_sdk.boot import boot_and_serve, exit_program, run_program\n"
            f"exit_program(run_program(boot_and_serve({port}, deadline={deadline})))"
        )
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | environment, stderr=subprocess.PIPE
        )

    def health(self) -> dict[str, str]:
        """What /sdk/health says when it is no longer `starting`."""
        while self.process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/sdk/health")
                response = connection.getresponse()
                told: dict[str, str] = json.loads(response.read())
            except OSError:
                continue
            finally:
                connection.close()
            assert response.headers["Content-Type"] == "application/json"
            if told["status"] != "starting":
                return told
        raise AssertionError(f"it ended with {self.process.returncode}")

    def end(self) -> tuple[int, str]:
        """(exit code, what it said on stderr), after SIGTERM if it still runs."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said.decode()


@pytest.fixture
def guest(bundles: Bundles, port: int, tmp_path: Path) -> Iterator[Any]:
    """Starts platform-boot for a tree."""
    started: list[Guest] = []

    def start(
        challenge: bytes = CHALLENGE, toml: bytes = TOML, deadline: float = 30, **environment: str
    ) -> Guest:
        bundles.data = pack([TreeEntry("challenge.py", challenge), TreeEntry("platform.toml", toml)])
        config = tmp_path / "user-config"
        config.write_text(at(bundles).model_dump_json())
        given = {
            "PLATFORM_USER_CONFIG": str(config),
            "CHALLENGE_SHA256": hashlib.sha256(bundles.data).hexdigest(),
            "CHALLENGE_ENTRY": "challenge",
            "TMPDIR": str(tmp_path),
        }
        started.append(Guest(port, given | environment, deadline))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


@pytest.mark.slow  # starts Python with the SDK in it
class TestBoot:
    async def test_it_fetches_imports_and_serves_the_challenge(self, guest: Any, bundles: Bundles) -> None:
        booted = guest()
        told = await asyncio.to_thread(booted.health)
        assert told["status"] == "ready"
        assert told["containment"].startswith(("namespaces", "Landlock", "none: no sandbox"))
        validator = TestingValidator(booted.port, launch_secret=bundles.config.secret, vm=bundles.config.vm)
        await validator.start()
        await validator.execute(payload={"score": 0.75})
        assert (await validator.expect(JobResult)).result == {"score": 0.75}
        await validator.close()
        code, said = await asyncio.to_thread(booted.end)
        assert code == 0
        assert said.endswith("ended: stopped\n")
        assert bundles.config.launch_secret not in said

    @pytest.mark.parametrize(
        ("tree", "reason"),
        [
            ({"challenge": b"import nowhere_to_be_found"}, "No module named 'nowhere_to_be_found'"),
            ({"challenge": b"import sys; sys.exit(3)"}, "SystemExit: 3"),
            ({"challenge": b"x = 1"}, "registers no handler"),
            ({"toml": b"name = 1"}, "platform.toml"),
            ({"CHALLENGE_SHA256": "short"}, "CHALLENGE_SHA256: expected 64"),
            ({"CHALLENGE_SHA256": "0" * 64}, "expected a bundle with SHA-256"),
            ({"PLATFORM_USER_CONFIG": "/nowhere"}, "user_config cannot be read at /nowhere"),
            ({"challenge": b"import time; time.sleep(60)", "deadline": 2.0}, "not imported in 2 s"),
        ],
        ids=lambda case: re.sub(r"\W+", " ", case) if isinstance(case, str) else "",
    )
    def test_a_failure_is_shown_by_health(self, guest: Any, tree: dict[str, Any], reason: str) -> None:
        booted = guest(**tree)
        told = booted.health()
        assert told["status"] == "failed"
        assert reason in told["error"]
        code, said = booted.end()
        assert (code, reason in said) == (1, True)

    def test_a_failure_is_shown_until_the_boot_deadline(self, guest: Any) -> None:
        booted = guest(challenge=b"x = 1", deadline=3.0)
        assert booted.health()["status"] == "failed"
        assert booted.process.wait(20) == 1

    async def test_neither_a_thread_nor_a_task_of_a_handler_keeps_it_or_ends_it(
        self, guest: Any, bundles: Bundles
    ) -> None:
        challenge = b"""
import asyncio, sys, time
from platform_challenge_sdk import challenge

@challenge.on_job("exits")
async def exits(ctx, payload):
    async def leave():
        sys.exit(7)
    await asyncio.create_task(leave())

@challenge.on_job("never")
def never(ctx, payload):
    while True:
        time.sleep(1)
"""
        booted = guest(challenge=challenge, toml=TOML + b'[execution]\ncvm = "shared"\n')
        await asyncio.to_thread(booted.health)
        validator = TestingValidator(booted.port, launch_secret=bundles.config.secret, vm=bundles.config.vm)
        await validator.start()
        await validator.execute(name="exits")
        done = await validator.expect(JobResult)
        assert done.error is not None
        assert done.error.message == "SystemExit: 7"
        await validator.execute(name="never")
        began = time.monotonic()
        code, _ = await asyncio.to_thread(booted.end)
        await validator.close()
        assert code == 0
        assert time.monotonic() - began < 15


class TestLifetime:
    lifetime = Lifetime(started=100.0, idle=3600.0, hard=7200.0)

    @pytest.mark.parametrize(
        ("last_frame", "holds_job", "now", "left", "why"),
        [
            (100.0, False, 100.0, 3600.0, "max_lifetime_s"),
            (2000.0, False, 2000.0, 3600.0, "max_lifetime_s"),
            (7000.0, False, 7000.0, 300.0, "hard_lifetime_s"),
            (2000.0, True, 2000.0, 900.0, "15 min"),
            (2000.0, True, 2901.0, -1.0, "15 min"),
            (7299.0, True, 7300.0, 0.0, "hard_lifetime_s"),
        ],
    )
    def test_frames_renew_all_but_the_hard_limit(
        self, last_frame: float, holds_job: bool, now: float, left: float, why: str
    ) -> None:
        seconds, reason = self.lifetime.left(last_frame=last_frame, holds_job=holds_job, now=now)
        assert seconds == left
        assert reason.startswith(why)


@pytest.mark.parametrize("error", ["x" * 10_000, '"\n' * 10_000, "é" * 10_000])
def test_health_is_at_most_4_kib_and_keeps_the_end_of_the_error(error: str) -> None:
    body = Health("failed", error + " the end").body()
    assert len(body) <= 4096
    assert json.loads(body)["error"].endswith(" the end")
