"""The VMM's state directory: one VMM at a time, its name, its token, and where things lie in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from platform_vmm.errors import StateInUse


class StateDirectory:
    """Paths of one VMM. As a context manager it holds the exclusive lock."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._lock: int | None = None

    @property
    def vms(self) -> Path:
        """One folder a VM, by id; for the VMM's own eyes."""
        return self.path / "vms"

    @property
    def groups(self) -> Path:
        """Which control groups were made, written before they are."""
        return self.path / "cgroups.json"

    @property
    def name(self) -> str:
        """Twelve hex digits that tell this VMM from others on the host, also after a restart."""
        return self._once("id", lambda: uuid.uuid4().hex[:12], 0o644)

    @property
    def token(self) -> str:
        """The API's token, made at the first call."""
        return self._once("token", lambda: secrets.token_urlsafe(32), 0o600)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            StateInUse: Another VMM has it.
        """
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise StateInUse(
                f"another platform-vmm uses {self.path}: stop it, or give --state-dir"
            ) from error
        self._lock = lock
        self.vms.mkdir(mode=0o700, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _once(self, name: str, make: Callable[[], str], mode: int) -> str:
        path = self.path / name
        if not path.exists():
            fresh = self.path / f".{name}.{os.getpid()}"
            write_durably(fresh, make(), mode)
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        return path.read_text().strip()


def write_durably(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file so that after a crash it is there whole, or as it was before."""
    scratch = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
