"""`platform-api admin challenges`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from platform_api.challenges import (
    ChallengeChange,
    NewChallenge,
    add_challenge,
    change_challenge,
    list_challenges,
    remove_challenge,
)
from platform_api.cli.console import AsJson, DatabaseUrl, checked, fail, say, show, with_database
from platform_api.clock import show_times
from platform_api.database import Database

group = typer.Typer(help="Challenges.", no_args_is_help=True)

Jobs = Annotated[
    Path | None,
    typer.Option(help="A JSON file: the list of {job_name, payload, priority, timeout_s} of a submission"),
]
ComposeHash = Annotated[str | None, typer.Option(help="The published compose hash, 64 hex digits")]
Share = Annotated[float | None, typer.Option(help="Share of the emission, 0 to 1")]


@group.command("add")
def new_challenge(
    *,
    name: Annotated[str, typer.Option()],
    repo: Annotated[str, typer.Option(help="owner/name on GitHub, or a URL")],
    commit: Annotated[str, typer.Option(help="40 or 64 hex digits")],
    cpu: Annotated[int, typer.Option(help="Cores a job")] = 1,
    memory_mb: Annotated[int, typer.Option()] = 512,
    disk_mb: Annotated[int, typer.Option()] = 1024,
    gpus: Annotated[int, typer.Option()] = 0,
    timeout_s: Annotated[int, typer.Option()] = 3600,
    compose_hash: ComposeHash = None,
    mechanism_id: Annotated[int, typer.Option()] = 0,
    emission_share: Share = None,
    jobs: Jobs = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Add a challenge; connected validators are told."""
    given = {
        "name": name,
        "github_repo": repo,
        "github_commit": commit,
        "timeout_s": timeout_s,
        "mechanism_id": mechanism_id,
        "resources": {"cpu_cores": cpu, "memory_mb": memory_mb, "disk_mb": disk_mb, "gpu_count": gpus},
    }
    given |= _given(compose_hash=compose_hash, emission_share=emission_share, jobs=_templates(jobs))
    new = checked(NewChallenge, given)

    async def work(database: Database) -> dict[str, Any]:
        async with database.write() as connection:
            return await add_challenge(connection, new)

    made = show_times(with_database(database_url, work))
    say(made, f"added {made['name']} as {made['id']}", as_json=as_json)


@group.command("update")
def update_challenge(
    challenge_id: str,
    *,
    commit: Annotated[str | None, typer.Option(help="40 or 64 hex digits")] = None,
    repo: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option()] = None,
    status: Annotated[str | None, typer.Option(help="active or paused")] = None,
    timeout_s: Annotated[int | None, typer.Option()] = None,
    compose_hash: ComposeHash = None,
    emission_share: Share = None,
    jobs: Jobs = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Change a challenge; connected validators are told."""
    given = _given(
        github_commit=commit,
        github_repo=repo,
        name=name,
        status=status,
        timeout_s=timeout_s,
        compose_hash=compose_hash,
        emission_share=emission_share,
        jobs=_templates(jobs),
    )
    change = checked(ChallengeChange, given)

    async def work(database: Database) -> dict[str, Any]:
        async with database.write() as connection:
            return await change_challenge(connection, challenge_id, change)

    changed = show_times(with_database(database_url, work))
    say(changed, f"changed {challenge_id}", as_json=as_json)


@group.command("remove")
def take_off(challenge_id: str, *, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Take a challenge off the list; its results stay."""

    async def work(database: Database) -> None:
        async with database.write() as connection:
            await remove_challenge(connection, challenge_id)

    with_database(database_url, work)
    say({"id": challenge_id, "status": "removed"}, f"removed {challenge_id}", as_json=as_json)


@group.command("list")
def show_challenges(*, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show every challenge."""

    async def work(database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            return [show_times(row) for row in await list_challenges(connection, active_only=False)]

    columns = ("id", "name", "status", "github_repo", "github_commit")
    show(with_database(database_url, work), columns, as_json=as_json)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _templates(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        fail(f"--jobs {path}: expected a JSON file: {error}")
