"""The guest image of the QEMU driver, and its root filesystem as the runtime image of a dstack host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from platform_vmm.distributions import walk
from platform_vmm.rootfs.apt import Apt, require
from platform_vmm.rootfs.errors import ImageNotBuilt, NoRoom
from platform_vmm.rootfs.initrd import write_boot
from platform_vmm.rootfs.layer import Layer, write_layer
from platform_vmm.rootfs.oci import write_layout
from platform_vmm.rootfs.packages import KERNEL, SUITE, UNUSED, WANTED, Selection
from platform_vmm.rootfs.tree import (
    OWN,
    SITE,
    UID,
    compile_modules,
    install_sdk,
    run_python,
    sdk_files,
    unpack_packages,
)
from platform_vmm.rootfs.wheels import PYTHON, Wheel, fetch_wheels, read_lock
from platform_vmm.state import write_durably

NAME = "platform-runtime"
MANIFEST = "platform-runtime.json"
FOLDER = "guest"
"""Under `state/images`: packages that were downloaded, and a folder an image, by what it is made of."""
_GUEST_FILES = Path(__file__).parents[1] / "qemu" / "guest"
_ROOM = 600 * 1024 * 1024
_SQUASH_S = 300.0
_COMPRESS = (
    "import gzip, shutil, sys\n"
    "with open(sys.argv[1], 'rb') as plain, open(sys.argv[2], 'wb') as file:\n"
    "    with gzip.GzipFile('', 'wb', 6, file, mtime=0) as packed:\n"
    "        shutil.copyfileobj(plain, packed, 1 << 20)\n"
)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """An image on disk. `digest` is that of the OCI manifest (`sha256:…`): what a dstack host names it by."""

    path: Path
    kernel: Path
    initrd: Path
    root: Path
    """A read-only squashfs."""
    digest: str
    boot: tuple[str, ...]
    """What a command `platform-boot` becomes inside."""
    library: str
    """Where inside the guest's Python finds the SDK: its PYTHONPATH."""

    @property
    def layout(self) -> Path:
        """The OCI image layout."""
        return self.path / "oci"

    @property
    def manifest(self) -> dict[str, Any]:
        """What it is made of, as `platform-runtime.json` says."""
        document: dict[str, Any] = json.loads((self.layout / MANIFEST).read_text())
        return document


def build_guest_image(
    state: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    selection: Selection | None = None,
    update: bool = False,
) -> GuestImage:
    """The image under `state/images`, made when it is not there yet (half a minute, 50 MB to download).

    What it is made of names it: the same packages, SDK and scripts are never built twice, and without a new
    package nothing goes over the network. Of two processes that ask at once, one waits for the other.

    Args:
        state: The VMM's state directory.
        progress: Told what is being done.
        selection: Exactly these packages, instead of those of the first build.
        update: Ask the mirrors for newer packages.

    Raises:
        ImageNotBuilt: Its subclasses say why; nothing half-done is left.
        ImageUnknown: The SDK is not installed beside the VMM.
    """
    images = state / "images" / FOLDER
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(images, progress), _full_disk_told(images):
        for left in (*images.glob(".*-*"), *images.glob("*.new")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        chosen = selection or _selection(images, progress, update=update)
        wheels = read_lock()
        target = images / _key(chosen, wheels)
        if not target.exists():
            _build(images, target, chosen, wheels, progress)
    return _describe(target)


def newest_image(state: Path) -> GuestImage:
    """The image that was made last; nothing is built.

    Raises:
        ImageNotBuilt: None was made yet.
    """
    found = sorted(
        (state / "images" / FOLDER).glob(f"*/oci/{MANIFEST}"), key=lambda path: path.stat().st_mtime
    )
    if not found:
        raise ImageNotBuilt(f"{state}: no image was made yet: platform-vmm image build --state-dir {state}")
    return _describe(found[-1].parents[1])


def prune_guest_images(state: Path, keep: GuestImage) -> None:
    """Remove all other images, and downloaded packages that `keep` is not made of."""
    made_of = keep.manifest
    files = {f"{one['sha256']}.deb" for one in (*made_of["packages"], made_of["kernel"])}
    files |= {f"{one['sha256']}.whl" for one in made_of["wheels"]}
    for entry in (state / "images" / FOLDER).iterdir():
        if entry.is_dir() and entry != keep.path:
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.suffix in (".deb", ".whl") and entry.name not in files:
            entry.unlink()


def _build(
    images: Path,
    target: Path,
    chosen: Selection,
    wheels: tuple[Wheel, ...],
    progress: Callable[[str], None],
) -> None:
    squash = require("mksquashfs", "squashfs-tools")
    if (free := shutil.disk_usage(images).free) < _ROOM:
        raise NoRoom(
            f"{images}: expected {_ROOM >> 20} MiB of free disk to make the image, found {free >> 20} MiB"
        )
    packages = chosen.all
    if any(not (images / one.file).exists() for one in packages):
        with Apt(images) as apt:
            apt.fetch(packages, images, progress)
    fetch_wheels(wheels, images, progress)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=images))
    try:
        root, made = scratch / "root", scratch / "image"
        root.mkdir()
        made.mkdir()
        progress(f"unpacking {len(chosen.root)} packages")
        unpack_packages(chosen.root, images, root)
        install_sdk(wheels, images, _GUEST_FILES, root)
        progress("compiling Python modules")
        compile_modules(root)
        progress("packing the root filesystem")
        tar, packed = scratch / "layer.tar", scratch / "layer.tar.gz"
        layer = write_layer(root, tar)
        # The image's own Python compresses: another zlib would make other bytes, and so another digest.
        run_python(root, ["-c", _COMPRESS, str(tar), str(packed)], timeout=_SQUASH_S)
        layout = write_layout(
            made / "oci", layer=packed, content_sha256=layer.sha256, run=_configuration(), name=NAME
        )
        told = {"digest": layout.digest, **_made_of(chosen, wheels, layer)}
        (made / "oci" / MANIFEST).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        _squash(squash, tar, made / "root.squashfs")
        progress(f"kernel {chosen.release} and its initrd")
        write_boot(images / chosen.kernel.file, chosen.release, root / "usr/bin/busybox", made)
        _finish(made)
        made.rename(target)
        _sync(images)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _selection(images: Path, progress: Callable[[str], None], *, update: bool) -> Selection:
    asked = json.dumps([SUITE, sorted(WANTED), sorted(UNUSED), KERNEL])
    note = images / f"packages-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"
    if note.exists() and not update:
        return Selection.from_json(note.read_text())
    with Apt(images) as apt:
        chosen = apt.resolve(progress)
        # Fetched before it is decided on: a choice of which half cannot be had would stay.
        apt.fetch(chosen.all, images, progress)
    write_durably(note, chosen.to_json(), 0o644)
    return chosen


def _key(chosen: Selection, wheels: tuple[Wheel, ...]) -> str:
    own = [(place, _sha256(path)) for path, place in sdk_files()]
    guest = [(place, os.access(path, os.X_OK), _sha256(path)) for path, place in walk(_GUEST_FILES)]
    scripts = [(place, _sha256(path)) for path, place in walk(Path(__file__).parent)]
    made_of = [chosen.to_json(), [asdict(one) for one in wheels], own, guest, scripts]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:40]


def _made_of(chosen: Selection, wheels: tuple[Wheel, ...], layer: Layer) -> dict[str, Any]:
    own = hashlib.sha256(
        "".join(f"{place} {_sha256(path)}\n" for path, place in sdk_files()).encode()
    ).hexdigest()
    return {
        "content": {"files": layer.files, "sha256": layer.content, "tar_bytes": layer.size},
        "kernel": asdict(chosen.kernel),
        "packages": [asdict(one) for one in chosen.root],
        "python": PYTHON,
        "sdk": {"sha256": own, "versions": _versions()},
        "suite": SUITE,
        "wheels": [asdict(one) for one in wheels],
    }


def _configuration() -> dict[str, Any]:
    return {
        "Cmd": ["platform-boot"],
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME=/root", "LANG=C.UTF-8"],
        "Labels": {
            "org.opencontainers.image.title": NAME,
            "org.opencontainers.image.version": _versions()["platform-challenge-sdk"],
        },
        "User": str(UID),
        "WorkingDir": "/root",
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in OWN}


def _describe(path: Path) -> GuestImage:
    digest = json.loads((path / "oci" / MANIFEST).read_text())["digest"]
    return GuestImage(
        path=path,
        kernel=path / "vmlinuz",
        initrd=path / "initrd",
        root=path / "root.squashfs",
        digest=digest,
        boot=(f"/usr/bin/python{PYTHON}", "-m", "platform_challenge_sdk.boot"),
        library=f"/{SITE}",
    )


def _squash(program: str, tar: Path, target: Path) -> None:
    words = [program, "-", str(target), "-tar", "-noappend", "-quiet", "-no-progress"]
    words += ["-mkfs-time", "0", "-comp", "lz4"]
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    with tar.open("rb") as archive:
        done = subprocess.run(
            words, stdin=archive, capture_output=True, timeout=_SQUASH_S, check=False, env=environment
        )
    said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()[-500:]
    if done.returncode != 0 or not target.exists():
        if "No space left" in said:
            raise NoRoom(f"{target.parent}: {said}: free some space and try again")
        raise ImageNotBuilt(f"mksquashfs ended with exit code {done.returncode}: {said}")


@contextlib.contextmanager
def _only_one(images: Path, progress: Callable[[str], None]) -> Iterator[None]:
    lock = os.open(images / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process makes the image: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _full_disk_told(images: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoom(f"{images}: {error.strerror}: free some space and try again") from error


def _finish(folder: Path) -> None:
    """Readable for the uid that QEMU runs as, whatever the umask; and on disk before it has its name."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
