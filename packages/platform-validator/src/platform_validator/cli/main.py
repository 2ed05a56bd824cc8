"""`validator` and its commands. Bare `validator` is `validator run`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from platform_protocol.signing import Keypair
from platform_validator.cli import ask, show
from platform_validator.config import OPTIONS, ConfigFaults, Settings, load_settings
from platform_validator.errors import ValidatorError
from platform_validator.keys import find_hotkey
from platform_validator.telemetry.logging import BadDirectives, Directives, configure_logging

app = typer.Typer(help="The Platform Validator.", invoke_without_command=True, add_completion=False)
config_group = typer.Typer(help="The configuration.", no_args_is_help=True)
jobs_group = typer.Typer(help="Jobs.", no_args_is_help=True)
cvms_group = typer.Typer(help="CVMs.", no_args_is_help=True)
challenges_group = typer.Typer(help="Challenges.", no_args_is_help=True)
for name, group in (
    ("config", config_group),
    ("jobs", jobs_group),
    ("cvms", cvms_group),
    ("challenges", challenges_group),
):
    app.add_typer(group, name=name)

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The configuration file")]
_CONFIGURATION = 2
_FAILED = 1


@app.callback()
def root(
    context: typer.Context,
    *,
    config: ConfigFile = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version")] = False,
) -> None:
    """Run the daemon, or one of the commands."""
    context.obj = config
    if version:
        print(version_of("platform-validator"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        run(context)


@app.command()
def run(context: typer.Context, *, config: ConfigFile = None) -> None:
    """Run the daemon until SIGTERM."""
    settings = _settings(config or context.obj)
    keypair = _keypair(settings)
    try:
        directives = Directives(settings["validator.log"])
    except BadDirectives as error:
        _fail(f"validator.log: {error}")
    configure_logging(directives, settings["validator.log_format"])
    from platform_validator.daemon import run as run_daemon  # noqa: PLC0415 - commands start fast without it

    raise typer.Exit(run_daemon(settings, keypair))


@app.command()
def check(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Check everything that the daemon needs; exit 1 when something fails."""
    from platform_validator.cli.checks import run_checks  # noqa: PLC0415 - as above

    configure_logging(Directives("off"), "people")
    found = run_checks(dict(os.environ), config or context.obj, home=Path.home())
    if as_json:
        print(json.dumps([{"check": one.name, "result": one.result, "detail": one.detail} for one in found]))
    else:
        show.checks(found, Console())
    raise typer.Exit(_FAILED if any(one.result == "fail" for one in found) else 0)


@app.command()
def status(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the daemon is doing, and what is wrong."""
    found = _ask(_settings(config or context.obj), "status")
    print(json.dumps(found)) if as_json else show.status(found, Console())


@jobs_group.command("list")
def list_jobs(
    context: typer.Context,
    *,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """The newest claims: stage, outcome, reason."""
    found = _ask(_settings(config or context.obj), f"jobs?limit={limit}")
    print(json.dumps(found)) if as_json else show.jobs(found, Console())


@cvms_group.command("list")
def list_cvms(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every CVM of ours that is not gone."""
    found = _ask(_settings(config or context.obj), "cvms")
    print(json.dumps(found)) if as_json else show.cvms(found, Console())


@challenges_group.command("list")
def list_challenges(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every challenge: state, commit, reason."""
    found = _ask(_settings(config or context.obj), "challenges")
    print(json.dumps(found)) if as_json else show.challenges(found, Console())


@config_group.command("show")
def show_config(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Every setting, and where its value came from."""
    settings = _settings(config or context.obj)
    rows: list[dict[str, Any]] = []
    for option in OPTIONS:
        origin = settings.origins[option.key]
        value = None if origin.value is None else "(secret)" if option.secret else origin.value
        rows.append(
            {
                "setting": option.key,
                "value": list(value) if isinstance(value, tuple) else getattr(value, "value", value),
                "from": origin.where,
                "meaning": option.meaning + (" (read, not in force yet)" if option.later else ""),
            }
        )
    print(json.dumps(rows)) if as_json else show.config(rows, Console())


def main() -> None:
    """Entry point."""
    app()


def _settings(config: Path | None) -> Settings:
    try:
        return load_settings(dict(os.environ), flag_file=config)
    except ConfigFaults as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        raise typer.Exit(_CONFIGURATION) from error


def _keypair(settings: Settings) -> Keypair:
    file = settings["keys.hotkey_file"]
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    try:
        return find_hotkey(
            settings["validator.hotkey"],
            passphrase=settings["keys.passphrase"],
            hotkey_file=Path(file) if file else None,
            home=Path.home(),
            credentials=Path(credentials) if credentials else None,
        )
    except ValidatorError as error:
        _fail(str(error))


def _ask(settings: Settings, path: str) -> Any:
    try:
        return ask.ask(settings, path)
    except ValidatorError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(_CONFIGURATION)
