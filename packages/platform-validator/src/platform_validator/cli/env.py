"""`validator env`: what operators give to challenges; a value is never an argument, and never shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from platform_protocol.ids import ChallengeId
from platform_validator.challenges.environment import (
    MAX_VALUE,
    Environments,
    ListEnv,
    SetEnv,
    UnsetEnv,
)
from platform_validator.cli import show
from platform_validator.cli.carried_out import carried_out
from platform_validator.cli.command import AsJson, ConfigFile, asked, failed, settings_of
from platform_validator.clock import SystemClock
from platform_validator.config import Settings
from platform_validator.keyring import Keyring
from platform_validator.state import StateDirectory
from platform_validator.store.sqlite import SqliteStore

env = typer.Typer(help="Environment variables of challenges.", no_args_is_help=True)

Challenge = Annotated[str, typer.Argument(metavar="CHALLENGE", help="The challenge's id, or its name")]
Name = Annotated[str, typer.Argument(metavar="NAME")]


@env.command("set")
def set_env(
    context: typer.Context,
    challenge: Challenge,
    name: Name,
    *,
    file: Annotated[Path | None, typer.Option(help="Has the value, as it is; - is stdin")] = None,
    repository: Annotated[
        str | None, typer.Option(help="For which the value is given (default: the one that is listed)")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a variable: asked for, or read from a file or stdin. Repeat it when the repository has changed."""
    settings = settings_of(context, config)
    challenge_id, listed = _named(settings, challenge)
    repository = repository or listed
    if repository is None:
        failed(f"challenge {challenge} is not known here: wait until it is listed, or give --repository")
    value = _value(file, f"{name} for {challenge_id} at {repository}")
    command = SetEnv(challenge_id=challenge_id, repository=repository, name=name, value=value)
    found = _do(settings, command, as_json=as_json) | {"repository": repository}
    print(json.dumps(found) if as_json else f"{name} is given to {challenge_id} at {repository}")


@env.command("unset")
def unset_env(
    context: typer.Context,
    challenge: Challenge,
    name: Name,
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Forget a variable."""
    settings = settings_of(context, config)
    command = UnsetEnv(challenge_id=_named(settings, challenge)[0], name=name)
    found = _do(settings, command, as_json=as_json)
    print(json.dumps(found) if as_json else f"{name} is forgotten")


@env.command("list")
def list_env(
    context: typer.Context,
    challenge: Annotated[str | None, typer.Argument(metavar="[CHALLENGE]", help="Its id or name")] = None,
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Which variables were given, and for which repository; no values."""
    settings = settings_of(context, config)
    challenge_id = _named(settings, challenge)[0] if challenge is not None else None
    found = _do(settings, ListEnv(challenge_id=challenge_id), as_json=as_json)
    print(json.dumps(found)) if as_json else show.env(found["env"], Console())


def _named(settings: Settings, challenge: str) -> tuple[ChallengeId, str | None]:
    """A challenge's id, and the repository that it is listed with: its candidate's, if it has one."""
    rows = asked(settings, "challenges")
    found = [row for row in rows if row["id"] == challenge] or [
        row for row in rows if row["name"] == challenge
    ]
    if len({row["id"] for row in found}) > 1:
        failed(f"{len(found)} challenges are named {challenge!r}: name one by its id")
    for row in reversed(found):  # without a daemon a row is an instance, the newest last
        shown = row.get("candidate") or row.get("serving") or {}
        return ChallengeId(row["id"]), shown.get("repository")
    return ChallengeId(challenge), None


def _value(file: Path | None, what: str) -> str:
    """From a file as it is, from a person without an echo, or from stdin without its last newline."""
    try:
        if file is not None and file != Path("-"):
            with file.open("rb") as opened:
                return opened.read(MAX_VALUE + 1).decode()
        if file is None and sys.stdin.isatty():
            return str(typer.prompt(what, hide_input=True))
        return sys.stdin.buffer.read(MAX_VALUE + 2).decode().removesuffix("\n")
    except OSError as error:
        failed(f"{file} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        failed("expected a value in UTF-8")


def _do(settings: Settings, command: SetEnv | UnsetEnv | ListEnv, *, as_json: bool) -> dict[str, Any]:
    return carried_out(
        settings,
        "env",
        command.model_dump(),
        here=lambda state: _on_the_journal(state, command),
        as_json=as_json,
    )


async def _on_the_journal(state: StateDirectory, command: SetEnv | UnsetEnv | ListEnv) -> dict[str, Any]:
    store = await SqliteStore.open(state.database)
    try:
        keyring = Keyring.open_or_create(state.folder / "keyring")
        return await Environments(store=store, keyring=keyring, clock=SystemClock()).perform(command)
    finally:
        await store.close()
