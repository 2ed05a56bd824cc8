"""`validator hosts`: the VMM hosts, and which of them take CVMs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import AsJson, ConfigFile, asked, settings_of, told

hosts = typer.Typer(help="VMM hosts.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The host's name in the configuration")]


@hosts.command("list")
def list_hosts(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every host: its state, why and since when, and what is used of it."""
    found = asked(settings_of(context, config), "hosts")
    print(json.dumps(found)) if as_json else show.hosts(found, Console())


@hosts.command("drain")
def drain_host(
    context: typer.Context, name: Name, *, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Make no more CVMs on a host; what runs there goes on. Restarts do not forget it."""
    _wish(context, name, "drain", config, as_json=as_json)


@hosts.command("undrain")
def undrain_host(
    context: typer.Context, name: Name, *, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Let a host have CVMs again."""
    _wish(context, name, "undrain", config, as_json=as_json)


def _wish(context: typer.Context, name: str, wish: str, config: Path | None, *, as_json: bool) -> None:
    settings = settings_of(context, config)
    found = told(settings, f"hosts/{quote(name, safe='')}/{wish}", {}, as_json=as_json)
    line = f"host {found['host']} is {found['state']}, with {found['cvms']} CVMs: validator hosts list"
    print(json.dumps(found) if as_json else line)
