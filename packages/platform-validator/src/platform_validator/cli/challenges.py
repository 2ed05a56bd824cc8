"""`validator challenges`: what this validator evaluates."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import FAILED, AsJson, ConfigFile, asked, refused, settings_of

challenges = typer.Typer(help="Challenges.", no_args_is_help=True)


@challenges.command("list")
def list_challenges(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every challenge: state, commit, reason."""
    found = asked(settings_of(context, config), "challenges")
    print(json.dumps(found)) if as_json else show.challenges(found, Console())


@challenges.command("check")
def check_challenge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The challenge's folder")],
    *,
    runtime: Annotated[
        str | None, typer.Option(help="name@sha256:…, the runtime that the compose hash is computed for")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a challenge that you write: platform.toml, entry, bundle; exit 1 when something fails."""
    from platform_validator.challenges.check import check_folder  # noqa: PLC0415 - the others start fast

    found = check_folder(folder, runtime)
    print(json.dumps([asdict(one) for one in found])) if as_json else show.findings(found, Console())
    raise typer.Exit(FAILED if any(one.result == "fail" for one in found) else 0)


@challenges.command("show")
def show_challenge(
    context: typer.Context,
    named: Annotated[str, typer.Argument(metavar="ID|NAME", help="The challenge's id or name")],
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """One challenge: its instances, what they wait for or why they failed, and their history."""
    found = asked(settings_of(context, config), f"challenges/{quote(named, safe='')}")
    if not found:
        body = {"error": f"no challenge has the id or name {named!r}", "code": "unknown_challenge"}
        refused(body, FAILED, as_json=as_json)
    print(json.dumps(found)) if as_json else show.challenge(found, Console())
