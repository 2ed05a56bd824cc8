"""Where secrets are looked for: files, pages, commands, and what the kernel shows of processes."""

from __future__ import annotations

import base64
import json
import resource
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from examples.demo.stack import Stack
from examples.demo.unix_http import TIMEOUT, UnixConnection

_COMMANDS = (
    ("status", "--json"),
    ("config", "show", "--json"),
    ("jobs", "list", "--json"),
    ("cvms", "list", "--json"),
    ("challenges", "list", "--json"),
    ("values", "list", "--json"),
    ("check", "--json"),
)
_OPERATORS = ("status", "jobs", "cvms", "challenges", "hosts", "env")


@dataclass(frozen=True, slots=True)
class Canary:
    """A secret, and where it belongs: files below one of `home`, environments of processes so named."""

    name: str
    secret: bytes
    home: tuple[Path, ...] = ()
    environments: frozenset[str] = frozenset()

    def forms(self) -> tuple[bytes, ...]:
        """As it is, in hex, in base64."""
        return self.secret, self.secret.hex().encode(), base64.b64encode(self.secret).rstrip(b"=")


@dataclass(slots=True)
class Search:
    """What was looked at, and what was found: (canary, place)."""

    canaries: list[Canary]
    places: int = 0
    size: int = 0
    found: list[tuple[str, str]] = field(default_factory=list)

    def look(self, place: str, data: bytes, *, path: Path | None = None, environ: str | None = None) -> None:
        """One place."""
        self.places += 1
        self.size += len(data)
        for canary in self.canaries:
            if path is not None and any(path.is_relative_to(home) for home in canary.home):
                continue
            if environ is not None and environ in canary.environments:
                continue
            if any(form in data for form in canary.forms()):
                self.found.append((canary.name, place))


def search_files(search: Search, folder: Path) -> None:
    """Every file of the run."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            try:
                search.look(str(path.relative_to(folder)), path.read_bytes(), path=path)
            except OSError:
                continue


def search_pages(search: Search, stack: Stack) -> None:
    """Every page that somebody may open."""
    guests = f"http://127.0.0.1:{stack.validator.guest_port}"
    urls = [f"{guests}/{page}" for page in ("health", "health/live", "metrics")]
    urls += [f"{stack.base}/{page}" for page in ("health", "version", "metrics", "openapi.json")]
    for job in stack.jobs():
        urls.append(f"{stack.base}/jobs/{job['id']}/receipt")
        urls += [
            f"{stack.base}/challenges/{job['challenge_id']}/{page}" for page in ("leaderboard", "results")
        ]
    for url in sorted(set(urls)):
        search.look(url, _get(url))
    for page in _OPERATORS:
        connection = UnixConnection(stack.validator.folder / "validator.sock")
        try:
            connection.request("GET", f"/api/v1/{page}")
            search.look(f"/api/v1/{page}", connection.getresponse().read())
        finally:
            connection.close()


def search_commands(search: Search, stack: Stack) -> None:
    """What the command line prints."""
    for words in _COMMANDS:
        done = stack.validator_command(*words)
        search.look(f"validator {' '.join(words)}", (done.stdout + done.stderr).encode())


def search_support_bundle(search: Search, stack: Stack, folder: Path) -> None:
    """Every member of a support bundle, the daemon's log among them; none was left out for a secret."""
    path = folder / "support.tar.gz"
    logs = sorted((stack.state / "logs").glob("validator*"))
    done = stack.validator_command("support-bundle", str(path), "--log", str(logs[-1]))
    search.look("validator support-bundle", (done.stdout + done.stderr).encode())
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            data = content.read() if content is not None else b""
            search.look(f"support bundle: {member.name}", data)
            if member.name.endswith("manifest.json"):
                left_out = json.loads(data)["left_out"]
                search.found += [(why, name) for name, why in left_out.items() if "secret" in why]
    path.unlink()


def search_processes(search: Search, names: Mapping[int, str]) -> None:
    """The command line and the environment of every process of this machine. `names`: of ours, by pid."""
    for process in psutil.process_iter():
        for what in ("cmdline", "environ"):
            try:
                data = Path(f"/proc/{process.pid}/{what}").read_bytes()
            except OSError:
                continue
            ours = names.get(process.pid, "another")
            search.look(f"{what} of {process.name()}", data, environ=ours if what == "environ" else None)


def core_limit(pid: int) -> int:
    """What a crash may leave, bytes; a handler of crashes is stopped by a limit of 1 alone."""
    limit = resource.prlimit(pid, resource.RLIMIT_CORE)[0]
    return 0 if limit == 1 else max(limit, 1)


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310 - our own loopback URLs
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        return error.read()


def launch_secrets(vmm: Path) -> Iterator[bytes]:
    """Of every VM that the VMM has now, out of its user_config."""
    for path in vmm.glob("vms/*/vm.json"):
        text = path.read_text()
        _, _, rest = text.partition("launch_secret")
        secret = rest.lstrip('\\": ').partition("\\")[0].partition('"')[0]
        if secret:
            yield secret.encode()
