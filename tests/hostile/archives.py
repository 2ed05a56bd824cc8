"""Case 25: what is uploaded instead of an archive of plain files."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.hostile.attack import FAILED, SUCCEEDED, Attack, Control, Facts
from tests.hostile.machine import marked_files

MIB = 1024 * 1024
_BOMB = 900 * MIB
_SECRET = "/dstack/.host-shared/.user-config"
_MEANS = "the standard library's tarfile without its filter unpacks it; still only in the VM"

Entry = tuple[tarfile.TarInfo, bytes]


def _entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o644
    for field, value in more.items():
        setattr(info, field, value)
    return info, data


def _tar(entries: Iterable[Entry], *, packed: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _links(token: str) -> bytes:
    """To the VM's secrets, by an absolute path and by a relative one."""
    targets = [f"{up}{_SECRET}" for up in ("", "../../../../../..")]
    return _tar(
        _entry(f"link{at}", kind=tarfile.SYMTYPE, linkname=target) for at, target in enumerate(targets)
    )


def _hard_link(token: str) -> bytes:
    """To the uploaded archive itself, which lies beside the folder that it is unpacked into."""
    return _tar([_entry("hard", kind=tarfile.LNKTYPE, linkname="../archive")], packed=False)


def _named(before: str) -> Callable[[str], bytes]:
    return lambda token: _tar([_entry("plain", b"plain"), _entry(f"{before}{token}", b"out")])


def _kind(kind: bytes, **more: Any) -> Callable[[str], bytes]:
    return lambda token: _tar([_entry("plain", b"plain"), _entry("odd", kind=kind, **more)])


def _bomb(token: str) -> bytes:
    """Zeros that fit into a megabyte, packed."""
    out = io.BytesIO()
    head = tarfile.TarInfo("zeros")
    head.size = _BOMB
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as file:
        file.write(head.tobuf())
        block = bytes(MIB)
        for _ in range(_BOMB // MIB):
            file.write(block)
        file.write(bytes(1024))
    return out.getvalue()


def _twice(first: str, second: str) -> Callable[[str], bytes]:
    return lambda token: _tar([_entry(first, b"the first"), _entry(second, b"the second")])


def _folder_and_file(token: str) -> bytes:
    return _tar([_entry("a", b"a file"), _entry("a/b", b"below it"), _entry("A", b"another")])


def _device_unpacked() -> bool:
    """In a scratch folder, as root: whether tarfile without its filter makes the device."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = io.BytesIO(_kind(tarfile.CHRTYPE, devmajor=1, devminor=3)(""))
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(scratch, filter="fully_trusted")  # noqa: S202 - what the control is about
        return stat.S_ISCHR((Path(scratch) / "odd").lstat().st_mode)


def found_on_the_host() -> bool:
    """A marked file that a host would have unpacked is found by the search that finds none."""
    name = f"hostile-{os.urandom(6).hex()}"
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(_named("")(name))) as tar:
            tar.extractall(scratch, filter="data")
        return bool(marked_files(name, ()))


def _attack(
    name: str,
    clause: str,
    archive: Callable[[str], bytes],
    won: Callable[[Facts], bool],
    *,
    control: Control | None = None,
    outcomes: frozenset[str] = FAILED,
    watched: bool = False,
) -> Attack:
    chosen = control or Control("the SDK's reader of archives", _MEANS)
    return Attack(
        name, 25, clause, "submission", "", chosen, won, outcomes=outcomes, archive=archive, watched=watched
    )


ARCHIVES = [
    _attack(
        "symbolic link out of the root",
        "links",
        _links,
        lambda facts: bool(facts.found),
    ),
    _attack(
        "hard link out of the root",
        "links",
        _hard_link,
        lambda facts: "ustar" in facts.told("texts"),
    ),
    _attack("path with ..", "dot-dot", _named("../../"), lambda facts: "hostile-" in facts.told("outside")),
    _attack("absolute path", "absolute", _named("/tmp/"), lambda facts: "hostile-" in facts.told("outside")),
    _attack(
        "device",
        "device",
        _kind(tarfile.CHRTYPE, devmajor=1, devminor=3),
        lambda facts: "odd=c" in facts.told("kinds"),
        control=Control(
            "the SDK's reader of archives", "tarfile, as root in a scratch folder", _device_unpacked
        ),
    ),
    _attack(
        "setuid",
        "setuid",
        _kind(tarfile.REGTYPE, mode=0o6755),
        lambda facts: "odd=setuid" in facts.told("kinds"),
    ),
    _attack("FIFO", "fifo", _kind(tarfile.FIFOTYPE), lambda facts: "odd=p" in facts.told("kinds")),
    _attack("bomb", "bomb", _bomb, lambda facts: facts.guest.memory > 600 * MIB, watched=True),
    _attack(
        "a name twice",
        "duplicate",
        _twice("x", "x"),
        lambda facts: "the second" in facts.told("texts"),
    ),
    _attack(
        "two names of one file",
        "colliding",
        _twice("x", "./x"),
        lambda facts: "the second" in facts.told("texts"),
    ),
    _attack(
        "a file and a folder of one name",
        "colliding",
        _folder_and_file,
        lambda facts: not facts.error.startswith("submission_unreadable"),
    ),
    _attack(
        "nothing is unpacked on the host",
        "only-inside",
        _named(""),
        lambda facts: bool(facts.escaped),
        outcomes=SUCCEEDED,
        control=Control(
            "no unpacking on the host", "the harness unpacks one, and finds it", found_on_the_host
        ),
    ),
]
