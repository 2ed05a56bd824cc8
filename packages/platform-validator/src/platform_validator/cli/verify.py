"""`validator verify`: what a receipt proves, offline, for anyone; no daemon, no configuration."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console
from rich.markup import escape

from platform_protocol.ids import Hotkey
from platform_protocol.receipts import ReceiptInvalid, open_receipt
from platform_validator.attestation.os_image import ImagesFile, KnownImages
from platform_validator.attestation.receipt_check import Given, ReceiptCheck, Verdict, check_receipt, summary
from platform_validator.challenges.check import compose_of_folder
from platform_validator.cli.command import AsJson, failed

_MAX = 48 * 1024 * 1024
_TIMEOUT = 30.0
_EXITS = {Verdict.PROVED: 0, Verdict.REFUTED: 1, Verdict.NOT_CHECKABLE: 3}
_MARKS = {
    Verdict.PROVED: "[green]proved       [/]",
    Verdict.REFUTED: "[red]REFUTED      [/]",
    Verdict.NOT_CHECKABLE: "[yellow]not checkable[/]",
}
_IMAGE = re.compile(r'"image":"([^"]+@sha256:[0-9a-f]{64})"')


def verify(
    receipt: Annotated[
        str, typer.Argument(metavar="FILE|URL", help="The receipt: a file, or /jobs/{id}/receipt")
    ],
    *,
    validator: Annotated[
        str | None, typer.Option("--validator", help="The hotkey that must have signed")
    ] = None,
    submission: Annotated[
        Path | None, typer.Option("--submission", help="The submission, as it was uploaded")
    ] = None,
    tree: Annotated[Path | None, typer.Option("--tree", help="The challenge's tree at its commit")] = None,
    collateral: Annotated[
        Path | None, typer.Option("--collateral", help="The platform's collateral (dcap-qvl's JSON)")
    ] = None,
    simulated_root: Annotated[
        Path | None, typer.Option("--simulated-root", help="A simulated root (PEM) that you trust")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="The OS images that you trust (as attestation.images_file)"),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="When it is judged, such as 2026-03-01T00:00:00Z")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a receipt; exit 0: all proved, 1: something refuted, 3: something cannot be checked."""
    envelope = _envelope(_bytes(receipt))
    given = Given(
        now=_moment(at),
        validator=None if validator is None else Hotkey(validator),
        compose=None if tree is None else _compose(tree, envelope),
        collateral=None if collateral is None else _collateral(collateral),
        root=None if simulated_root is None else _root(simulated_root),
        images=None if images is None else _images(images),
        submission=None if submission is None else _digest(submission),
    )
    checks = check_receipt(envelope, given)
    verdict = summary(checks)
    if as_json:
        shown = [{"check": one.name, "verdict": one.verdict.value, "detail": one.detail} for one in checks]
        print(json.dumps({"verdict": verdict.value, "checks": shown}))
    else:
        _show(checks, verdict, Console())
    raise typer.Exit(_EXITS[verdict])


def _show(checks: list[ReceiptCheck], verdict: Verdict, console: Console) -> None:
    for one in checks:
        console.print(f"{_MARKS[one.verdict]} {one.name:<10} {escape(one.detail)}", soft_wrap=True)
    console.print(f"[bold]{verdict.value.replace('_', ' ')}[/]")


def _bytes(where: str) -> bytes:
    try:
        if where.startswith(("http://", "https://")):
            with urllib.request.urlopen(where, timeout=_TIMEOUT) as answer:  # noqa: S310 - http(s), as asked
                return bytes(answer.read(_MAX))
        with Path(where).open("rb") as file:
            return file.read(_MAX)
    except (OSError, ValueError, urllib.error.URLError) as error:
        failed(f"{where} cannot be read: {error}")


def _envelope(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        failed(f"expected a receipt as JSON: {error}")
    if isinstance(found, dict) and isinstance(found.get("receipt"), dict):
        found = found["receipt"]
    if not isinstance(found, dict):
        failed("expected a receipt (a DSSE envelope), or a result with one")
    return found


def _compose(tree: Path, envelope: dict[str, Any]) -> bytes:
    try:
        runtime = _IMAGE.search(open_receipt(envelope).facts.app_compose.replace('\\"', '"'))
    except ReceiptInvalid:
        return b""
    made = compose_of_folder(tree, runtime[1] if runtime is not None else "")
    if isinstance(made, str):
        failed(f"{tree} makes no app-compose: {made}")
    return made


def _collateral(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        failed(f"{path} is no collateral: {error}")
    # As the validator's own cache keeps it.
    if isinstance(found, dict) and isinstance(found.get("collateral"), dict):
        found = found["collateral"]
    return json.dumps(found)


def _root(path: Path) -> bytes:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)
    except (OSError, ValueError, x509.InvalidVersion) as error:
        failed(f"{path} is no certificate: {error}")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        failed(f"{path} cannot be read: {error.strerror}")


def _images(path: Path) -> KnownImages:
    known = ImagesFile(path).known()
    if known.fault is not None or not path.exists():
        failed(known.fault or f"{path} does not exist")
    return known


def _moment(at: str | None) -> datetime:
    if at is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        failed(f"--at: expected a time such as 2026-03-01T00:00:00Z, got {at[:64]!r}")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
