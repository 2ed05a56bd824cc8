"""`validator` and its commands. Bare `validator` is `validator run`."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer
from rich.console import Console

from platform_protocol.signing import Keypair
from platform_validator.cli import ask, show, tell
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
_NO_DAEMON = 3
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
    path = config or context.obj
    settings = _settings(path)
    keypair = _keypair(settings)
    try:
        directives = Directives(settings["validator.log"])
    except BadDirectives as error:
        _fail(f"validator.log: {error}")
    configure_logging(directives, settings["validator.log_format"])
    from platform_validator.daemon import run as run_daemon  # noqa: PLC0415 - commands start fast without it

    def reread() -> Settings:
        return load_settings(dict(os.environ), flag_file=path)

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
    raise typer.Exit(_FAILED if any(one.result == "fail" for one in found) else 0)


@app.command()
def status(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """What the daemon is doing, and what is wrong."""
    found = _ask(_settings(config or context.obj), "status")
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
    settings = _settings(config or context.obj)
    begun = _tell(settings, "status", None, as_json=as_json) if wait else {}
    found = _tell(settings, "drain", {"hurry": hurry}, as_json=as_json)
    if wait:
        ended = _wait(settings, begun.get("pid"), found["within_s"] + _GRACE, as_json=as_json)
        found = {"phase": "ended", "seconds": round(ended.seconds, 1), **ended.left}
    print(json.dumps(found)) if as_json else show.drain(found, Console())


@app.command()
def reload(context: typer.Context, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Have the daemon read its configuration anew; say what applies now and what waits for a restart."""
    found = _tell(_settings(config or context.obj), "reload", {}, as_json=as_json)
    print(json.dumps(found)) if as_json else show.reloaded(found, Console())


@jobs_group.command("cancel")
def cancel_job(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job's id")],
    *,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """End a job that runs here: it is given back, and another validator may claim it."""
    settings = _settings(config or context.obj)
    found = _tell(settings, f"jobs/{quote(job_id, safe='')}/cancel", {}, as_json=as_json)
    print(json.dumps(found) if as_json else f"job {job_id} is being cancelled: validator jobs list")


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


@cvms_group.command("reclaim")
def reclaim_cvms(
    context: typer.Context,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Destroy VMs that carry our state id and are not in our journal: a restored backup leaves such."""
    settings = _settings(config or context.obj)
    strays = _tell(settings, "status", None, as_json=as_json).get("strays", [])
    if not yes and as_json:
        print(json.dumps({"strays": strays, "reclaiming": [], "remedy": "--yes destroys them"}))
        return
    if strays and not yes:
        print("\n".join(strays))
        typer.confirm(f"Destroy {len(strays)} VMs that the journal does not know?", abort=True)
    found = _tell(settings, "cvms/reclaim", {"names": strays}, as_json=as_json)
    begun = len(found["reclaiming"])
    print(json.dumps(found) if as_json else f"{begun} VMs are being destroyed: validator cvms list")


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
                "reloads": option.reloads,
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


def _tell(settings: Settings, path: str, body: dict[str, Any] | None, *, as_json: bool) -> dict[str, Any]:
    """Ask the running daemon; without a body only for what it shows."""
    try:
        return tell.tell(settings, path, body)
    except tell.Refused as error:
        code = _CONFIGURATION if error.reply.body.get("code") == "invalid" else _FAILED
        _refused(error.reply.body, code, as_json=as_json)
    except (tell.NoDaemon, ask.DaemonSilent) as error:
        _refused({"error": str(error), "code": "no_daemon"}, _NO_DAEMON, as_json=as_json)
    except ValidatorError as error:
        _fail(str(error))


def _wait(settings: Settings, pid: int | None, patience: float, *, as_json: bool) -> tell.Ended:
    try:
        return tell.wait_until_ended(
            settings, pid, lambda line: print(line, file=sys.stderr, flush=True), patience=patience
        )
    except ValidatorError as error:
        _refused({"error": str(error), "code": "not_ended"}, _FAILED, as_json=as_json)


def _refused(body: dict[str, Any], code: int, *, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps(body))
    print(f"error: {body['error']}", file=sys.stderr)
    for fault in body.get("faults", []):
        print(f"error: {fault}", file=sys.stderr)
    raise typer.Exit(code)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(_CONFIGURATION)
