"""`validator cvms`: the CVMs of ours, and those that nobody knows."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import AsJson, ConfigFile, asked, settings_of, told

cvms = typer.Typer(help="CVMs.", no_args_is_help=True)


@cvms.command("list")
def list_cvms(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every CVM of ours that is not gone."""
    found = asked(settings_of(context, config), "cvms")
    print(json.dumps(found)) if as_json else show.cvms(found, Console())


@cvms.command("reclaim")
def reclaim_cvms(
    context: typer.Context,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Destroy VMs that carry our state id and are not in our journal: a restored backup leaves such."""
    settings = settings_of(context, config)
    strays = told(settings, "status", None, as_json=as_json).get("strays", [])
    if not yes and as_json:
        print(json.dumps({"strays": strays, "reclaiming": [], "remedy": "--yes destroys them"}))
        return
    if strays and not yes:
        print("\n".join(strays))
        typer.confirm(f"Destroy {len(strays)} VMs that the journal does not know?", abort=True)
    found = told(settings, "cvms/reclaim", {"names": strays}, as_json=as_json)
    begun = len(found["reclaiming"])
    print(json.dumps(found) if as_json else f"{begun} VMs are being destroyed: validator cvms list")
