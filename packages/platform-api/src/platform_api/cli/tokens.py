"""`platform-api admin init`, `admin tokens add`: administrators' tokens."""

from __future__ import annotations

from typing import Annotated

import sqlalchemy as sa
import typer

from platform_api.auth import make_token
from platform_api.cli.console import AsJson, DatabaseUrl, say, with_database
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.tables import admin_tokens

group = typer.Typer(help="Administrators' tokens.", no_args_is_help=True)


def init(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Make the database and the first administrator's token, which is printed once."""

    async def work(database: Database) -> str:
        async with database.write() as connection:
            if await connection.scalar(sa.select(sa.func.count()).select_from(admin_tokens)):
                raise ApiError(
                    409,
                    "already_done",
                    "there is an administrator already; another token: platform-api admin tokens add NAME",
                )
            return await make_token(connection, "first")

    token = with_database(database_url, work)
    say({"token": token}, f"administrator's token, shown once: {token}", as_json=as_json)


@group.command("add")
def add_token(
    name: Annotated[str, typer.Argument(help="Whose it is")],
    *,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make another administrator's token, which is printed once."""

    async def work(database: Database) -> str:
        async with database.write() as connection:
            return await make_token(connection, name[:64])

    token = with_database(database_url, work)
    say({"name": name, "token": token}, f"token of {name}, shown once: {token}", as_json=as_json)
