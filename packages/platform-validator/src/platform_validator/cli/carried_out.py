"""A command that the running daemon carries out; where none runs, this process does, on its journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from platform_protocol.values import ValueInvalid
from platform_validator.challenges.environment import EnvRefused
from platform_validator.cli import tell
from platform_validator.cli.command import FAILED, failed, refused
from platform_validator.config import Settings
from platform_validator.errors import ValidatorError
from platform_validator.state import StateDirectory
from platform_validator.values.errors import ValueRefused

Here = Callable[[StateDirectory], Coroutine[Any, Any, dict[str, Any]]]


def carried_out(
    settings: Settings,
    path: str,
    command: dict[str, Any],
    *,
    here: Here,
    as_json: bool,
    timeout: float = tell.TIMEOUT,
) -> dict[str, Any]:
    """The answer; a refusal or a fault ends the process, told as the operator asked.

    Args:
        settings: Where the state is.
        path: Below `/api/v1`, where the daemon takes such commands.
        command: As JSON.
        here: Carries it out on a state directory that is locked for it.
        as_json: Whether a refusal is told as JSON.
        timeout: Seconds that the daemon may take.
    """
    try:
        try:
            return tell.tell(settings, path, command, timeout=timeout)
        except tell.NoDaemon:
            with _locked(settings) as state:
                return asyncio.run(here(state))
    except tell.Refused as error:
        refused(error.reply.body, FAILED, as_json=as_json)
    except (EnvRefused, ValueRefused, ValueInvalid) as error:
        refused({"error": str(error), "code": error.code}, FAILED, as_json=as_json)
    except ValidatorError as error:
        failed(str(error))


@contextmanager
def _locked(settings: Settings) -> Iterator[StateDirectory]:
    state = StateDirectory(settings.db_path)
    if not state.database.exists():
        failed(f"no validator ever ran on {state.folder}: start it, or set VALIDATOR_DB_PATH")
    state.prepare()
    state.lock()
    try:
        yield state
    finally:
        state.close()
