"""`validator vmm`: judges a VMM by what its version of dstack is documented to do."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from platform_validator.cli.command import CONFIGURATION, FAILED
from platform_validator.config.parse import vmm_url
from platform_validator.cvm.dstack.bench import Deviation, bench_of
from platform_validator.cvm.dstack.judge import Finding, Verdict, all_checks, judge
from platform_validator.cvm.vmm import VmmError

vmm = typer.Typer(help="The VMM.", no_args_is_help=True)


@vmm.callback()
def group() -> None:
    """Commands for the VMM."""


@vmm.command("conformance")
def conformance(
    *,
    url: Annotated[str, typer.Option(help="The VMM: http, https or unix:", envvar="DSTACK_VMM_URL")],
    image: Annotated[str, typer.Option(help="The image of which VMs are made")],
    start: Annotated[bool, typer.Option("--start", help="VMs may be started as well")] = False,
    first_port: Annotated[int, typer.Option(help="VMs get host ports from here on, 200 at most")] = 19_000,
) -> None:
    """Check a VMM against the documented behaviour of its version; exit 1 when it deviates.

    Makes only stopped VMs, unless --start is given, and removes all that it made. Credentials come from
    DSTACK_VMM_TOKEN, or DSTACK_VMM_AUTH_USER and DSTACK_VMM_AUTH_PASSWORD. The last line of stdout is JSON.
    """
    try:
        vmm_url(url)
    except ValueError as error:
        print(f"error: --url: {error}", file=sys.stderr)
        raise typer.Exit(CONFIGURATION) from error
    progress = _Progress(Console(stderr=True))
    try:
        verdict = asyncio.run(_judge(url, image, progress, start=start, first_port=first_port))
    except (VmmError, Deviation) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(CONFIGURATION) from error
    print(json.dumps(verdict.summary()))
    raise typer.Exit(FAILED if verdict.count("deviation") else 0)


async def _judge(url: str, image: str, progress: _Progress, *, start: bool, first_port: int) -> Verdict:
    credentials = {
        "token": os.environ.get("DSTACK_VMM_TOKEN") or None,
        "user": os.environ.get("DSTACK_VMM_AUTH_USER") or None,
        "password": os.environ.get("DSTACK_VMM_AUTH_PASSWORD") or None,
    }
    async with bench_of(url, image=image, start=start, first_port=first_port, **credentials) as bench:
        with progress:
            return await judge(bench, progress.tell)


class _Progress:
    """A status line where somebody watches; a line for each check that is not ok, everywhere."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("checking") if console.is_terminal else None
        self._total = len(all_checks())
        self._done = 0

    def __enter__(self) -> None:
        if self._status is not None:
            self._status.start()

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, finding: Finding) -> None:
        """One more."""
        self._done += 1
        if self._status is not None:
            self._status.update(f"{self._done} of {self._total}: {finding.check}")
        if finding.outcome != "ok":
            print(f"{finding.outcome}: {finding.check}: {' '.join(finding.detail.split())[:500]}", flush=True)
