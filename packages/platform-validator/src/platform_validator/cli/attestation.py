"""`validator attestation`: explain quotes, and pin what an OS image boots to."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from platform_validator.attestation.explain import MAX_FILE, NothingToExplain, explain, read_quote_file
from platform_validator.attestation.os_image import ImagesFile, ImagesInvalid, Pinned, Shape
from platform_validator.cli.command import (
    FAILED,
    AsJson,
    ConfigFile,
    failed,
    refused,
    settings_of,
    told,
)
from platform_validator.daemon.parts import images_file

attestation = typer.Typer(help="Quotes, and the OS images that are known.", no_args_is_help=True)

_POLL = 0.5
_MARKS = {True: "[green]holds[/]", False: "[red]fails[/]", None: "[yellow]  -  [/]"}


@attestation.command("inspect")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Raw, hex, base64, or dstack's GetQuote JSON")],
    *,
    collateral: Annotated[
        Path | None, typer.Option("--collateral", help="Collateral (dcap-qvl's JSON) to verify it with")
    ] = None,
    compose: Annotated[
        Path | None, typer.Option("--compose", help="The app-compose that it should be of, exactly")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="When it is judged, such as 2026-03-01T00:00:00Z")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a quote; exit 1 when something of it fails. Nothing is asked of the network."""
    now = _moment(at)
    try:
        found = explain(
            read_quote_file(_read(file)),
            now=now,
            collateral=None if collateral is None else _read(collateral).decode("utf-8", "replace"),
            compose=None if compose is None else _read(compose),
        )
    except NothingToExplain as error:
        failed(f"{file}: {error}")
    print(json.dumps(found)) if as_json else _show(found, Console())
    fails = any(one["holds"] is False for one in found["proved"].values())
    raise typer.Exit(FAILED if fails else 0)


@attestation.command("pin")
def pin(
    context: typer.Context,
    *,
    image: Annotated[str, typer.Option("--image", help="The OS image, as the VMM names it")],
    cpu: Annotated[int, typer.Option("--cpu", min=1, help="vCPUs")],
    memory: Annotated[int, typer.Option("--memory", min=1, help="MB")],
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs")] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Boot one CVM of an image at a shape, show what it measures, and make it known: trust on first use."""
    settings = settings_of(context, config)
    asked = {"image": image, "cpu": cpu, "memory_mb": memory, "gpus": gpus}
    found = told(settings, "attestation/pin", asked, as_json=as_json)
    if not as_json:
        print(f"booting one CVM of {image} with {cpu} vCPUs and {memory} MB", file=sys.stderr)
    while found["state"] == "booting":
        time.sleep(_POLL)
        found = told(settings, "attestation/pin", None, as_json=as_json)
    if found["state"] != "measured":
        refused({"error": str(found["error"]), "code": found["state"]}, FAILED, as_json=as_json)
    row = found["pinned"]
    pinned = Pinned(**(row | {"shape": Shape(**row["shape"])}))
    path = images_file(settings)
    if not as_json:
        _show_pinned(pinned, found, Console())
        if not yes:
            typer.confirm(f"Write this to {path}?", abort=True)
    if yes or not as_json:
        try:
            ImagesFile(path).add(pinned)
        except (ImagesInvalid, OSError) as error:
            failed(f"{path}: {error}")
    if as_json:
        print(json.dumps(found | {"written": str(path) if yes else None}))
    else:
        print(f"written to {path}; the running daemon sees it by itself")


def _show_pinned(pinned: Pinned, found: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{escape(pinned.image)}[/] at {pinned.shape}")
    for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "origin"):
        console.print(f"  {name:<12} {escape(getattr(pinned, name))}", soft_wrap=True)
    console.print(f"  {'attestation':<12} {found['attestation']}, TCB {found['tcb_status']}")
    console.print(
        "[yellow]This is trust on first use: the values are what this host shows now. Compare them with what "
        "the image's publisher names, or with another host's, before you rely on them.[/]",
        soft_wrap=True,
    )


def _moment(at: str | None) -> datetime:
    if at is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        failed(f"--at: expected a time such as 2026-03-01T00:00:00Z, got {at[:64]!r}")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        failed(f"{path}: {error.strerror}")


def _show(found: dict[str, Any], console: Console) -> None:
    quote = found["quote"]
    console.print(
        f"[bold]TDX quote[/] version {quote['version']}, TD {quote['td_version']}, "
        f"platform {quote['fmspc']} ({quote['ca']} CA), {found['bytes']} bytes ({found['form']})"
    )
    for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "report_data"):
        console.print(f"  {name:<14} {quote[name]}", soft_wrap=True)
    console.print(f"  {'debug':<14} {'[red]yes: its memory can be read[/]' if quote['debug'] else 'no'}")
    log = found.get("event_log", {})
    for name, value in log.get("identity", {}).items():
        console.print(f"  {name:<14} {escape(str(value))}", soft_wrap=True)
    for name in ("os_image_hash", "image", "cpu_count", "memory_size"):
        if name in found.get("vm_config", {}):
            value = escape(str(found["vm_config"][name]))
            console.print(f"  {name:<14} {value} (vm_config, by its own word)", soft_wrap=True)
    console.print(f"[bold]Proved[/] at {found['judged_at']}")
    if not found["proved"]["signature"]["holds"]:
        console.print("  [yellow]without a signature that holds, all of this is only what the file says[/]")
    for name, one in found["proved"].items():
        check = f" ({one['check']})" if "check" in one else ""
        console.print(f"  {_MARKS[one['holds']]}  {name:<14} {escape(one['detail'])}{check}", soft_wrap=True)
