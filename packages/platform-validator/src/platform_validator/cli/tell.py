"""Asks the running daemon to do something, over its Unix socket; only a running daemon can."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from platform_validator.cli.ask import DaemonSilent, Reply, exchange, left_in
from platform_validator.config import Settings
from platform_validator.errors import ValidatorError
from platform_validator.state import StateDirectory, StateLocked

SHOWN_AFTER = 2.0
_SHOWN_EVERY = 5.0
_LOOK_EVERY = 0.2
TIMEOUT = 10.0


class NoDaemon(ValidatorError):
    """No daemon runs on this state directory."""


class Refused(ValidatorError):
    """The daemon runs and will not; `reply` is its answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply.body.get("error") or f"the daemon answered {reply.status}"))
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Ended:
    """A daemon that has ended, and what it left for the next one; `left` is empty where that runs already."""

    seconds: float
    left: dict[str, int]


def tell(
    settings: Settings, path: str, body: dict[str, Any] | None = None, *, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """POST to `/api/v1/<path>`, or GET without a body; returns the answer.

    Raises:
        NoDaemon: None runs.
        DaemonSilent: One runs, and does not answer.
        Refused: It will not.
        StateUnusable: The state directory cannot be used.
    """
    state = StateDirectory(settings.db_path)
    reply = exchange(state.socket, "GET" if body is None else "POST", path, body, timeout=timeout)
    if reply is None:
        if _ended(state):
            raise NoDaemon(f"no validator runs on {state.folder}: start it, or set VALIDATOR_DB_PATH")
        raise DaemonSilent(f"the daemon on {state.folder} does not answer at {state.socket}")
    if reply.status >= HTTPStatus.BAD_REQUEST:
        raise Refused(reply)
    found: dict[str, Any] = reply.body
    return found


def wait_until_ended(
    settings: Settings, pid: int | None, progress: Callable[[str], None], *, patience: float
) -> Ended:
    """Wait until the daemon with that pid has ended; what it still does is told after two seconds.

    Raises:
        DaemonSilent: It has not ended after `patience` seconds.
    """
    state = StateDirectory(settings.db_path)
    begun = time.monotonic()
    told = begun + SHOWN_AFTER - _SHOWN_EVERY
    while True:
        passed = time.monotonic() - begun
        reply = exchange(state.socket, "GET", "status")
        if reply is not None and pid is not None and reply.body.get("pid") != pid:
            return Ended(passed, {})
        if reply is None and _ended(state):
            with contextlib.suppress(StateLocked):
                return Ended(passed, left_in(state))
            return Ended(passed, {})
        if passed > patience:
            raise DaemonSilent(f"the daemon on {state.folder} has not ended after {passed:.0f} s")
        if time.monotonic() - told >= _SHOWN_EVERY:
            progress(_doing(reply, passed))
            told = time.monotonic()
        time.sleep(_LOOK_EVERY)


def _doing(reply: Reply | None, passed: float) -> str:
    if reply is None:
        return f"ending ({passed:.0f} s)"
    found = reply.body
    jobs = len(found.get("active_jobs", []))
    left = f"{jobs} jobs, {found.get('outbox', 0)} results, {len(found.get('cvms', []))} CVMs left"
    return f"{found.get('status')}: {left} ({passed:.0f} s)"


def _ended(state: StateDirectory) -> bool:
    """Whether nobody holds the state directory."""
    if not state.folder.exists():
        return True
    try:
        state.lock()
    except StateLocked:
        return False
    state.close()
    return True
