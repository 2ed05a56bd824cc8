"""The command line: `serve`, and `admin` on the database directly, beside a running server.

An admin command writes the same rows as the server, and the server looks for changes every half second:
what the command line changed is pushed to connected validators too.
"""

from __future__ import annotations

import typer

from platform_api.cli import challenges, jobs, tokens, validators
from platform_api.cli.serve import serve

__all__ = ["app", "main"]

app = typer.Typer(
    help="The control plane: challenges, job queue, results, push.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
admin = typer.Typer(help="Administration, on the database directly.", no_args_is_help=True)
app.command()(serve)
app.add_typer(admin, name="admin")
admin.command("init")(tokens.init)
admin.add_typer(tokens.group, name="tokens")
admin.add_typer(validators.group, name="validators")
admin.add_typer(challenges.group, name="challenges")
admin.add_typer(jobs.group, name="jobs")


def main() -> None:
    """Entry point."""
    app()
