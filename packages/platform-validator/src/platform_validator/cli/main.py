"""`validator` and its commands. Bare `validator` is `validator run`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from platform_protocol.signing import Keypair
from platform_validator.cli import show, tell
from platform_validator.cli.attestation import attestation
from platform_validator.cli.challenges import challenges
from platform_validator.cli.command import (
    FAILED,
    AsJson,
    ConfigFile,
    asked,
    failed,
    refused,
    settings_of,
    told,
)
from platform_validator.cli.configuration import configuration
from platform_validator.cli.cvms import cvms
from platform_validator.cli.env import env
from platform_validator.cli.hosts import hosts
from platform_validator.cli.jobs import jobs
from platform_validator.cli.support_bundle import support_bundle
from platform_validator.cli.values import values
from platform_validator.cli.verify import verify
from platform_validator.cli.vmm import vmm
from platform_validator.config import OPTIONS, Settings, load_settings
from platform_validator.errors import ValidatorError
from platform_validator.keys import find_hotkey
from platform_validator.memory_guard import guard_memory
from platform_validator.telemetry.logging import BadDirectives, Directives, configure_logging

app = typer.Typer(
    help="The Platform Validator.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals are where secrets are
)
app.add_typer(configuration, name="config")
app.add_typer(jobs, name="jobs")
app.add_typer(cvms, name="cvms")
app.add_typer(hosts, name="hosts")
app.add_typer(challenges, name="challenges")
app.add_typer(env, name="env")
app.add_typer(values, name="values")
app.command()(verify)
app.command("support-bundle")(support_bundle)
app.add_typer(attestation, name="attestation")
app.add_typer(vmm, name="vmm")

_GRACE = 30.0


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
    guard_memory()
    path = config or context.obj
    settings = settings_of(context, config)
    keypair = _keypair(settings)
    try:
        directives = Directives(settings["validator.log"])
    except BadDirectives as error:
        failed(f"validator.log: {error}")
    configure_logging(directives, settings["validator.log_format"])
    from platform_validator.daemon import run as run_daemon  # noqa: PLC0415 - commands start fast without it

    environment = dict(os.environ)
    for option in OPTIONS:
        if option.secret:
            # Nothing that is started from here has it in its environment.
            for name in option.env:
                os.environ.pop(name, None)

    def reread() -> Settings:
        return load_settings(environment, flag_file=path)

    raise typer.Exit(run_daemon(settings, keypair, reread=reread))


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
    raise typer.Exit(FAILED if any(one.result == "fail" for one in found) else 0)


@app.command()
def status(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the daemon is doing, and what is wrong."""
    found = asked(settings_of(context, config), "status")
    print(json.dumps(found)) if as_json else show.status(found, Console())


@app.command()
def drain(
    context: typer.Context,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the daemon has ended")] = False,
    hurry: Annotated[bool, typer.Option("--hurry", help="Cancel what runs and give it back")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Have the daemon claim no more, finish what runs, and end."""
    settings = settings_of(context, config)
    begun = told(settings, "status", None, as_json=as_json) if wait else {}
    found = told(settings, "drain", {"hurry": hurry}, as_json=as_json)
    if wait:
        ended = _wait(settings, begun.get("pid"), found["within_s"] + _GRACE, as_json=as_json)
        found = {"phase": "ended", "seconds": round(ended.seconds, 1), **ended.left}
    print(json.dumps(found)) if as_json else show.drain(found, Console())


@app.command()
def reload(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Have the daemon read its configuration anew; say what applies now and what waits for a restart."""
    found = told(settings_of(context, config), "reload", {}, as_json=as_json)
    print(json.dumps(found)) if as_json else show.reloaded(found, Console())


def main() -> None:
    """Entry point."""
    app()


def _keypair(settings: Settings) -> Keypair:
    file = settings["keys.hotkey_file"]
    credentials, password_file = os.environ.get("CREDENTIALS_DIRECTORY"), settings["keys.password_file"]
    try:
        return find_hotkey(
            settings["validator.hotkey"],
            passphrase=settings["keys.passphrase"],
            hotkey_file=Path(file) if file else None,
            home=Path.home(),
            credentials=Path(credentials) if credentials else None,
            password_file=Path(password_file) if password_file else None,
        )
    except ValidatorError as error:
        failed(str(error))


def _wait(settings: Settings, pid: int | None, patience: float, *, as_json: bool) -> tell.Ended:
    try:
        return tell.wait_until_ended(
            settings, pid, lambda line: print(line, file=sys.stderr, flush=True), patience=patience
        )
    except ValidatorError as error:
        refused({"error": str(error), "code": "not_ended"}, FAILED, as_json=as_json)
