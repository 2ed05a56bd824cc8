"""The git client on an untrusted repository: a subprocess without hooks, prompts or configuration, limited.

Nothing is ever checked out, so that no hook, filter or attribute of a tree is in force. Each command runs
under rlimits and a deadline of its own (`prlimit`, `timeout`), which hold even when the validator is gone;
while it runs, a watcher ends it once its folder has grown over the limit.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from platform_validator.challenges.source import SourceError

_MIB = 1024 * 1024
_LOOK_FIRST, _LOOK_EVERY = 0.005, 0.1
_ENDS_WITHIN = 10.0
_SAID = 500
_BLOCK = 4096
_MEMORY = 2048 * _MIB
_PROXIES = ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")

# What git says (LC_ALL=C), and the stable word for it: the first that is found.
_WORDS: tuple[tuple[str, str, bool], ...] = (
    ("not our ref", "commit_not_found", False),
    ("unadvertised object", "commit_not_found", False),
    ("remote error: want", "commit_not_found", False),
    ("out of memory", "repository_too_large", False),
    ("fsck error", "tree_refused", True),
    ("bad tree", "tree_refused", True),
    ("returned error: 30", "repository_moved", False),
    ("could not read username", "repository_not_found", False),
    ("authentication failed", "repository_not_found", False),
    ("not found", "repository_not_found", False),
    ("does not exist", "repository_not_found", False),
    ("does not appear to be a git repository", "repository_not_found", False),
    ("returned error: 40", "repository_not_found", False),
    ("permission denied", "repository_not_found", False),
    ("could not resolve host", "git_unreachable", False),
    ("couldn't connect", "git_unreachable", False),
    ("failed to connect", "git_unreachable", False),
    ("connection refused", "git_unreachable", False),
    ("timed out", "git_unreachable", False),
    ("transfer closed", "git_unreachable", False),
    ("hung up unexpectedly", "git_unreachable", False),
    ("early eof", "git_unreachable", False),
    ("returned error: 5", "git_unreachable", False),
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files that the operator gives git, readable by the validator alone.

    `https`: lines `https://user:token@host` (git's credential-store format); `ssh_key`: a private key
    without passphrase; `known_hosts`: whom ssh trusts.
    """

    https: Path | None = None
    ssh_key: Path | None = None
    known_hosts: Path | None = None


@dataclass(frozen=True, slots=True)
class Git:
    """Runs git in a folder of its own.

    Attributes:
        folder: Holds the repository, and what git writes; 0700.
        allow: Schemes beside https (and http on loopback): `ssh`, `file`.
        max_bytes: Of everything in the folder.
        deadline: Of one command.
        credentials: Sent only where the URL's host is theirs.
    """

    folder: Path
    allow: frozenset[str]
    max_bytes: int
    deadline: timedelta
    credentials: Credentials = field(default_factory=Credentials)

    async def run(
        self, *arguments: str, repo: bool = True, given: Path | None = None, max_file: int = _MIB
    ) -> Path:
        """Run one git command; returns the file that has its output.

        Args:
            arguments: Of git, without its global options.
            repo: Whether it is about the folder's repository.
            given: What it reads from stdin.
            max_file: Bytes of the largest file that it may write, its output among them.

        Raises:
            SourceError: `git_failed`, `git_timed_out`, `git_unreachable`, `repository_too_large`,
                `repository_not_found`, `commit_not_found`, `tree_refused`, `credentials_refused`.
            OSError: The folder cannot be written, or git is not installed.
        """
        began = time.monotonic()
        process = self._start(arguments, repo=repo, given=given or Path(os.devnull), max_file=max_file)
        try:
            await self._watch(process, arguments[0])
        finally:
            await _end(process)
        if process.returncode == 0:
            return self._file("out", arguments[0])
        in_time = time.monotonic() - began < self.deadline.total_seconds()
        raise self._failure(process.returncode, arguments[0], max_file, in_time=in_time)

    def _start(
        self, arguments: tuple[str, ...], *, repo: bool, given: Path, max_file: int
    ) -> subprocess.Popen[bytes]:
        """Not asyncio's: a cancellation while that one starts a process leaves its children behind."""
        argv = [*self._limits(max_file), "git", *self._options(repo=repo), *arguments]
        with (
            given.open("rb") as stdin,
            self._file("out", arguments[0]).open("wb") as stdout,
            self._file("err", arguments[0]).open("wb") as stderr,
        ):
            try:
                return subprocess.Popen(
                    argv,
                    cwd=self.folder,
                    env=self._environment(),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                missing = "git, prlimit (util-linux) and timeout (coreutils) must be installed"
                raise SourceError("git_failed", f"{missing}: {error.strerror}") from error

    def _file(self, kind: str, command: str) -> Path:
        return self.folder / f"{kind}-{command}"

    async def _watch(self, process: subprocess.Popen[bytes], command: str) -> None:
        pause = _LOOK_FIRST
        while process.poll() is None:
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LOOK_EVERY)
            size = await asyncio.to_thread(_size, self.folder)
            if size > self.max_bytes:
                raise SourceError(
                    "repository_too_large",
                    f"git {command} was ended: expected at most {self.max_bytes} bytes, {size} came",
                )

    def _failure(self, code: int, command: str, max_file: int, *, in_time: bool) -> SourceError:
        said = printable(self._file("err", command).read_bytes()[-_SAID:].decode(errors="replace"))
        low = said.lower()
        if _ended_by(signal.SIGKILL, code) and not in_time:
            return SourceError(
                "git_timed_out", f"git {command} was not done within {self.deadline.total_seconds():.0f} s"
            )
        # A child of git's that was ended at the limit leaves its file, and git names another reason.
        if _ended_by(signal.SIGXFSZ, code) or "file too large" in low or _size(self.folder) >= max_file:
            return SourceError("repository_too_large", f"git {command} wrote a file of over {max_file} bytes")
        for words, reason, lasting in _WORDS:
            if words in low:
                told = "git's check of the tree" if reason == "tree_refused" else f"git {command}"
                return SourceError(reason, f"{told} failed: {said}", lasting=lasting)
        return SourceError("git_failed", f"git {command} failed (exit {code}): {said}")

    def _limits(self, max_file: int) -> list[str]:
        limits = [f"--fsize={max_file}", f"--as={_MEMORY}", "--core=0"]
        return ["prlimit", *limits, "timeout", "--signal=KILL", f"{self.deadline.total_seconds():.3f}"]

    def _options(self, *, repo: bool) -> list[str]:
        settings = [
            "core.hooksPath=/dev/null",
            "core.fsmonitor=false",
            "core.attributesFile=/dev/null",
            "core.bigFileThreshold=8m",
            "core.packedGitWindowSize=16m",
            "core.packedGitLimit=256m",
            "protocol.allow=never",
            "protocol.https.allow=always",
            "protocol.http.allow=always",
            *(f"protocol.{scheme}.allow=always" for scheme in sorted(self.allow & {"ssh", "file"})),
            "fetch.fsckObjects=true",
            "fetch.unpackLimit=1",
            "fetch.recurseSubmodules=false",
            "pack.threads=1",
            "gc.auto=0",
            "maintenance.auto=false",
            "http.followRedirects=false",
            "http.lowSpeedLimit=1000",
            "http.lowSpeedTime=30",
            "transfer.credentialsInUrl=die",
            "credential.helper=",
            *self._helper(),
        ]
        options = [part for setting in settings for part in ("-c", setting)]
        return [*options, *(("--git-dir", str(self.folder / "repo")) if repo else ())]

    def _helper(self) -> list[str]:
        """Reads the operator's file; git's own `store` would also erase from it what a server refuses."""
        if self.credentials.https is None:
            return []
        path = shlex.quote(str(private_file(self.credentials.https, "sources.credentials_file")))
        return [f'credential.helper=!f() {{ test "$1" = get && git credential-store --file={path} get; }}; f']

    def _environment(self) -> dict[str, str]:
        schemes = ["https", "http", *sorted(self.allow & {"ssh", "file"})]
        return {
            **{name: os.environ[name] for name in _PROXIES if name in os.environ},
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.folder),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/false",
            "GIT_ALLOW_PROTOCOL": ":".join(schemes),
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_NO_LAZY_FETCH": "1",
            **({"GIT_SSH_VARIANT": "ssh", "GIT_SSH_COMMAND": self._ssh()} if "ssh" in self.allow else {}),
        }

    def _ssh(self) -> str:
        options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=30", "ControlMaster=no"]
        options += ["ForwardAgent=no", "ClearAllForwardings=yes", "PermitLocalCommand=no"]
        key, hosts = self.credentials.ssh_key, self.credentials.known_hosts
        if key is not None:
            options += ["IdentitiesOnly=yes", f'IdentityFile="{private_file(key, "sources.ssh_key_file")}"']
        if hosts is not None:
            options.append(f'UserKnownHostsFile="{hosts.absolute()}"')
        return shlex.join(["ssh", "-F", "none", *(part for option in options for part in ("-o", option))])


def printable(text: str) -> str:
    """What somebody else wrote, on one line and without anything that a terminal obeys."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def missing_programs(allow: frozenset[str]) -> list[str]:
    """Programs that fetching needs and that are not on PATH."""
    needed = ["git", "prlimit", "timeout", *(["ssh"] if "ssh" in allow else [])]
    return [program for program in needed if shutil.which(program) is None]


def private_file(path: Path, setting: str) -> Path:
    """A file that only its owner can read.

    Raises:
        SourceError: `credentials_refused`.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SourceError(
            "credentials_refused", f"{setting} {path} cannot be read: {error.strerror or error}"
        ) from error
    if mode & 0o077:
        raise SourceError("credentials_refused", f"{setting} {path} is readable by others: chmod 600 {path}")
    return path.absolute()


def _ended_by(which: signal.Signals, code: int) -> bool:
    return code in (-which, 128 + which)


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the command's session, and return when none of it runs any more.

    Only then may its folder be removed: a child that is dying can still make a file there.
    """
    left = _ENDS_WITHIN
    while left > 0 and (process.poll() is None or await asyncio.to_thread(_runs, process.pid)):
        _kill(process.pid)
        await asyncio.sleep(_LOOK_FIRST)
        left -= _LOOK_FIRST


def _kill(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _runs(session: int) -> bool:
    """Whether a process of the session is neither dead nor waited for (proc(5): state ppid pgrp session)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(of) == session and state not in "ZX":
                return True
    return False


def _size(folder: Path) -> int:
    """Bytes of its files, each at least a block: a million empty files fill a disk, too."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += max(os.lstat(os.path.join(parent, name)).st_size, _BLOCK)  # noqa: PTH118 - a tight loop over a pack's folder
            except OSError:
                continue
    return total
