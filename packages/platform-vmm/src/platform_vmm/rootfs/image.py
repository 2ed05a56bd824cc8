"""The guest image of the QEMU driver, and its root filesystem as the runtime image of a dstack host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_vmm.rootfs.apt import Apt, require
from platform_vmm.rootfs.assembly import MANIFEST, Materials, sdk_sha256
from platform_vmm.rootfs.errors import ImageNotBuilt, NoRoom, NotReproduced
from platform_vmm.rootfs.initrd import write_boot
from platform_vmm.rootfs.packages import KERNEL, SUITE, UNUSED, WANTED, Selection
from platform_vmm.rootfs.tree import SITE
from platform_vmm.rootfs.wheels import PYTHON, Wheel, read_lock
from platform_vmm.state import write_durably

FOLDER = "guest"
"""Under `state/images`: packages that were downloaded, and a folder an image, by what it is made of."""
_ROOM = 600 * 1024 * 1024
_SQUASH_S = 300.0


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
    like: Path | None = None,
    update: bool = False,
) -> GuestImage:
    """The image under `state/images`, made when it is not there yet (half a minute, 50 MB to download).

    What it is made of names it: the same packages, SDK and scripts are never built twice, and without a new
    package nothing goes over the network. Of two processes that ask at once, one waits for the other.

    Args:
        state: The VMM's state directory.
        progress: Told what is being done.
        like: The `platform-runtime.json` of an image: exactly its packages, and its digest must come out.
        update: Ask the mirrors for newer packages.

    Raises:
        ImageNotBuilt: Its subclasses say why; nothing half-done is left.
        ImageUnknown: The SDK is not installed beside the VMM.
    """
    images = state / "images" / FOLDER
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(images, progress), _full_disk_told(images):
        _sweep(images)
        chosen = _packages_of(like) if like else _selection(images, progress, update=update)
        materials = Materials(chosen, read_lock())
        target = images / materials.key
        if not target.exists():
            _build(images, target, materials, progress, old=like is not None)
            _sweep(images)
    image = _describe(target)
    if like is not None and image.digest != (expected := json.loads(like.read_text())["digest"]):
        raise NotReproduced(
            f"{like}: expected {expected}, got {image.digest}: the image was made by another version of the "
            "scripts; check out the version of the VMM that it was made with"
        )
    return image


def check_reproducible(state: Path, image: GuestImage, progress: Callable[[str], None]) -> None:
    """Make the OCI image once more, from its packages, in another folder.

    Raises:
        NotReproduced: Another digest came out.
        ImageNotBuilt: It could not be made.
    """
    images = state / "images" / FOLDER
    with _only_one(images, progress), _full_disk_told(images):
        _expect_room(images)
        scratch = Path(tempfile.mkdtemp(prefix=".building-again-", dir=images))
        try:
            materials = Materials(_packages_of(image.layout / MANIFEST), read_lock())
            materials.fetch(images, progress)
            again = materials.assemble(images, scratch, progress)
            told = json.loads((scratch / "oci" / MANIFEST).read_text())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if again.layout.digest != image.digest:
        differs = [key for key, value in told["content"].items() if value != image.manifest["content"][key]]
        raise NotReproduced(
            f"expected {image.digest} a second time, got {again.layout.digest}: "
            f"another {', '.join(differs) or 'compression'}"
        )


def newest_image(state: Path) -> GuestImage:
    """The image that was made last; nothing is built.

    Raises:
        ImageNotBuilt: None was made yet.
    """
    notes = [(path.stat().st_mtime, path) for path in (state / "images" / FOLDER).glob(f"*/oci/{MANIFEST}")]
    if not notes:
        raise ImageNotBuilt(f"{state}: no image was made yet: platform-vmm image build --state-dir {state}")
    return _describe(max(notes)[1].parents[1])


def is_current(image: GuestImage) -> bool:
    """Whether its packages would make it again: SDK, libraries, guest's files and scripts are ours."""
    chosen = Selection.from_json((image.layout / MANIFEST).read_text())
    return Materials(chosen, read_lock()).key == image.path.name


def prune_guest_images(state: Path, keep: GuestImage) -> None:
    """Remove all other images, and downloaded packages that `keep` is not made of."""
    images = state / "images" / FOLDER
    made_of = keep.manifest
    files = {f"{one['sha256']}.deb" for one in (*made_of["packages"], made_of["kernel"])}
    files |= {f"{one['sha256']}.whl" for one in made_of["wheels"]}
    with _only_one(images, lambda _: None):
        for entry in images.iterdir():
            if entry.is_dir() and entry != keep.path:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix in (".deb", ".whl") and entry.name not in files:
                entry.unlink()


def _build(
    images: Path, target: Path, materials: Materials, progress: Callable[[str], None], *, old: bool
) -> None:
    if platform.machine() != "x86_64":
        raise ImageNotBuilt(
            f"expected an x86-64 machine, whose Python the image has; got {platform.machine()}"
        )
    squash = require("mksquashfs", "squashfs-tools")
    _expect_room(images)
    materials.fetch(images, progress, old=old)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=images))
    try:
        made = scratch / "image"
        made.mkdir()
        assembled = materials.assemble(images, scratch, progress)
        (scratch / "oci").rename(made / "oci")
        _squash(squash, assembled.root, made / "root.squashfs")
        release = materials.packages.release
        progress(f"kernel {release} and its initrd")
        kernel = images / materials.packages.kernel.file
        write_boot(kernel, release, assembled.root / "usr/bin/busybox", made)
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
    _expect_room(images)
    with Apt(images) as apt:
        chosen = apt.resolve(progress)
        # Fetched before it is decided on: a choice of which half cannot be had would stay.
        apt.fetch(chosen.all, images, progress)
    write_durably(note, chosen.to_json(), 0o644)
    return chosen


def _packages_of(manifest: Path) -> Selection:
    """The packages of an image that was made before, here or elsewhere.

    Raises:
        ImageNotBuilt: It is no manifest, or of another SDK than is installed here.
    """
    try:
        text = manifest.read_text()
        made_of = json.loads(text)
        wheels = tuple(sorted(Wheel(**one) for one in made_of["wheels"]))
        sdk = made_of["sdk"]
        same = (sdk["sha256"], wheels) == (sdk_sha256(), read_lock())
        versions = " and ".join(f"{name} {version}" for name, version in sdk["versions"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ImageNotBuilt(f"{manifest}: expected the {MANIFEST} of an image: {error!r}") from error
    if not same:
        raise NotReproduced(
            f"{manifest}: made of {versions} with SHA-256 {sdk['sha256'][:16]}… and libraries; here are "
            f"others ({sdk_sha256()[:16]}…): check out and install the version that it was made with"
        )
    return Selection.from_json(text)


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


def _squash(program: str, root: Path, target: Path) -> None:
    """Everything root's: what a guest's service may write lies on a disk of its own."""
    words = [program, str(root), str(target), "-noappend", "-quiet", "-no-progress", "-no-xattrs"]
    words += ["-all-root", "-root-mode", "0755", "-mkfs-time", "0", "-all-time", "0", "-comp", "lz4"]
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SQUASH_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageNotBuilt(f"mksquashfs took over {_SQUASH_S:g} s") from error
    said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()[-500:]
    if done.returncode != 0 or not target.exists():
        if "No space left" in said:
            raise NoRoom(f"{target.parent}: {said}: free some space and try again")
        raise ImageNotBuilt(f"mksquashfs ended with exit code {done.returncode}: {said}")


def _sweep(images: Path) -> None:
    """Remove what a killed build left. A program that it had started may still write there: hence twice."""
    for left in (*images.glob(".*-*"), *images.glob("*.new")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _expect_room(images: Path) -> None:
    if (free := shutil.disk_usage(images).free) < _ROOM:
        raise NoRoom(
            f"{images}: expected {_ROOM >> 20} MiB of free disk to make the image, found {free >> 20} MiB: "
            "free some space, or give --state-dir on another disk"
        )


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
