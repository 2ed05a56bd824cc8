"""`validator values`: what challenges keep between their jobs; through the daemon, or on its journal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from platform_protocol.ids import ChallengeId
from platform_validator.cli import show
from platform_validator.cli.carried_out import carried_out
from platform_validator.cli.command import FAILED, AsJson, ConfigFile, failed, refused, settings_of
from platform_validator.clock import SystemClock
from platform_validator.config import Settings
from platform_validator.daemon.parts import make_values, value_key_source
from platform_validator.state import StateDirectory
from platform_validator.store.sqlite import SqliteStore
from platform_validator.telemetry.logging import Directives, configure_logging
from platform_validator.values.commands import (
    FORMAT,
    DeleteValue,
    ExportValues,
    GetValue,
    ImportValues,
    ListValues,
    RekeyValues,
    SetValue,
    ShowScopes,
    ValueCommand,
    perform,
)

values = typer.Typer(help="Dynamic values of challenges.", no_args_is_help=True)

Challenge = Annotated[str, typer.Argument(metavar="CHALLENGE", help="The challenge's id")]
Key = Annotated[str, typer.Argument(metavar="KEY")]
_TIMEOUT = 300.0


@values.command("list")
def list_values(
    context: typer.Context,
    challenge: Annotated[str | None, typer.Argument(metavar="[CHALLENGE]", help="Its id; none: all")] = None,
    *,
    prefix: Annotated[str, typer.Option(help="Keys that begin with this")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Keys and versions of a challenge, or which challenges keep values."""
    command: ValueCommand = ShowScopes()
    if challenge is not None:
        command = ListValues(challenge_id=ChallengeId(challenge), prefix=prefix)
    found = _do(settings_of(context, config), command, as_json=as_json)
    print(json.dumps(found)) if as_json else show.values(found, Console())


@values.command("get")
def get_value(
    context: typer.Context,
    challenge: Challenge,
    key: Key,
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """One value, as JSON; with --json also its version."""
    command = GetValue(challenge_id=ChallengeId(challenge), key=key)
    found = _do(settings_of(context, config), command, as_json=as_json)
    print(json.dumps(found if as_json else found["value"]))


@values.command("set")
def set_value(
    context: typer.Context,
    challenge: Challenge,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="JSON", help="The value; - reads it from stdin")],
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write one value."""
    text = sys.stdin.read() if value == "-" else value
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        failed(f"expected JSON (a string wants quotes: '\"text\"'), got {text[:80]!r}: {error}")
    command = SetValue(challenge_id=ChallengeId(challenge), key=key, value=parsed)
    found = _do(settings_of(context, config), command, as_json=as_json)
    print(json.dumps(found) if as_json else f"{key}: version {found['version']}")


@values.command("delete")
def delete_value(
    context: typer.Context,
    challenge: Challenge,
    key: Key,
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Remove one value; one that is not there is no error."""
    command = DeleteValue(challenge_id=ChallengeId(challenge), key=key)
    found = _do(settings_of(context, config), command, as_json=as_json)
    print(json.dumps(found) if as_json else f"{key}: deleted")


@values.command("export")
def export_values(
    context: typer.Context,
    challenge: Challenge,
    file: Annotated[Path, typer.Argument(help="Is made, 0600; - is stdout")] = Path("-"),
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Every value of a challenge, in clear, as JSON."""
    settings = settings_of(context, config)
    found = _do(settings, ExportValues(challenge_id=ChallengeId(challenge)), as_json=as_json)
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if file == Path("-"):
        sys.stdout.write(text)
        return
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
    except OSError as error:
        failed(f"{file} cannot be made: {error.strerror}")
    written = {"file": str(file), "exported": len(found["values"])}
    print(json.dumps(written) if as_json else f"{file}: {written['exported']} values, in clear")


@values.command("import")
def import_values(
    context: typer.Context,
    challenge: Challenge,
    file: Annotated[Path, typer.Argument(help="What export wrote; - is stdin")],
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write every value of a file; what is not in it stays."""
    settings = settings_of(context, config)
    try:
        exported = json.loads(sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8"))
        if not isinstance(exported, dict) or exported.get("format") != FORMAT:
            raise ValueError(
                f"expected an object with format {FORMAT!r}, as validator values export writes it"
            )
        entries = dict(exported["values"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        failed(f"{file} cannot be imported: {error}")
    command = ImportValues(challenge_id=ChallengeId(challenge), values=entries)
    found = _do(settings, command, as_json=as_json)
    print(json.dumps(found) if as_json else f"{found['written']} values written")


@values.command("rekey")
def rekey_values(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Seal every value under a new key, and forget the old one."""
    found = _do(settings_of(context, config), RekeyValues(), as_json=as_json)
    print(json.dumps(found) if as_json else f"{found['resealed']} sealed under a new key")
    if found["unreadable"]:
        message = f"{found['unreadable']} do not open; the old key stays for them (log: value_not_resealed)"
        refused({"error": message, "code": "value_unreadable"}, FAILED, as_json=False)


def _do(settings: Settings, command: ValueCommand, *, as_json: bool) -> dict[str, Any]:
    return carried_out(
        settings,
        "values",
        command.model_dump(),
        here=lambda state: _on_the_journal(settings, state, command),
        as_json=as_json,
        timeout=_TIMEOUT,
    )


async def _on_the_journal(settings: Settings, state: StateDirectory, command: ValueCommand) -> dict[str, Any]:
    configure_logging(Directives("off"), "people")
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    source = value_key_source(
        settings,
        keyring=state.folder / "keyring",
        credentials=Path(credentials) if credentials else None,
    )
    store = await SqliteStore.open(state.database)
    try:
        keeper = make_values(settings, source, store=store, clock=SystemClock())
        await keeper.settle()
        return await perform(keeper, command)
    finally:
        await store.close()
