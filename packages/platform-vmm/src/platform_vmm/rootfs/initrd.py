"""The kernel and the initrd of a guest: busybox, the modules that its devices need, and a short /init."""

from __future__ import annotations

import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from platform_vmm.rootfs.errors import PackageRefused

INIT = Path(__file__).with_name("init.sh")
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "qemu_fw_cfg",
    "squashfs",
    "overlay",
    "nf_tables",
    "nft_reject_inet",
)
"""Loaded at every start, in this order, each after what it depends on."""
_FOLDERS = ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "root")


def write_boot(kernel: Path, release: str, busybox: Path, into: Path) -> None:
    """Write `vmlinuz` and `initrd` into the folder.

    Args:
        kernel: The kernel's Debian package.
        release: What the kernel calls itself.
        busybox: A static busybox.
        into: An existing folder.

    Raises:
        PackageRefused: The package lacks the kernel or a module.
        OSError: They could not be written.
    """
    files = _read_kernel(kernel, release)
    image = files.pop("vmlinuz", None)
    if image is None:
        raise PackageRefused(f"{release}: expected boot/vmlinuz-{release} in its package")
    (into / "vmlinuz").write_bytes(image)
    order = list(load_order(MODULES, files))
    entries: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in _FOLDERS]
    entries += [
        ("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        ("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
        ("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode()),
        *((f"modules/{name}.ko", stat.S_IFREG | 0o644, files[name]) for name in order),
    ]
    (into / "initrd").write_bytes(b"".join(_archive(entries)))


def load_order(wanted: Iterable[str], modules: dict[str, bytes]) -> Iterator[str]:
    """The modules that are wanted and all that they depend on, what is depended on first.

    Raises:
        PackageRefused: One is not there.
    """
    done: set[str] = set()

    def load(name: str) -> Iterator[str]:
        if name in done:
            return
        done.add(name)
        if name not in modules:
            raise PackageRefused(f"the kernel's package: expected a module {name}")
        for other in depends(modules[name]):
            yield from load(other if other in modules else other.replace("_", "-"))
        yield name

    for name in wanted:
        yield from load(name)


def depends(module: bytes) -> list[str]:
    """What a module says that it depends on, in its section .modinfo (what is built in, it does not name)."""
    start = module.find(b"\0depends=") + len(b"\0depends=")
    if start < len(b"\0depends="):
        return []
    names = module[start : module.index(b"\0", start)].decode()
    return [name for name in names.split(",") if name]


def _read_kernel(package: Path, release: str) -> dict[str, bytes]:
    """`vmlinuz` and every module by its name."""
    files: dict[str, bytes] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    name = Path(member.name)
                    kernel = name.name == f"vmlinuz-{release}"
                    content = archive.extractfile(member) if kernel or name.suffix == ".ko" else None
                    if content is not None:
                        files["vmlinuz" if kernel else name.stem] = content.read()
        except tarfile.TarError as error:
            raise PackageRefused(f"{package.name}: expected a Debian package: {error}") from error
        finally:
            process.kill()
    return files


def _archive(entries: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """The form "newc" of cpio (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst)."""
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        yield header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
