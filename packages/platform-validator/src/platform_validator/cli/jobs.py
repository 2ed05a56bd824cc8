"""`validator jobs`: what was claimed, and ending what runs."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import AsJson, ConfigFile, asked, settings_of, told

jobs = typer.Typer(help="Jobs.", no_args_is_help=True)


@jobs.command("cancel")
def cancel_job(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job's id")],
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """End a job that runs here: it is given back, and another validator may claim it."""
    settings = settings_of(context, config)
    found = told(settings, f"jobs/{quote(job_id, safe='')}/cancel", {}, as_json=as_json)
    print(json.dumps(found) if as_json else f"job {job_id} is being cancelled: validator jobs list")


@jobs.command("list")
def list_jobs(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest claims: stage, outcome, reason."""
    found = asked(settings_of(context, config), f"jobs?limit={limit}")
    print(json.dumps(found)) if as_json else show.jobs(found, Console())
