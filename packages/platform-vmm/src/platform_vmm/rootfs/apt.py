"""Debian's packages, by this machine's own apt: signatures checked, versions resolved, files fetched.

apt works here on folders of its own: what is installed on this machine plays no part and is not touched,
and an ordinary user may do it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

from platform_vmm.rootfs.errors import MirrorFailed, NoRoom, PackageRefused, ToolMissing
from platform_vmm.rootfs.packages import ARCHITECTURE, KERNEL, SUITE, UNUSED, WANTED, Package, Selection

MIRROR = "PLATFORM_DEBIAN_MIRROR"
"""Environment: the URL of a Debian mirror, and after a space that of its security archive."""
_APT_FOLDER = Path("/etc/apt")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UPDATE_S, _ASK_S, _FETCH_S = 180.0, 60.0, 900.0
_SUITES = (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
_NOT_OURS = re.compile(r"Acquire::(IndexTargets|Languages|Retries|https?::Timeout)\b")
_FULL = re.compile(r"No space left on device|not enough free space|enough free space in|Disk quota exceeded")


class Apt:
    """apt with a state of its own in `folder`, which is removed at the end.

    Args:
        folder: Where its own folder is made.
        old: An index that its mirror no longer vouches for will do: what is fetched is known by its hash.

    Raises:
        ToolMissing: This machine has no apt.
        MirrorFailed: It has no sources of Debian 12, and none were named.
    """

    def __init__(self, folder: Path, *, old: bool = False) -> None:
        for program, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
            require(program, package)
        self._folder = Path(tempfile.mkdtemp(prefix=".apt-", dir=folder))
        self._sources = sources(os.environ.get(MIRROR, ""), _APT_FOLDER)
        self._updated = False
        self._old = old

    def __enter__(self) -> Self:
        for name in ("state/lists/partial", "cache/archives/partial", "none"):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "debian.sources").write_text(self._sources)
        (self._folder / "status").touch()
        (self._folder / "apt.conf").write_text(self._configuration())
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def resolve(self, progress: Callable[[str], None]) -> Selection:
        """The newest versions of all that is wanted.

        Raises:
            MirrorFailed: The mirrors do not answer, or have no such packages.
        """
        self._update(progress)
        simulated = self._run(
            ["apt-get", "install", "--simulate", "--no-install-recommends", *WANTED], timeout=_ASK_S
        )
        chosen = dict(re.findall(r"^Inst (\S+) \((\S+)", simulated, re.MULTILINE))
        asked = [f"{name}={version}" for name, version in chosen.items() if name not in UNUSED]
        root = self._show(asked)
        depends = self._run(["apt-cache", "show", "--no-all-versions", KERNEL], timeout=_ASK_S)
        found = re.search(r"^Depends: .*?(linux-image-\S+) \(= (\S+)\)", depends, re.MULTILINE)
        if found is None:
            raise MirrorFailed(f"{KERNEL}: expected that it depends on one kernel, got {depends[:300]!r}")
        (kernel,) = self._show([f"{found[1]}={found[2]}"])
        return Selection(tuple(sorted(root)), kernel)

    def fetch(self, packages: Iterable[Package], into: Path, progress: Callable[[str], None]) -> None:
        """Download those of them that `into` has not yet, each checked against its hash.

        Raises:
            MirrorFailed: The mirrors do not answer, or no longer have these versions.
            PackageRefused: A file's hash is another.
            NoRoom: The disk is full.
        """
        lacking = [one for one in packages if not (into / one.file).exists()]
        if not lacking:
            return
        self._update(progress)
        size = sum(one.size for one in lacking) / 1e6
        progress(f"downloading {len(lacking)} packages, {size:.1f} MB")
        here = self._folder / "cache"
        names = [f"{one.name}={one.version}" for one in lacking]
        self._run(["apt-get", "download", *names], timeout=_FETCH_S, cwd=here)
        by_hash = {_sha256(path): path for path in here.glob("*.deb")}
        for one in lacking:
            path = by_hash.get(one.sha256)
            if path is None:
                raise PackageRefused(
                    f"{one.name} {one.version}: expected the SHA-256 {one.sha256}; the mirror has another"
                )
            path.rename(into / one.file)

    def _configuration(self) -> str:
        """Of this machine's own only how packages are fetched (proxies, certificates); none of its hooks."""
        told = subprocess.run(
            ["apt-config", "dump", "Acquire"], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
        ours = [line for line in told.stdout.splitlines() if not _NOT_OURS.match(line)]
        folder = self._folder
        options: dict[str, object] = {
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "state/lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "debian.sources",
            "Dir::Etc::sourceparts": folder / "none",
            "Dir::Etc::preferences": folder / "none/preferences",
            "Dir::Etc::preferencesparts": folder / "none",
            "Dir::Etc::main": folder / "none/main",
            "Dir::Etc::parts": folder / "none",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": 2,
            "Acquire::http::Timeout": 30,
            "Acquire::https::Timeout": 30,
        }
        if self._old:
            options["Acquire::Check-Valid-Until"] = "false"
        ours += [f'{name} "{value}";' for name, value in options.items()]
        return "\n".join(ours) + "\n"

    def _update(self, progress: Callable[[str], None]) -> None:
        if not self._updated:
            progress("reading Debian's package index")
            self._run(["apt-get", "update", "--error-on=any"], timeout=_UPDATE_S)
            self._updated = True

    def _show(self, names: Sequence[str]) -> list[Package]:
        text = self._run(["apt-cache", "show", *names], timeout=_ASK_S)
        found: dict[str, Package] = {}
        for stanza in text.strip().split("\n\n"):
            field = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
            one = Package(
                field["Package"], field["Version"], field["Architecture"], int(field["Size"]), field["SHA256"]
            )
            if f"{one.name}={one.version}" in names:
                found.setdefault(one.name, one)
        if len(found) != len(names):
            raise MirrorFailed(f"the package index lacks some of {', '.join(names)}")
        return list(found.values())

    def _run(self, words: Sequence[str], *, timeout: float, cwd: Path | None = None) -> str:
        try:
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "APT_CONFIG": str(self._folder / "apt.conf"),
                    "LC_ALL": "C",
                    "DEBIAN_FRONTEND": "noninteractive",
                },
            )
        except subprocess.TimeoutExpired as error:
            raise MirrorFailed(self._advice(f"{' '.join(words[:2])} took over {timeout:g} s")) from error
        if done.returncode == 0:
            return done.stdout
        said = (
            " ".join(line for line in done.stderr.splitlines() if line.startswith("E:")) or done.stderr[-500:]
        )
        if _FULL.search(done.stderr):
            raise NoRoom(f"{self._folder.parent}: {said}: free some space and try again")
        raise MirrorFailed(self._advice(said))

    def _advice(self, what: str) -> str:
        tried = ", ".join(sorted(set(re.findall(r"^URIs: (.+)$", self._sources, re.MULTILINE))))
        return (
            f"Debian's packages could not be had from {tried}: {what[:800]}. Check this machine's network, "
            f"or name another mirror: {MIRROR}='URL-OF-DEBIAN URL-OF-DEBIAN-SECURITY'"
        )


def sources(mirror: str, folder: Path) -> str:
    """Where Debian 12 is to be had, in deb822 form: `mirror`, else what apt's own `folder` names.

    Raises:
        MirrorFailed: Neither names any.
    """
    urls = mirror.split()
    if urls:
        suites = [(urls[0], _SUITES[:2]), *((url, _SUITES[2:]) for url in urls[1:2])]
        found = [
            (url, suite, str(_KEYRING) if _KEYRING.exists() else "") for url, many in suites for suite in many
        ]
    else:
        found = [
            *(one for path in _files(folder, "list") for one in _one_line(path.read_text(errors="replace"))),
            *(one for path in _files(folder, "sources") for one in _deb822(path.read_text(errors="replace"))),
        ]
    if not any(suite == SUITE for _, suite, _ in found):
        raise MirrorFailed(
            f"expected sources of Debian 12 ({SUITE}) in {folder}, found none: name a mirror, "
            f"{MIRROR}='URL-OF-DEBIAN URL-OF-DEBIAN-SECURITY' (its keys: the package debian-archive-keyring)"
        )
    stanzas = [
        f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n"
        + (f"Signed-By: {keys}\n" if keys else "")
        for uri, suite, keys in dict.fromkeys(found)
    ]
    return "\n".join(stanzas)


def require(program: str, package: str) -> str:
    """The program's path.

    Raises:
        ToolMissing: It is not there.
    """
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise ToolMissing(f"{program} is needed to make the image and is not here: apt-get install {package}")
    return found


def _files(folder: Path, suffix: str) -> list[Path]:
    main = [folder / "sources.list"] if suffix == "list" else []
    return [path for path in (*main, *sorted(folder.glob(f"sources.list.d/*.{suffix}"))) if path.is_file()]


def _one_line(text: str) -> Iterable[tuple[str, str, str]]:
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)", line.split("#")[0])
        if match and match[3] in _SUITES and "main" in match[4].split():
            keys = re.search(r"signed-by=(\S+)", match[1] or "")
            yield match[2], match[3], keys[1] if keys else ""


def _deb822(text: str) -> Iterable[tuple[str, str, str]]:
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", plain):
        field = {
            name.lower(): value.rstrip()
            for name, value in re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        }
        usable = "deb" in field.get("types", "").split() and field.get("enabled", "yes").lower() != "no"
        if usable and "main" in field.get("components", "").split():
            for suite in field.get("suites", "").split():
                for uri in field.get("uris", "").split() if suite in _SUITES else ():
                    yield uri, suite, field.get("signed-by", "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
