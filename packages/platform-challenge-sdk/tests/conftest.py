"""A challenge served on loopback as in a CVM, and a validator that dials it."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import TestingValidator
from platform_protocol.ids import VmName
from platform_protocol.user_config import UserConfig

SECRET = bytes(range(32))
VM = VmName("pv-0123456789-7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44")

Serve = Callable[..., Awaitable[tuple[ChallengeServer, TestingValidator]]]


@pytest.fixture
def port() -> int:
    """A free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def user_config() -> UserConfig:
    """What a VM is told."""
    return UserConfig(
        vm=VM,
        launch_secret=UserConfig.encode_secret(SECRET),
        validator_base_url="http://127.0.0.1:1",
        proxy_url=None,
        max_lifetime_s=3600,
        hard_lifetime_s=3600,
    )


@pytest.fixture
async def serve(port: int, user_config: UserConfig, tmp_path: Path) -> AsyncIterator[Serve]:
    """Serves a challenge until the test ends, and gives its server and a validator for it."""
    stop = asyncio.Event()
    started: list[TestingValidator] = []
    async with asyncio.timeout(50), asyncio.TaskGroup() as tasks:

        async def serve_now(challenge: Challenge, **options: Any) -> tuple[ChallengeServer, TestingValidator]:
            options.setdefault("agent", Agent(()))
            server = ChallengeServer(challenge, user_config, Health("ready"), scratch=tmp_path, **options)
            tasks.create_task(server.serve("127.0.0.1", port, stop))
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0)  # it begins to listen in some turn of this loop
                else:
                    writer.close()
                    break
            validator = TestingValidator(port, launch_secret=SECRET, vm=VM)
            started.append(validator)
            return server, validator

        yield serve_now
        for validator in started:
            await validator.close()
        stop.set()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[Agent, list[bytes]]]:
    """A guest agent on a Unix socket, which quotes anything, and the report data that it was given."""
    asked: list[bytes] = []
    path = tmp_path / "dstack.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                length = 0
                while line := stream.readline().strip():
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                asked.append(bytes.fromhex(json.loads(stream.read(length))["report_data"]))
                body = json.dumps({"quote": "aabb", "event_log": "[]", "vm_config": "{}"}).encode()
                stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield Agent((str(tmp_path / "absent.sock"), str(path))), asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture
def tar() -> Callable[[dict[str, str]], bytes]:
    """Makes a submission of files."""

    def packed(files: dict[str, str]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        return out.getvalue()

    return packed
