"""`platform-api admin validators`."""

from __future__ import annotations

from typing import Any

import typer

from platform_api.cli.console import AsJson, DatabaseUrl, say, show, with_database
from platform_api.database import Database
from platform_api.validators import list_validators, set_validator

group = typer.Typer(help="Registered validators.", no_args_is_help=True)


@group.command("add")
def add_validator(hotkey: str, *, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Register a validator's hotkey, or readmit it."""
    _set(hotkey, "active", f"registered {hotkey}", database_url, as_json=as_json)


@group.command("ban")
def ban_validator(hotkey: str, *, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Ban a validator; its connection is closed."""
    _set(hotkey, "banned", f"banned {hotkey}", database_url, as_json=as_json)


@group.command("list")
def show_validators(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show registered validators."""

    async def work(database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            return await list_validators(connection)

    show(with_database(database_url, work), ("hotkey", "status", "added_at"), as_json=as_json)


def _set(hotkey: str, status: str, sentence: str, database_url: str | None, *, as_json: bool) -> None:
    async def work(database: Database) -> None:
        async with database.write() as connection:
            await set_validator(connection, hotkey, status)

    with_database(database_url, work)
    say({"hotkey": hotkey, "status": status}, sentence, as_json=as_json)
