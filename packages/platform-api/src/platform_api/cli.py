"""The command line. Admin commands work on the database directly, beside a running server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any

import sqlalchemy as sa
import structlog
import typer
import uvicorn
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from platform_api.app import make_app, make_token, set_validator
from platform_api.challenges import (
    ChallengeChange,
    NewChallenge,
    add_challenge,
    change_challenge,
    list_challenges,
)
from platform_api.challenges import remove_challenge as take_off
from platform_api.config import ApiSettings
from platform_api.database import Database
from platform_api.errors import ApiError
from platform_api.push import record_change
from platform_api.queue import Queue, job_view
from platform_api.tables import admin_tokens, jobs, validators

app = typer.Typer(
    help="The control plane: challenges, job queue, results, push.",
    no_args_is_help=True,
    add_completion=False,
)
admin = typer.Typer(help="Administration, on the database directly.", no_args_is_help=True)
validators_group = typer.Typer(help="Registered validators.", no_args_is_help=True)
challenges_group = typer.Typer(help="Challenges.", no_args_is_help=True)
jobs_group = typer.Typer(help="Jobs.", no_args_is_help=True)
app.add_typer(admin, name="admin")
admin.add_typer(validators_group, name="validators")
admin.add_typer(challenges_group, name="challenges")
admin.add_typer(jobs_group, name="jobs")

DatabaseUrl = Annotated[str | None, typer.Option("--database-url", help="sqlite:///path or postgresql://…")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


@app.command()
def serve(
    *,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT")] = None,
    database_url: DatabaseUrl = None,
    public_url: Annotated[str | None, typer.Option(help="The URL that validators sign for")] = None,
    audience: Annotated[list[str] | None, typer.Option(help="Accepted audiences (repeatable)")] = None,
    lease_term: Annotated[str | None, typer.Option(help="Length of a lease, such as 120s")] = None,
    log_format: Annotated[str, typer.Option("--log", help="people or json")] = "people",
) -> None:
    """Run the server until SIGTERM."""
    _configure_logs(log_format)
    given = {
        "listen": listen,
        "database_url": database_url,
        "public_url": public_url,
        "audiences": audience,
        "lease_term": lease_term,
    }
    settings = _settings(**given)
    host, _, port = settings.listen.rpartition(":")
    config = uvicorn.Config(
        make_app(settings),
        host=host,
        port=int(port),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        ws_max_size=64 * 1024,
    )
    server = _Server(config)
    server.run()
    if not server.started:
        _fail(f"the server did not start: is {settings.listen} in use, or the database out of reach?")


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, instead of raising the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server in an orderly way."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


@admin.command("init")
def init(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Make the database and the first administrator's token, which is printed once."""

    async def work(database: Database) -> str:
        async with database.write() as connection:
            if await connection.scalar(sa.select(sa.func.count()).select_from(admin_tokens)):
                raise ApiError(
                    409,
                    "already_done",
                    "there is an administrator already; POST /admin/tokens makes another token",
                )
            return await make_token(connection, "first")

    token = _run(database_url, work)
    print(json.dumps({"token": token}) if as_json else f"administrator's token, shown once: {token}")


@validators_group.command("add")
def add_validator(hotkey: str, *, database_url: DatabaseUrl = None) -> None:
    """Register a validator's hotkey."""
    _run(database_url, lambda database: _set_status(database, hotkey, "active"))
    print(f"registered {hotkey}")


@validators_group.command("ban")
def ban_validator(hotkey: str, *, database_url: DatabaseUrl = None) -> None:
    """Ban a validator; its connection is closed."""
    _run(database_url, lambda database: _set_status(database, hotkey, "banned"))
    print(f"banned {hotkey}")


@validators_group.command("list")
def list_validators(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show registered validators."""
    _show(
        _run(database_url, lambda database: _rows(database, validators)),
        ("hotkey", "status"),
        as_json=as_json,
    )


@challenges_group.command("add")
def new_challenge(
    *,
    name: Annotated[str, typer.Option()],
    repo: Annotated[str, typer.Option(help="owner/name on GitHub, or a URL")],
    commit: Annotated[str, typer.Option(help="40 or 64 hex digits")],
    cpu: Annotated[int, typer.Option()] = 1,
    memory_mb: Annotated[int, typer.Option()] = 512,
    disk_mb: Annotated[int, typer.Option()] = 1024,
    timeout_s: Annotated[int, typer.Option()] = 3600,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Add a challenge; connected validators are told."""
    given = {
        "name": name,
        "github_repo": repo,
        "github_commit": commit,
        "timeout_s": timeout_s,
        "resources": {"cpu_cores": cpu, "memory_mb": memory_mb, "disk_mb": disk_mb, "gpu_count": 0},
    }
    new = _checked(lambda: NewChallenge.model_validate(given))

    async def work(database: Database) -> dict[str, Any]:
        async with database.write() as connection:
            return await add_challenge(connection, new)

    made = _run(database_url, work)
    print(json.dumps(made) if as_json else f"added {made['name']} as {made['id']}")


@challenges_group.command("update")
def update_challenge(
    challenge_id: str,
    *,
    commit: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="active or paused")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Change a challenge's commit or status; connected validators are told."""
    given = {
        key: value for key, value in (("github_commit", commit), ("status", status)) if value is not None
    }
    change = _checked(lambda: ChallengeChange.model_validate(given))

    async def work(database: Database) -> None:
        async with database.write() as connection:
            await change_challenge(connection, challenge_id, change)

    _run(database_url, work)
    print(f"changed {challenge_id}")


@challenges_group.command("remove")
def remove_challenge(challenge_id: str, *, database_url: DatabaseUrl = None) -> None:
    """Take a challenge off the list; its results stay."""

    async def work(database: Database) -> None:
        async with database.write() as connection:
            await take_off(connection, challenge_id)

    _run(database_url, work)
    print(f"removed {challenge_id}")


@challenges_group.command("list")
def show_challenges(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show every challenge."""

    async def work(database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            return await list_challenges(connection, active_only=False)

    _show(_run(database_url, work), ("id", "name", "status", "github_repo", "github_commit"), as_json=as_json)


@jobs_group.command("list")
def list_jobs(
    *, limit: Annotated[int, typer.Option()] = 100, database_url: DatabaseUrl = None, as_json: AsJson = False
) -> None:
    """Show jobs, newest first."""

    async def work(database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            query = sa.select(jobs).order_by(jobs.c.created_at.desc()).limit(limit)
            return [job_view(dict(row)) for row in (await connection.execute(query)).mappings()]

    columns = ("id", "status", "outcome", "score", "attempt", "miner_hotkey")
    _show(_run(database_url, work), columns, as_json=as_json)


@jobs_group.command("show")
def show_job(job_id: str, *, database_url: DatabaseUrl = None) -> None:
    """Show one job with its result."""

    async def work(database: Database) -> dict[str, Any]:
        async with database.read() as connection:
            return job_view(await Queue(0).job(connection, job_id))

    print(json.dumps(_run(database_url, work), indent=2))


@jobs_group.command("cancel")
def cancel_job(job_id: str, *, database_url: DatabaseUrl = None) -> None:
    """Cancel a job at once."""

    async def work(database: Database) -> None:
        async with database.write() as connection:
            await Queue(0).cancel(connection, job_id)
            await record_change(connection, "job_cancelled", job_id)

    _run(database_url, work)
    print(f"cancelled {job_id}")


def main() -> None:
    """Entry point."""
    app()


async def _set_status(database: Database, hotkey: str, status: str) -> None:
    async with database.write() as connection:
        await set_validator(connection, hotkey, status)


async def _rows(database: Database, table: sa.Table) -> list[dict[str, Any]]:
    async with database.read() as connection:
        return [dict(row) for row in (await connection.execute(sa.select(table))).mappings()]


def _run(database_url: str | None, work: Callable[[Database], Awaitable[Any]]) -> Any:
    settings = _settings(database_url=database_url)

    async def run() -> Any:
        database = await Database.open(settings.database_url)
        try:
            return await work(database)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except ApiError as error:
        _fail(error.detail)
    except (SQLAlchemyError, OSError) as error:
        _fail(f"the database cannot be used: {error}")


def _settings(**given: Any) -> ApiSettings:
    settings: ApiSettings = _checked(
        lambda: ApiSettings(**{key: value for key, value in given.items() if value is not None})
    )
    return settings


def _checked(make: Callable[[], Any]) -> Any:
    """All faults at once, one line each, exit code 2."""
    try:
        return make()
    except ValidationError as error:
        for fault in error.errors():
            where = ".".join(map(str, fault["loc"]))
            print(f"error: {where}: {fault['msg']}, got {str(fault['input'])[:120]!r}", file=sys.stderr)
        raise typer.Exit(2) from error


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if row[column] is None else str(row[column]) for column in columns))
    Console().print(table)


def _configure_logs(form: str) -> None:
    renderer = (
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)
