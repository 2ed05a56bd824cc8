"""Asks the running daemon over its Unix socket; without one, reads the journal itself, under the lock."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from pathlib import Path
from typing import Any

from platform_validator.config import Settings
from platform_validator.daemon.board import plain
from platform_validator.errors import ValidatorError
from platform_validator.jobs.work import JobView
from platform_validator.state import StateDirectory, StateLocked
from platform_validator.store.sqlite import SqliteStore

_TIMEOUT = 10.0


class DaemonSilent(ValidatorError):
    """A daemon holds the state directory and does not answer."""


def ask(settings: Settings, path: str) -> Any:
    """The answer to `/api/v1/<path>`.

    Raises:
        DaemonSilent: A daemon runs and does not answer.
        StateUnusable: The state directory cannot be used.
    """
    state = StateDirectory(settings.db_path)
    answer = _from_daemon(state.socket, path)
    if answer is not None:
        return answer[0]
    if not state.database.exists():
        return _empty(path)
    try:
        state.lock()
    except StateLocked as error:
        raise DaemonSilent(f"the daemon on {state.folder} does not answer at {state.socket}") from error
    try:
        return asyncio.run(_from_journal(state.database, path))
    finally:
        state.close()


def _from_daemon(path: Path, what: str) -> tuple[Any] | None:
    connection = http.client.HTTPConnection("validator", timeout=_TIMEOUT)
    try:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(_TIMEOUT)
        connection.sock.connect(str(path))
        connection.request("GET", f"/api/v1/{what}")
        return (json.loads(connection.getresponse().read()),)
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


async def _from_journal(database: Path, path: str) -> Any:
    store = await SqliteStore.open(database)
    try:
        what, _, query = path.partition("?")
        if what == "jobs":
            limit = int(query.removeprefix("limit=") or 50)
            return plain([JobView.of(record) for record in await store.recent_jobs(limit)])
        if what == "cvms":
            return [_vm(plain(record)) for record in await store.open_vms()]
        if what == "challenges":
            return [_instance(plain(record)) for record in await store.instances()]
        identity = await store.identity()
        return {
            "status": "stopped",
            "state_id": identity.state_id,
            "outbox": len(await store.outbox()),
            "open_jobs": len(await store.open_jobs()),
            "open_cvms": len(await store.open_vms()),
        }
    finally:
        await store.close()


def _empty(path: str) -> Any:
    return {"status": "stopped", "reasons": {"state": "never run"}} if path == "status" else []


def _vm(record: dict[str, Any]) -> dict[str, Any]:
    shown = {key: record[key] for key in ("name", "challenge_id", "purpose", "attestation")}
    return shown | {"stage": record["phase"], "since": record["intended_at"]}


def _instance(record: dict[str, Any]) -> dict[str, Any]:
    return {"id": record["challenge_id"], "name": record["name"], "state": record["state"], "serving": record}
