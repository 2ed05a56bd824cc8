"""How the guest image is made: the same again elsewhere, after a kill, on a full disk, without a network."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from platform_vmm.rootfs import GuestImage, apt, build_guest_image
from platform_vmm.rootfs.assembly import MANIFEST, Assembled, Materials
from platform_vmm.rootfs.errors import ImageNotBuilt, MirrorFailed, NoRoom, NotReproduced, PackageRefused
from platform_vmm.rootfs.image import check_reproducible, is_current, newest_image, prune_guest_images
from platform_vmm.rootfs.initrd import load_order
from platform_vmm.rootfs.oci import read_layout
from platform_vmm.rootfs.packages import Package, Selection
from platform_vmm.rootfs.tree import unpack_packages
from platform_vmm.rootfs.wheels import Wheel, unpack_wheel

pytestmark = [
    pytest.mark.needs("mksquashfs"),
    pytest.mark.timeout(600),  # where the image is not there yet, the first test makes it
]
COMMAND = Path(sys.executable).with_name("platform-vmm")
ORDINARY = ["bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--unshare-user", "--uid", "2000"]
ORDINARY += ["--gid", "2000", "--cap-drop", "ALL", "--unshare-net", "--die-with-parent"]


@pytest.fixture
def state(guest_image: GuestImage, tmp_path: Path) -> Path:
    """A state directory in which everything was downloaded and nothing was built."""
    folder = tmp_path / "state" / "images" / "guest"
    folder.mkdir(parents=True)
    for path in guest_image.path.parent.iterdir():
        if path.is_file() and path.name != "lock":
            (folder / path.name).symlink_to(path)
    return tmp_path / "state"


def start(state: Path) -> subprocess.Popen[str]:
    """A build by an ordinary user without capabilities or network, with other habits than ours."""
    return subprocess.Popen(
        [*ORDINARY, COMMAND, "image", "build", "--json", "--state-dir", state],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        umask=0o077,
        env={**os.environ, "TZ": "Pacific/Auckland", "SOURCE_DATE_EPOCH": "1", "PYTHONHASHSEED": "7"},
    )


@pytest.mark.slow(reason="makes the image again, from the beginning")
def test_the_same_digest_comes_out_elsewhere_for_another_user_after_a_kill_and_for_two_at_once(
    state: Path, guest_image: GuestImage
) -> None:
    """A build that was killed leaves nothing that is used; of two that follow, one builds and one waits."""
    folder = state / "images" / "guest"
    killed = start(state)
    assert killed.stderr is not None
    for line in killed.stderr:
        if "compiling" in line:
            break
    inside = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for process in (*map(int, inside), killed.pid):
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    assert [path.name for path in folder.glob(".building-*")] != []
    with pytest.raises(ImageNotBuilt, match="no image was made yet"):
        newest_image(state)

    both = [start(state), start(state)]
    said = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {json.loads(out)["digest"] for out, _ in said} == {guest_image.digest}
    assert sum("compiling" in progress for _, progress in said) == 1
    assert sum("waiting" in progress for _, progress in said) == 1
    made = newest_image(state)
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == {"lock", made.path.name}
    assert made.root.read_bytes() == guest_image.root.read_bytes()
    assert made.initrd.read_bytes() == guest_image.initrd.read_bytes()
    assert made.kernel.stat().st_mode & 0o777 == 0o644

    begun = folder.stat().st_mtime_ns
    assert build_guest_image(state, pytest.fail) == made
    assert folder.stat().st_mtime_ns == begun


@pytest.mark.slow(reason="unpacks some of the packages")
def test_a_disk_that_fills_up_is_told_and_nothing_is_left(state: Path) -> None:
    """A disk of 20 MB, on which the check for room beforehand is left out."""
    program = (
        "import sys; from pathlib import Path\n"
        "from platform_vmm.rootfs import build_guest_image, errors, image\n"
        "image._ROOM = 0\n"
        "try: build_guest_image(Path(sys.argv[1]))\n"
        "except errors.NoRoom as error: print(error)\n"
        "print(sorted(p.name for p in Path(sys.argv[1], 'images/guest').iterdir() if not p.is_symlink()))\n"
    )
    small = state.parent / "small"
    small.mkdir()
    script = 'cp -a $1/. $2 && exec $3 -c "$4" $2'
    words = ["bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--size", str(20 << 20)]
    words += [
        "--tmpfs",
        str(small),
        "sh",
        "-c",
        script,
        "sh",
        str(state),
        str(small),
        sys.executable,
        program,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert "No space left on device: free some space and try again" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "['lock']"


def test_too_little_room_is_told_before_anything_is_begun(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 5 << 20))
    with pytest.raises(NoRoom, match="expected 600 MiB of free disk to make the image, found 5 MiB"):
        build_guest_image(state)


@pytest.mark.slow(reason="apt tries a dead mirror three times")
def test_a_mirror_that_does_not_answer_is_named_with_the_way_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(apt.MIRROR, "http://127.0.0.1:9/debian http://127.0.0.1:9/security")
    with pytest.raises(MirrorFailed, match=r"1:9/debian.*1:9/security.*PLATFORM_DEBIAN_MIRROR="):
        build_guest_image(tmp_path)
    assert [path.name for path in (tmp_path / "images/guest").iterdir()] == ["lock"]


def test_a_missing_program_is_named_with_its_package(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ImageNotBuilt, match=r"mksquashfs is needed .* apt-get install squashfs-tools"):
        build_guest_image(state)


def test_an_image_of_another_sdk_is_not_made_by_this_one(
    guest_image: GuestImage, state: Path, tmp_path: Path
) -> None:
    """An old image is made again by the version that made it, or not at all."""
    told = guest_image.manifest
    told["sdk"]["sha256"] = "0" * 64
    (tmp_path / "old.json").write_text(json.dumps(told))
    with pytest.raises(NotReproduced, match="check out and install the version"):
        build_guest_image(state, like=tmp_path / "old.json")
    (tmp_path / "old.json").write_text("[]")
    with pytest.raises(ImageNotBuilt, match=r"expected the platform-runtime\.json of an image"):
        build_guest_image(state, like=tmp_path / "old.json")


def test_a_manifest_names_the_packages_that_make_its_image_again(guest_image: GuestImage) -> None:
    chosen = Selection.from_json((guest_image.layout / MANIFEST).read_text())
    assert Selection.from_json(chosen.to_json()) == chosen
    assert len(chosen.root) == len(guest_image.manifest["packages"])


def test_pruning_keeps_the_image_and_what_it_is_made_of(guest_image: GuestImage, tmp_path: Path) -> None:
    folder = tmp_path / "images" / "guest"
    folder.mkdir(parents=True)
    kept = folder / guest_image.path.name
    shutil.copytree(guest_image.layout, kept / "oci")
    package = guest_image.manifest["packages"][0]["sha256"]
    for name in (f"{package}.deb", "00.deb", "00.whl", "packages-1.json"):
        (folder / name).touch()
    (folder / "other" / "oci").mkdir(parents=True)
    prune_guest_images(tmp_path, keep=newest_image(tmp_path))
    assert {path.name for path in folder.iterdir()} == {
        kept.name,
        f"{package}.deb",
        "packages-1.json",
        "lock",
    }


def test_an_image_of_an_earlier_sdk_or_init_is_known_as_such(guest_image: GuestImage, tmp_path: Path) -> None:
    """The VMM says so when it starts; the folder's name is what the image was made of."""
    assert is_current(guest_image)
    earlier = tmp_path / "images/guest" / ("0" * 40)
    shutil.copytree(guest_image.layout, earlier / "oci")
    assert not is_current(newest_image(tmp_path))


def test_the_machines_own_sources_are_read_in_both_of_apts_forms(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://gone.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # ours\n"
        "deb http://third.example/apt bookworm stable\n"
        "deb-src http://a.example/debian bookworm main\n"
    )
    (tmp_path / "sources.list.d/debian.sources").write_text(
        "Types: deb deb-src\nURIs: http://b.example/security\n# a comment\nSuites: bookworm-security trixie\n"
        "Components: main\nSigned-By:\n -----BEGIN\n .\n -----END\n\n"
        "Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n"
    )
    ours, theirs = apt.sources("", tmp_path).split("\n\n")
    assert ours.splitlines()[1:3] == ["URIs: http://a.example/debian", "Suites: bookworm"]
    assert ours.endswith("\nSigned-By: /k.gpg")
    assert theirs.splitlines()[1:3] == ["URIs: http://b.example/security", "Suites: bookworm-security"]
    assert theirs.endswith("\nSigned-By: \n -----BEGIN\n .\n -----END\n")


def test_a_machine_without_sources_of_debian_12_is_told_how_to_name_a_mirror(tmp_path: Path) -> None:
    with pytest.raises(MirrorFailed, match="PLATFORM_DEBIAN_MIRROR='URL"):
        apt.sources("", tmp_path)
    named = apt.sources("http://m.example/debian http://m.example/security", tmp_path)
    assert [line for line in named.splitlines() if line[0:4] in ("URIs", "Suit")] == [
        "URIs: http://m.example/debian",
        "Suites: bookworm",
        "URIs: http://m.example/debian",
        "Suites: bookworm-updates",
        "URIs: http://m.example/security",
        "Suites: bookworm-security",
    ]


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("./usr/../../outside", tarfile.REGTYPE, ""),
        ("/outside", tarfile.REGTYPE, ""),
        ("./usr/share/away/outside", tarfile.REGTYPE, ""),
        ("./usr/share/away/outside/folder", tarfile.DIRTYPE, ""),
        ("./usr/share/device", tarfile.CHRTYPE, ""),
        ("./usr/share/pipe", tarfile.FIFOTYPE, ""),
        ("./usr/share/hard", tarfile.LNKTYPE, "../outside"),
        ("./usr/share/hard", tarfile.LNKTYPE, "./usr/share/away/secret"),
    ],
)
def test_a_package_that_would_leave_its_place_is_refused(
    tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    """Also through a link that it brought before; and no device or pipe is made."""
    (tmp_path / "secret").write_text("ours")
    (tmp_path / "root").mkdir()
    bad = Package("bad", "1", "amd64", 0, "0" * 64)
    entries = [("./usr/share/away", tarfile.SYMTYPE, str(tmp_path)), (name, kind, link)]
    (tmp_path / bad.file).write_bytes(debian_package(entries))
    with pytest.raises(PackageRefused, match="bad: "):
        unpack_packages([bad], tmp_path, tmp_path / "root")
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "root", bad.file}


def debian_package(entries: list[tuple[str, bytes, str]]) -> bytes:
    """A .deb of empty files, folders and links, as dpkg-deb reads it."""
    members = [("debian-binary", b"2.0\n")]
    control = tarfile.TarInfo("./control"), b"Package: bad\nVersion: 1\nArchitecture: amd64\n"
    control[0].size = len(control[1])
    files = [(tarfile.TarInfo(name), b"") for name, _, _ in entries]
    for (entry, _), (_, kind, link) in zip(files, entries, strict=True):
        entry.type, entry.linkname = kind, link
    for name, content in (("control.tar", [control]), ("data.tar", files)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for entry, text in content:
                archive.addfile(entry, io.BytesIO(text))
        members.append((name, data.getvalue()))
    packed = [
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + bytes(len(data) % 2)
        for name, data in members
    ]
    return b"!<arch>\n" + b"".join(packed)


def test_a_second_making_that_comes_out_otherwise_is_told(
    guest_image: GuestImage, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says `reproducible` can say no."""

    def otherwise(_: Materials, __: Path, scratch: Path, ___: object) -> Assembled:
        shutil.copytree(guest_image.layout, scratch / "oci")
        told = guest_image.manifest
        told["content"]["sha256"] = "0" * 64
        (scratch / "oci" / MANIFEST).write_text(json.dumps(told))
        return Assembled(scratch, read_layout(scratch / "oci")._replace(digest="sha256:other"))

    monkeypatch.setattr(Materials, "assemble", otherwise)
    with pytest.raises(NotReproduced, match="a second time, got sha256:other: another sha256"):
        check_reproducible(state, guest_image, print)


def test_a_file_that_is_not_the_wheel_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"other")
    with pytest.raises(PackageRefused, match="not the file that was downloaded"):
        unpack_wheel(tmp_path / "x.whl", Wheel("x", "1", "0" * 64), tmp_path)
    assert not (tmp_path / "x.whl").exists()


def test_modules_are_loaded_after_what_they_depend_on() -> None:
    modules = {
        "net": b"\0depends=virtio,fail_over\0license=GPL\0",
        "virtio": b"\0depends=\0",
        "fail-over": b"\0depends=virtio\0",
    }
    assert list(load_order(["net"], modules)) == ["virtio", "fail-over", "net"]
    with pytest.raises(PackageRefused, match="expected a module absent"):
        list(load_order(["absent"], modules))
