"""`validator cvms`: the CVMs of ours, and those that nobody knows."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from platform_validator.cli import show, top
from platform_validator.cli.command import AsJson, ConfigFile, asked, settings_of, told

cvms = typer.Typer(help="CVMs.", no_args_is_help=True)


@cvms.command("list")
def list_cvms(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every CVM of ours that is not gone."""
    found = asked(settings_of(context, config), "cvms")
    print(json.dumps(found)) if as_json else show.cvms(found, Console())


@cvms.command("top")
def top_cvms(
    context: typer.Context,
    *,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What each CVM uses, as sampled, the most memory first; until Ctrl-C. JSON is shown once."""
    settings = settings_of(context, config)
    console = Console()
    if as_json:
        print(json.dumps(top.ranked(asked(settings, "cvms"))))
        return
    if once or not console.is_terminal:
        console.print(top.table(asked(settings, "cvms")))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(top.table(asked(settings, "cvms")), refresh=True)
            time.sleep(top.REFRESH)


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
