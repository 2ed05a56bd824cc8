"""`platform-api admin jobs`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from platform_api.cli.console import AsJson, DatabaseUrl, say, show, with_database
from platform_api.database import Database
from platform_api.push import record_change
from platform_api.queue import Queue, job_view
from platform_api.tables import jobs

group = typer.Typer(help="Jobs.", no_args_is_help=True)
_NO_TERM = Queue(0)
"""Reading and cancelling look at no lease's term."""


@group.command("list")
def list_jobs(
    *, limit: Annotated[int, typer.Option()] = 100, database_url: DatabaseUrl = None, as_json: AsJson = False
) -> None:
    """Show jobs, newest first."""

    async def work(database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            query = sa.select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)
            return [job_view(dict(row)) for row in (await connection.execute(query)).mappings()]

    columns = ("id", "status", "outcome", "score", "attempt", "miner_hotkey")
    show(with_database(database_url, work), columns, as_json=as_json)


@group.command("show")
def show_job(job_id: str, *, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show one job with its result."""

    async def work(database: Database) -> dict[str, Any]:
        async with database.read() as connection:
            return job_view(await _NO_TERM.job(connection, job_id))

    found = with_database(database_url, work)
    say(found, json.dumps(found, indent=2), as_json=as_json)


@group.command("cancel")
def cancel_job(job_id: str, *, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Cancel a job at once; its validator is told."""

    async def work(database: Database) -> None:
        async with database.write() as connection:
            await _NO_TERM.cancel(connection, job_id)
            await record_change(connection, "job_cancelled", job_id)

    with_database(database_url, work)
    say({"id": job_id, "status": "cancelled"}, f"cancelled {job_id}", as_json=as_json)
