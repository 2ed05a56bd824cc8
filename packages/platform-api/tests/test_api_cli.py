"""The command line: all faults at once, administration on the database, pushed by the running server."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from pathlib import Path

from running_api import INSTANCE, Api
from websockets.asyncio.client import connect

from platform_protocol.signing import Keypair, sign_request

HOTKEY = Keypair.from_seed(b"c" * 32).address
PROGRAM = [sys.executable, "-c", "from platform_api.cli import main; main()"]


async def _run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PLATFORM_API_")}
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean | (environment or {}),
    )
    async with asyncio.timeout(30):
        out, errors = await process.communicate()
    return process.returncode or 0, out.decode(), errors.decode()


async def test_all_faults_in_settings_are_named_at_once_with_their_source_and_no_password() -> None:
    environment = {
        "PLATFORM_API_LISTEN": "nowhere",
        "PLATFORM_API_DATABASE_URL": "postgresql://user:hunter2@host:bad/name",
    }
    code, _, errors = await _run(
        "serve", "--lease-term", "soon", "--audience", "ftp://x", environment=environment
    )
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 4
    for source in ("PLATFORM_API_LISTEN", "PLATFORM_API_DATABASE_URL", "--lease-term", "--audience"):
        assert any(line.startswith(f"error: {source} ") for line in lines), source
    assert "hunter2" not in errors


async def test_the_first_token_is_printed_once_and_the_database_is_private(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'api.db'}"
    code, out, _ = await _run("admin", "init", "--json", "--database-url", url)
    assert (code, list(json.loads(out))) == (0, ["token"])
    assert json.loads(out)["token"].encode() not in (tmp_path / "api.db").read_bytes()
    assert (tmp_path / "api.db").stat().st_mode & 0o777 == 0o600
    again, _, errors = await _run("admin", "init", "--database-url", url)
    assert (again, "an administrator already" in errors) == (1, True)


async def test_what_the_command_line_changes_is_pushed_by_the_server(api: Api) -> None:
    path = f"/validators/{api.validator.address}/ws"
    headers = sign_request(
        api.validator,
        method="GET",
        path=path,
        body=b"",
        audience=api.base,
        instance=INSTANCE,
        timestamp_ms=time.time_ns() // 1_000_000,
        nonce=secrets.token_hex(16),
    )
    url = api.database_url
    async with (
        connect(api.base.replace("http", "ws") + path, additional_headers=headers, proxy=None) as socket,
        asyncio.timeout(30),
    ):
        assert json.loads(await socket.recv())["type"] == "hello"
        options = ["--name", "c", "--repo", "o/n", "--commit", "a" * 40, "--database-url", url, "--json"]
        code, out, errors = await _run("admin", "challenges", "add", *options)
        assert code == 0, errors
        assert json.loads(await socket.recv())["challenge_id"] == json.loads(out)["id"]
