"""What every command shares: settings with all their faults at once, the database, output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from platform_api.config import ApiSettings
from platform_api.database import Database
from platform_api.errors import ApiError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
REFUSED, BAD_SETTINGS = 1, 2
DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", help="sqlite:///path or postgresql://…, else PLATFORM_API_DATABASE_URL"),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def settings(**flags: Any) -> ApiSettings:
    """The settings; flags that were given come before the environment.

    Exits with 2 after naming every fault, one line each.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return ApiSettings(**given)
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            flag = "--" + name.removesuffix("s" if name == "audiences" else "").replace("_", "-")
            where = f"{flag} (flag)" if name in given else f"PLATFORM_API_{name.upper()} (environment)"
            expected = fault["msg"].removeprefix("Value error, ")
            print(f"error: {where}: {expected}, got {_shown(name, fault['input'])}", file=sys.stderr)
        raise typer.Exit(BAD_SETTINGS) from error


def checked(model: type[M], given: Mapping[str, Any]) -> M:
    """A model of options; exits with 2 after naming every fault, one line each."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        for fault in error.errors():
            where = ".".join(map(str, fault["loc"])) or model.__name__
            expected = fault["msg"].removeprefix("Value error, ")
            print(f"error: {where}: {expected}, got {str(fault['input'])[:120]!r}", file=sys.stderr)
        raise typer.Exit(BAD_SETTINGS) from error


def with_database(database_url: str | None, work: Callable[[Database], Awaitable[T]]) -> T:
    """Open the database, migrated, and do `work` with it; a refusal exits with 1."""
    found = settings(database_url=database_url)

    async def run() -> T:
        database = await Database.open(found.database_url)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except ApiError as error:
        fail(error.detail)
    except (SQLAlchemyError, OSError) as error:
        fail(f"the database cannot be used: {str(error)[:500]}")


def say(facts: Mapping[str, Any], sentence: str, *, as_json: bool) -> None:
    """One answer: JSON for machines, a sentence for people."""
    print(json.dumps(facts) if as_json else sentence)


def show(rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    """Rows: all of them as JSON, or some columns as a table."""
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    Console().print(table)


def fail(message: str) -> NoReturn:
    """Say what is wrong; exit with 1."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(REFUSED)


def _shown(name: str, value: Any) -> str:
    """What came, without a password."""
    if name != "database_url":
        return repr(str(value)[:120])
    try:
        return repr(make_url(str(value)).render_as_string(hide_password=True))
    except (ArgumentError, ValueError):
        return "something that is no URL"
