"""The folders of a run without namespaces: made before it, with a uid of its own, and gone after it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_FIRST_UID, _UIDS = 61_000, 4_000
_KILL = 30.0
_taken: set[int] = set()
_taking = threading.Lock()
"""Guards `_taken`: two runs under one uid would end each other."""


@dataclass(frozen=True, slots=True)
class Room:
    """`path` has `workspace` and `tmp`, which alone can be written; `uid` None: the run has ours."""

    path: Path
    submission: Path
    uid: int | None

    def end_all(self) -> None:
        """Kill what has our uid, if it is the run's own: for when the stage died before it did."""
        if self.uid is not None:
            kill = ["/bin/sh", "-c", "kill -KILL -1"]
            subprocess.run(
                kill, user=self.uid, group=self.uid, extra_groups=[], timeout=_KILL, check=False, cwd="/"
            )


@contextlib.contextmanager
def made_room(submission: Path, files: Mapping[str, bytes], *, own_uid: bool) -> Iterator[Room]:
    """A room for one run, whose processes have ended when it is left.

    Raises:
        OSError: There is no place for it.
    """
    path = Path(tempfile.mkdtemp(prefix="contained-"))
    uid = _take_uid() if own_uid else None
    try:
        for name in ("workspace", "tmp"):
            (path / name).mkdir(mode=0o700)
        for name, data in files.items():
            (path / "workspace" / name).write_bytes(data)
        if uid is not None:
            # The submission's own folder is below one that only we may enter.
            shutil.copytree(submission, path / "submission", symlinks=True, copy_function=_link)
            submission = path / "submission"
            for each in (path / "workspace", path / "tmp", *(path / "workspace").iterdir()):
                os.chown(each, uid, uid)
            path.chmod(0o711)
        yield Room(path, submission, uid)
    finally:
        remove_tree(path)
        with _taking:
            _taken.discard(uid or 0)


def remove_tree(root: Path) -> None:
    """Remove what a submission made, however deep and whatever its modes; nothing writes there any more."""
    prefix, number = f".{secrets.token_hex(8)}-", 0
    pending = [root]
    while pending:
        folder = pending.pop()
        folder.chmod(0o700)
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # Moved up, so that no path becomes longer than the kernel takes.
                number += 1
                up = root / f"{prefix}{number}"
                Path(entry.path).chmod(0o700)
                Path(entry.path).rename(up)
                pending.append(up)
            else:
                Path(entry.path).unlink()
        if folder != root:
            folder.rmdir()
    root.rmdir()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK}:
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def _take_uid() -> int:
    with _taking:
        living = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                living.add(entry.stat().st_uid)
        for number in range(_UIDS):
            uid = _FIRST_UID + (os.getpid() + number) % _UIDS
            if uid not in _taken and uid not in living:
                _taken.add(uid)
                return uid
    raise OSError(errno.EAGAIN, "every uid for runs is taken")
