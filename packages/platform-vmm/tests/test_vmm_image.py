"""The guest image: what is in it, how it starts, and what its digest depends on."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from platform_vmm.rootfs import GuestImage
from platform_vmm.rootfs.oci import read_layout
from platform_vmm.rootfs.packages import UNUSED, WANTED
from platform_vmm.rootfs.wheels import read_lock

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.needs("mksquashfs"),
    pytest.mark.timeout(600),  # where the image is not there yet, the first test makes it
]


@pytest.fixture(scope="module")
def layer(guest_image: GuestImage) -> dict[str, tarfile.TarInfo]:
    (blob,) = read_layout(guest_image.layout).layers
    with tarfile.open(blob.path, "r:gz") as archive:
        return {member.name: member for member in archive}


def test_the_digest_is_the_layouts_manifest_and_every_blob_is_what_its_name_says(
    guest_image: GuestImage,
) -> None:
    layout = read_layout(guest_image.layout)
    assert layout.digest == guest_image.digest == guest_image.manifest["digest"]
    assert layout.config["config"]["Cmd"] == ["platform-boot"]
    assert layout.config["config"]["User"] == "1000"


@pytest.mark.slow(reason="another program reads 34 MB")
@pytest.mark.needs("skopeo")
def test_a_registry_client_reads_the_layout(guest_image: GuestImage, tmp_path: Path) -> None:
    """skopeo, which operators push it with, finds the same digest, and copies it as it is."""
    command = ["skopeo", "inspect", f"oci:{guest_image.layout}"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    assert told["Digest"] == guest_image.digest
    copy = ["skopeo", "--insecure-policy", "copy", "--preserve-digests", f"oci:{guest_image.layout}"]
    subprocess.run([*copy, f"oci:{tmp_path}/copy"], capture_output=True, check=True, timeout=100)
    assert read_layout(tmp_path / "copy").digest == guest_image.digest


def test_no_file_is_setuid_and_none_is_the_sdk_users_but_two_folders(
    layer: dict[str, tarfile.TarInfo],
) -> None:
    assert [name for name, member in layer.items() if member.mode & 0o6000] == []
    assert sorted(name for name, member in layer.items() if member.uid != 0) == ["data", "root"]
    assert [
        name for name, member in layer.items() if not (member.isreg() or member.isdir() or member.issym())
    ] == []


def test_nothing_that_installs_packages_or_answers_their_scripts_is_inside(
    layer: dict[str, tarfile.TarInfo],
) -> None:
    programs = {name.rpartition("/")[2] for name in layer if "/bin/" in name or "/sbin/" in name}
    assert {"python3.11", "bwrap", "nft", "busybox", "sh", "platform-boot"} <= programs
    assert not programs & {"apt-get", "dpkg", "perl", "bash", "openssl", "gpg"}


def test_the_manifest_names_each_package_and_wheel_by_version_and_hash(guest_image: GuestImage) -> None:
    made_of = guest_image.manifest
    names = {package["name"] for package in made_of["packages"]}
    assert WANTED.keys() <= names
    assert not names & UNUSED.keys()
    assert made_of["kernel"]["name"].startswith("linux-image-")
    assert {wheel["name"] for wheel in made_of["wheels"]} == {wheel.name for wheel in read_lock()}
    for one in (*made_of["packages"], *made_of["wheels"]):
        assert re.fullmatch(r"[0-9a-f]{64}", one["sha256"])
        assert one["version"]


def test_the_wheels_are_those_of_the_lock() -> None:
    """The image's own lock says nothing that the lock of the whole tree does not."""
    text = (ROOT / "requirements.lock").read_text()
    for wheel in read_lock():
        found = re.search(rf"^{wheel.name}=={re.escape(wheel.version)} (.*(?:\n    .*)*)", text, re.MULTILINE)
        assert found is not None, f"{wheel.name} {wheel.version}: make lock"
        assert f"sha256:{wheel.sha256}" in found[1], f"{wheel.name}: make lock"


@pytest.mark.slow(reason="boots a virtual machine on an emulated processor")
def test_a_virtual_machine_boots_from_it(guest_image: GuestImage) -> None:
    """Kernel, initrd and root disk reach the guest's own init, which runs the image's Python."""
    words = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
    words += ["-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-serial", "stdio", "-kernel", str(guest_image.kernel), "-initrd", str(guest_image.initrd)]
    words += ["-append", "console=ttyS0 panic=-1 quiet platform.probe"]
    words += ["-drive", f"if=none,id=root,file={guest_image.root},format=raw,readonly=on"]
    words += ["-device", "virtio-blk-pci,drive=root"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=200, check=True, stdin=subprocess.DEVNULL
    )
    assert "platform-guest: user space runs" in done.stdout


@pytest.mark.slow(reason="unpacks the image and starts its Python")
def test_platform_boot_starts_in_it_and_says_what_it_lacks(guest_image: GuestImage, tmp_path: Path) -> None:
    """As a container would run it: the layer as the root, the configured user, command and environment."""
    layout = read_layout(guest_image.layout)
    (tmp_path / "root").mkdir()
    unpack = ["tar", "--extract", "--gzip", "--directory", str(tmp_path / "root"), "--file"]
    subprocess.run([*unpack, str(layout.layers[0].path)], check=True, timeout=100)
    run = layout.config["config"]
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--uid", run["User"], "--gid", run["User"]]
    words += ["--cap-drop", "ALL", "--bind", str(tmp_path / "root"), "/", "--proc", "/proc", "--dev", "/dev"]
    words += ["--tmpfs", "/tmp", "--clearenv", "--chdir", run["WorkingDir"]]
    for name, value in (one.split("=", 1) for one in run["Env"]):
        words += ["--setenv", name, value]
    with subprocess.Popen([*words, *run["Cmd"]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = process.stdout.readline().decode()
        process.kill()
    assert said.startswith("platform-boot: user_config cannot be read at /dstack/.host-shared/.user-config")
