"""`validator config`: every setting, and where it came from."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

from platform_validator.cli import show
from platform_validator.cli.command import AsJson, ConfigFile, settings_of
from platform_validator.config import OPTIONS, Settings

configuration = typer.Typer(help="The configuration.", no_args_is_help=True)


@configuration.command("show")
def show_config(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every setting, and where its value came from."""
    rows = rows_of(settings_of(context, config))
    print(json.dumps(rows)) if as_json else show.config(rows, Console())


def rows_of(settings: Settings) -> list[dict[str, Any]]:
    """Each setting as it is shown; a secret's value is not."""
    rows: list[dict[str, Any]] = []
    for option in OPTIONS:
        origin = settings.origins[option.key]
        value = None if origin.value is None else "(secret)" if option.secret else origin.value
        rows.append(
            {
                "setting": option.key,
                "value": list(value) if isinstance(value, tuple) else getattr(value, "value", value),
                "from": origin.where,
                "reloads": option.reloads,
                "meaning": option.meaning + (" (read, not in force yet)" if option.later else ""),
            }
        )
    return rows
