"""`validator support-bundle`: what somebody needs who is asked for help, in one file, and no secret."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer

from platform_validator.cli import ask
from platform_validator.cli.checks import run_checks
from platform_validator.cli.command import ConfigFile, failed, settings_of
from platform_validator.cli.configuration import rows_of
from platform_validator.cli.known_secrets import KnownSecrets
from platform_validator.config import Settings
from platform_validator.daemon.parts import images_file
from platform_validator.errors import ValidatorError
from platform_validator.telemetry.logging import Directives, configure_logging, redact

_PAGES = ("status", "jobs", "cvms", "hosts", "challenges", "env")
_MAX_LOG = 4 * 1024 * 1024
_MAX_FILES = 2000
_TIMEOUT = 10
_ABSENT = (
    "keys, tokens, passwords and the hotkey; values of challenges and of their environment; submissions,"
    " payloads and results; the journal itself; logs, unless --log names them"
)

Part = Callable[[], bytes]


def support_bundle(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="Where to write it (default: here, named by the time)")
    ] = None,
    *,
    log: Annotated[
        Path | None, typer.Option("--log", help="A log of the daemon's, of which the end goes in")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Gather what helps to find a fault: configuration, pages, checks, versions; never a secret."""
    settings = settings_of(context, config)
    configure_logging(Directives("off"), "people")
    now = datetime.now(UTC)
    path = file or Path(f"validator-support-{now:%Y%m%dT%H%M%SZ}.tar.gz")
    secrets = KnownSecrets.of(settings, os.environ, Path.home())
    members, left_out = gather(_parts(settings, log, config or context.obj), secrets)
    manifest = {
        "made_at": now.isoformat(timespec="seconds"),
        "validator": version_of("platform-validator"),
        "members": {name: len(data) for name, data in members.items()},
        "left_out": left_out,
        "never_in_it": _ABSENT,
    }
    members = {"manifest.json": _json(manifest), **members}
    try:
        _write(path, members)
    except OSError as error:
        failed(f"{path} cannot be written: {error.strerror}")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    print(f"written to {path}: look through it before you give it away")


def gather(parts: Mapping[str, Part], secrets: KnownSecrets) -> tuple[dict[str, bytes], dict[str, str]]:
    """The members by name; and why others were left out: they cannot be had, or would hold a secret."""
    members: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name, part in parts.items():
        try:
            data = part()
        except (ValidatorError, OSError, ValueError) as error:
            left_out[name] = secrets.hidden(f"{type(error).__name__}: {error}"[:500])
            continue
        found = secrets.found_in(data)
        if found:
            # Redaction should have taken it out: nothing else of the same source is trusted.
            left_out[name] = f"it would have held a secret ({', '.join(found)})"
        else:
            members[name] = data
    return members, left_out


def _parts(settings: Settings, log: Path | None, config: Path | None) -> dict[str, Part]:
    folder = settings.db_path.parent
    parts: dict[str, Part] = {
        "versions.json": lambda: _json(_versions()),
        "machine.json": lambda: _json(_machine(folder)),
        "config.json": lambda: _json(rows_of(settings)),
        "checks.json": lambda: _json(
            [
                {"check": one.name, "result": one.result, "detail": one.detail}
                for one in run_checks(dict(os.environ), config, home=Path.home())
            ]
        ),
        "state.json": lambda: _json(_files(folder)),
        "images.toml": images_file(settings).read_bytes,
        "metrics.txt": lambda: _metrics(settings),
    }
    parts |= {f"{page}.json": _page(settings, page) for page in _PAGES}
    if log is not None:
        parts["log.txt"] = lambda: _tail(log)
    return parts


def _page(settings: Settings, page: str) -> Part:
    return lambda: _json(ask.ask(settings, page))


def _json(value: Any) -> bytes:
    """Redacted by the names of its members, as a log is."""
    return json.dumps(dict(redact(None, "", {"shown": value}))["shown"], indent=1, default=str).encode()


def _versions() -> dict[str, Any]:
    return {
        "python": sys.version,
        "system": platform.platform(),
        "distributions": {one.metadata["Name"]: one.version for one in distributions()},
    }


def _machine(folder: Path) -> dict[str, Any]:
    disk = shutil.disk_usage(folder if folder.exists() else "/")
    return {
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "uid": os.getuid(),
        "cgroup": Path("/proc/self/cgroup").read_text(encoding="utf-8").strip(),
    }


def _files(folder: Path) -> list[dict[str, Any]]:
    """The state directory's files: names, sizes and modes, and nothing of what is in them."""
    found = []
    for path in sorted(folder.rglob("*"))[:_MAX_FILES]:
        status = path.lstat()
        found.append(
            {
                "file": str(path.relative_to(folder)),
                "bytes": status.st_size,
                "mode": oct(status.st_mode),
                "uid": status.st_uid,
            }
        )
    return found


def _metrics(settings: Settings) -> bytes:
    host, port = settings["validator.http_listen"]
    where = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    with urllib.request.urlopen(f"http://{where}:{port}/metrics", timeout=_TIMEOUT) as answer:
        return bytes(answer.read())


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - _MAX_LOG))
        return file.read()


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(f"validator-support/{name}")
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
