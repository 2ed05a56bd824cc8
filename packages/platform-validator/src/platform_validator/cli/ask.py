"""Asks the running daemon over its Unix socket; without one, reads the journal itself, under the lock."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from platform_validator.config import Settings
from platform_validator.daemon.board import plain
from platform_validator.errors import ValidatorError
from platform_validator.host_name import HostName
from platform_validator.jobs.work import JobView
from platform_validator.state import StateDirectory, StateLocked
from platform_validator.store.records import VmRecord
from platform_validator.store.sqlite import SqliteStore

_TIMEOUT = 10.0
_SHOWN = 500


class DaemonSilent(ValidatorError):
    """A daemon holds the state directory and does not answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the daemon answered: the HTTP status and the JSON."""

    status: int
    body: Any


def ask(settings: Settings, path: str) -> Any:
    """The answer to `/api/v1/<path>`.

    Raises:
        DaemonSilent: A daemon runs and does not answer.
        StateUnusable: The state directory cannot be used.
    """
    state = StateDirectory(settings.db_path)
    reply = exchange(state.socket, "GET", path)
    if reply is not None and reply.status == HTTPStatus.OK:
        return reply.body
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


def exchange(
    path: Path, method: str, what: str, body: dict[str, Any] | None = None, *, timeout: float = _TIMEOUT
) -> Reply | None:
    """One request to the daemon behind that socket; None when nothing answers there within the seconds."""
    connection = http.client.HTTPConnection("validator", timeout=timeout)
    try:
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(timeout)
        connection.sock.connect(str(path))
        sent = None if body is None else json.dumps(body)
        connection.request(method, f"/api/v1/{what}", body=sent, headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        try:
            return Reply(answer.status, json.loads(text))
        except ValueError:
            return Reply(answer.status, {"error": text[:_SHOWN]})
    except (OSError, http.client.HTTPException):
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
        if what == "hosts":
            return _hosts(await store.open_vms(), await store.drained_hosts())
        if what == "challenges":
            return [_instance(plain(record)) for record in await store.instances()]
        if what.startswith("challenges/"):
            return await _challenge(store, unquote(what.removeprefix("challenges/")))
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


async def _challenge(store: SqliteStore, named: str) -> dict[str, Any] | None:
    for record in await store.instances():
        if named in (record.challenge_id, record.name):
            history = await store.challenge_history(record.challenge_id, _SHOWN)
            return _instance(plain(record)) | {"history": plain(history)}
    return None


def left_in(state: StateDirectory) -> dict[str, int]:
    """What a daemon that has ended left for the next one: `undelivered` results and `cvms_left`.

    Raises:
        StateLocked: The next one runs already.
    """
    if not state.database.exists():
        return {"undelivered": 0, "cvms_left": 0}
    state.lock()
    try:
        found = asyncio.run(_from_journal(state.database, "status"))
    finally:
        state.close()
    return {"undelivered": found["outbox"], "cvms_left": found["open_cvms"]}


def _empty(path: str) -> Any:
    return {"status": "stopped", "reasons": {"state": "never run"}} if path == "status" else []


def _vm(record: dict[str, Any]) -> dict[str, Any]:
    shown = {key: record[key] for key in ("name", "challenge_id", "purpose", "attestation", "host")}
    return shown | {"stage": record["phase"], "since": record["intended_at"]}


def _hosts(vms: Sequence[VmRecord], drained: Mapping[HostName, datetime]) -> list[dict[str, Any]]:
    """What the journal knows of hosts: which are drained, and which have CVMs."""
    counts = Counter(vm.host for vm in vms)
    return [
        {
            "name": name,
            "state": "drained" if name in drained else "unknown",
            "since": plain(drained.get(name)),
            "quota": {"cvms": {"used": counts[name], "limit": None}},
        }
        for name in sorted(counts.keys() | drained.keys())
    ]


def _instance(record: dict[str, Any]) -> dict[str, Any]:
    return {"id": record["challenge_id"], "name": record["name"], "state": record["state"], "serving": record}
