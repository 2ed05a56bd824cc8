"""`validator challenges`: what this validator evaluates."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import AsJson, ConfigFile, asked, settings_of

challenges = typer.Typer(help="Challenges.", no_args_is_help=True)


@challenges.command("list")
def list_challenges(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every challenge: state, commit, reason."""
    found = asked(settings_of(context, config), "challenges")
    print(json.dumps(found)) if as_json else show.challenges(found, Console())
