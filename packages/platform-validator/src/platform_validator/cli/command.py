"""What every command shares: its options, its settings, and how it asks, tells and ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from platform_validator.cli import ask, tell
from platform_validator.config import ConfigFaults, Settings, load_settings
from platform_validator.errors import ValidatorError

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The configuration file")]
CONFIGURATION = 2
FAILED = 1
NO_DAEMON = 3


def settings_of(context: typer.Context, config: Path | None) -> Settings:
    """The settings; every fault of theirs is told, and ends the command with exit code 2."""
    try:
        return load_settings(dict(os.environ), flag_file=config or context.obj)
    except ConfigFaults as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        raise typer.Exit(CONFIGURATION) from error


def asked(settings: Settings, path: str) -> Any:
    """What the daemon shows, or what the journal holds when none runs."""
    try:
        return ask.ask(settings, path)
    except ValidatorError as error:
        failed(str(error))


def told(settings: Settings, path: str, body: dict[str, Any] | None, *, as_json: bool) -> dict[str, Any]:
    """Ask the running daemon to do something; without a body only for what it shows."""
    try:
        return tell.tell(settings, path, body)
    except tell.Refused as error:
        code = CONFIGURATION if error.reply.body.get("code") == "invalid" else FAILED
        refused(error.reply.body, code, as_json=as_json)
    except (tell.NoDaemon, ask.DaemonSilent) as error:
        refused({"error": str(error), "code": "no_daemon"}, NO_DAEMON, as_json=as_json)
    except ValidatorError as error:
        failed(str(error))


def refused(body: dict[str, Any], code: int, *, as_json: bool) -> NoReturn:
    """End with what was answered: `error` and its faults on stderr, the whole on stdout as JSON."""
    if as_json:
        print(json.dumps(body))
    print(f"error: {body['error']}", file=sys.stderr)
    for fault in body.get("faults", []):
        print(f"error: {fault}", file=sys.stderr)
    raise typer.Exit(code)


def failed(message: str) -> NoReturn:
    """End with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(CONFIGURATION)
