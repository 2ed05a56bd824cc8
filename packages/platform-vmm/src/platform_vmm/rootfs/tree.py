"""The root filesystem as a folder: packages, the SDK, and what maintainer scripts would have made.

No maintainer script and no program of a package runs as root, nor in this machine's own filesystem, but for
the image's Python, which compiles modules through its own dynamic linker.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from platform_vmm.distributions import distribution_files, walk
from platform_vmm.errors import ImageUnknown
from platform_vmm.rootfs.errors import ImageNotBuilt, NoRoom, PackageRefused
from platform_vmm.rootfs.packages import Package
from platform_vmm.rootfs.wheels import PYTHON, Wheel, unpack_wheel

SITE = f"opt/platform/lib/python{PYTHON}/site-packages"
"""Where the SDK and its libraries lie, under the root."""
GUEST = "usr/lib/platform-guest"
"""Where the files of `platform_vmm/qemu/guest` lie, under the root."""
OWN = ("platform-protocol", "platform-challenge-sdk")
"""The distributions that are taken as they are installed beside the VMM."""
UID = 1000
"""Who runs the SDK inside."""
OWNED = ("root", "data")
"""Folders that are the SDK's user's: its home, and a place for files."""
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}
_FOLDERS = ("data", "dev", "proc", "run", "sys", "tmp", "var/tmp", "root", "dstack", "opt/platform/bin")
_LEFT_OUT = re.compile(
    r"usr/share/(man|info|locale|lintian|bug|menu|applications|pixmaps|icons|perl5|common-licenses/\..*)(/|$)"
    r"|usr/share/doc/[^/]+/(?!copyright$)"
    r"|usr/lib/python3\.\d+/(test|idlelib|tkinter|turtledemo|ensurepip|lib2to3)(/|$)"
    r"|usr/share/python3?(/|$)|etc/(init\.d|cron\.[a-z]+|logrotate\.d)(/|$)|usr/lib/systemd(/|$)"
)
_PROGRAMS = {
    "usr/bin/python3": f"python{PYTHON}",
    "usr/bin/python": f"python{PYTHON}",
    "usr/bin/sh": "busybox",
    "var/run": "/run",
    # In /usr, so that it is found also in a sandbox that shows nothing else of the image.
    "usr/lib/ssl/certs": "/etc/ssl/certs",
    "etc/ssl/certs/ca-certificates.crt": "/usr/lib/ssl/cert.pem",
}
_TEXTS = {
    "etc/passwd": (
        "root:x:0:0:root:/:/bin/sh\nvm:x:1000:1000::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
    ),
    "etc/group": "root:x:0:\nvm:x:1000:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost vm\n",
    "etc/hostname": "vm\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "usr/local/bin/platform-boot": (
        f"#!/usr/bin/python{PYTHON} -I\n"
        '"""Fetches the challenge, checks it, serves it: see platform_challenge_sdk.boot."""\n'
        f"import sys\n\nsys.path.insert(0, '/{SITE}')\n\n"
        "from platform_challenge_sdk.boot import main\n\nmain()\n"
    ),
}
_SANDBOXED = frozenset({"etc/passwd", "etc/group", "etc/hosts", "etc/nsswitch.conf"})
"""Also in /opt/platform, from where the sandbox driver takes them."""
_COMPILE_S = 300.0
_UNPACK_S = 120.0


def unpack_packages(packages: Sequence[Package], downloads: Path, root: Path) -> None:
    """Unpack their files, without running any of their scripts.

    Raises:
        PackageRefused: One of them would write outside of `root`, or is no Debian package.
    """
    for name, target in _LINKS.items():
        (root / target).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    status = [_unpack(package, downloads / package.file, root) for package in packages]
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, target in _PROGRAMS.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        place.unlink(missing_ok=True)
        place.symlink_to(target)
    for name, text in _TEXTS.items():
        copies = [name, f"opt/platform/{name}"] if name in _SANDBOXED else [name]
        for copy in copies:
            (root / copy).parent.mkdir(parents=True, exist_ok=True)
            (root / copy).write_text(text)
    (root / "usr/local/bin/platform-boot").chmod(0o755)
    dpkg = root / "var/lib/dpkg"
    dpkg.mkdir(parents=True, exist_ok=True)
    # What scanners for known faults read: which packages are inside, as dpkg would have it.
    (dpkg / "status").write_text("\n\n".join(status) + "\n")
    _trust(root)


def install_sdk(wheels: Sequence[Wheel], downloads: Path, guest: Path, root: Path) -> None:
    """Put the SDK, its libraries and the guest's own files in.

    Raises:
        PackageRefused: A wheel is not what it should be.
        ImageUnknown: The SDK is not installed beside the VMM.
    """
    site = root / SITE
    site.mkdir(parents=True)
    for wheel in wheels:
        unpack_wheel(downloads / wheel.file, wheel, site)
    for path, place in sdk_files():
        (site / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, site / place)
    for path, place in walk(guest):
        target = root / GUEST / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o755 if os.access(path, os.X_OK) else 0o644)


def sdk_files() -> list[tuple[Path, str]]:
    """(file, its place under site-packages) of the SDK and the protocol, however they were installed here.

    Raises:
        ImageUnknown: They are not installed beside the VMM.
    """
    found = []
    for name in OWN:
        try:
            files = list(distribution_files(name))
        except ModuleNotFoundError as error:
            raise ImageUnknown(
                f"{name} is not installed beside the VMM: install it to make the image"
            ) from error
        for path, place in files:
            first, _, rest = place.partition("/")
            # What pip notes of how it was installed says nothing of the SDK, and would change the digest.
            if not first.endswith(".dist-info") or rest == "METADATA":
                found.append((path, place))
    return sorted(set(found), key=lambda one: one[1])


def compile_modules(root: Path) -> None:
    """Compile every module with the image's Python, so that no guest does it at each start.

    The caches are never compared with their sources' times, which the image does not keep.

    Raises:
        ImageNotBuilt: A module does not compile.
    """
    folders = [f"usr/lib/python{PYTHON}", SITE, GUEST]
    words = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
    run_python(root, [*words, *(str(root / folder) for folder in folders)], timeout=_COMPILE_S)


def run_python(root: Path, words: Sequence[str], *, timeout: float) -> None:
    """Run the image's own Python on this machine: the same bytes come out on every machine.

    Raises:
        ImageNotBuilt: It failed.
    """
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    loader = [f"{root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, "--inhibit-cache"]
    try:
        done = subprocess.run(
            [*loader, f"{root}/usr/bin/python{PYTHON}", "-s", "-B", *words],
            env={"PYTHONHOME": f"{root}/usr", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=root,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageNotBuilt(f"the image's Python took over {timeout:g} s to {words[1][:20]}") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-800:]
        if "No space left on device" in said:
            raise NoRoom(f"{root}: {said[-200:]}: free some space and try again")
        raise ImageNotBuilt(f"the image's Python ended with exit code {done.returncode}: {said}")


def _unpack(package: Package, path: Path, root: Path) -> str:
    control = subprocess.run(
        ["dpkg-deb", "--field", str(path)], capture_output=True, text=True, timeout=_UNPACK_S, check=False
    )
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    _place(package, member, archive, root)
        except tarfile.TarError as error:
            raise PackageRefused(f"{package.name}: expected a Debian package: {error}") from error
        finally:
            process.kill()
    lines = control.stdout.strip().splitlines()
    return "\n".join([lines[0], "Status: install ok installed", *lines[1:]]) if lines else ""


def _place(package: Package, member: tarfile.TarInfo, archive: tarfile.TarFile, root: Path) -> None:
    target = _inside(package, member.name, root)
    if target == root or _LEFT_OUT.match(str(target.relative_to(root))):
        return
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)
    elif member.islnk():
        os.link(_inside(package, member.linkname, root), target)
    elif member.isreg():
        content = archive.extractfile(member)
        if content is not None:
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
        target.chmod(0o755 if member.mode & 0o111 else 0o644)
    else:
        raise PackageRefused(f"{package.name}: {member.name!r} is neither a file, a folder nor a link")


def _inside(package: Package, name: str, root: Path) -> Path:
    """Where a package's file lies under the root, whose /bin, /lib and /sbin are in /usr.

    Raises:
        PackageRefused: Elsewhere, be it through a link that came before.
    """
    parts = [part for part in PurePosixPath(name).parts if part != "."]
    if parts and parts[0] in _LINKS:
        parts[:1] = PurePosixPath(_LINKS[parts[0]]).parts
    target = root.joinpath(*parts)
    absolute_or_up = name.startswith("/") or ".." in parts
    if absolute_or_up or not (target == root or target.parent.resolve().is_relative_to(root.resolve())):
        raise PackageRefused(f"{package.name}: {name!r} would lie outside of the image")
    return target


def _trust(root: Path) -> None:
    """The authorities' bundle, as update-ca-certificates makes it: all that Debian ships, in its order."""
    certificates = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = "".join(path.read_text().rstrip("\n") + "\n" for path in certificates)
    (root / "usr/lib/ssl/cert.pem").write_text(bundle)
