"""The state directory: made private, refused where others can write, and locked for one daemon."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from platform_validator.errors import ValidatorError

_SOCKET_PATH_MAX = 107
_LOCK_POLL = 0.05


class StateLocked(ValidatorError):
    """Another daemon uses the state directory (exit code 3)."""


class StateUnusable(ValidatorError):
    """The state directory cannot be used safely (exit code 4); the message says what mends it."""


class StateDirectory:
    """Beside the database: `validator.lock validator.sock keyring/ cache/`. Close it to unlock."""

    def __init__(self, database: Path) -> None:
        self.database = database
        self.folder = database.parent
        self._lock: int | None = None

    def prepare(self) -> None:
        """Make what is missing, 0700; never change what is there.

        Raises:
            StateUnusable: Not a folder, not ours to write, or writable by others.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StateUnusable(f"{self.folder} can be written by others: chmod go-w {self.folder}")
            for name in ("cache", "keyring"):
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateUnusable(f"{self.folder} cannot be used: {error.strerror or error}") from error

    def lock(self, patience: timedelta = timedelta(0)) -> None:
        """Take the exclusive lock.

        Args:
            patience: How long it is waited for: a command that reads the journal has it for a moment.

        Raises:
            StateLocked: Another process has it.
            StateUnusable: The lock file cannot be made.
        """
        path = self.folder / "validator.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateUnusable(f"{path} cannot be made: {error.strerror}") from error
        given_up_at = time.monotonic() + patience.total_seconds()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= given_up_at:
                    os.close(descriptor)
                    raise StateLocked(
                        f"another validator uses {self.folder}: stop it, or set VALIDATOR_DB_PATH"
                    ) from error
                time.sleep(_LOCK_POLL)
        self._lock = descriptor

    def close(self) -> None:
        """Unlock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def socket(self) -> Path:
        """The daemon's Unix socket; in a private runtime directory when the path would be too long."""
        path = self.folder / "validator.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
            return path
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        return runtime / f"platform-validator-{os.getuid()}-{name}" / "validator.sock"

    def prepare_socket(self) -> Path:
        """The socket's path, its folder made private.

        Raises:
            StateUnusable: The folder is not ours alone.
        """
        path = self.socket
        if path.parent != self.folder:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            status = path.parent.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise StateUnusable(f"{path.parent} is not private: rm -r {path.parent}")
        return path
