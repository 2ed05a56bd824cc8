"""What a CVM may write and may not see, by its operator's word; a VMM enforces it, nobody measures it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_PATHS = 32
LEAST_TMPFS_MB = 16
"""What the SDK needs to start and to say why it does nothing more."""
_LONGEST = 255
_RESERVED = ("/dstack", "/proc", "/sys", "/dev", "/run", "/opt/platform")
"""The session, the kernel and the measured runtime: nothing of an operator's lies in, at or around them."""
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc")
_NEEDED = (*_SYSTEM, "/tmp", "/root")  # noqa: S108 - a name inside the guest


class FilesystemPolicy(BaseModel):
    """`read_only`: the root is read-only but for the usual writable places.

    `allowed_paths` are more writable places, `denied_paths` show nothing, `tmpfs_size_mb` caps all
    writable places together (never above the CVM's disk; None: that disk is the cap).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    read_only: bool = True
    allowed_paths: Annotated[tuple[str, ...], Field(max_length=MOST_PATHS)] = ()
    denied_paths: Annotated[tuple[str, ...], Field(max_length=MOST_PATHS)] = ()
    tmpfs_size_mb: Annotated[int, Field(ge=LEAST_TMPFS_MB, le=2**31 - 1)] | None = None

    @field_validator("allowed_paths")
    @classmethod
    def _are_writable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(writable_path(path) for path in value)

    @field_validator("denied_paths")
    @classmethod
    def _are_hidden(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(hidden_path(path) for path in value)

    @model_validator(mode="after")
    def _are_apart(self) -> FilesystemPolicy:
        if clashes := overlaps(self.allowed_paths, self.denied_paths):
            raise ValueError("; ".join(clashes))
        return self


def writable_path(value: object) -> str:
    """A path that may be made a writable place.

    Raises:
        ValueError: It is none; says what was expected.
    """
    path = _normal(value)
    for system in _SYSTEM:
        if _overlap(path, system):
            raise ValueError(
                f"expected a path apart from the system's {system} (a writable place is empty: it would hide "
                "what is there); read_only = false makes the whole root writable"
            )
    return path


def hidden_path(value: object) -> str:
    """A path that may be covered.

    Raises:
        ValueError: It is none, or nothing could start without it; says what was expected.
    """
    path = _normal(value)
    for needed in _NEEDED:
        if _within(needed, path):
            raise ValueError(f"expected a path that a CVM can start without, not {needed} or above it")
    return path


def overlaps(allowed: Iterable[str], denied: Iterable[str]) -> list[str]:
    """A line for each pair where one lies in the other."""
    return [
        f"{ours} is to be writable and {theirs} hidden: expected paths apart from each other"
        for ours in allowed
        for theirs in denied
        if _overlap(ours, theirs)
    ]


def _normal(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or value.startswith("//"):
        raise ValueError("expected an absolute path")
    if not value.isprintable():
        raise ValueError("expected a path of printable characters")
    if len(value.encode()) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} bytes")
    if value == "/" or str(PurePosixPath(value)) != value or ".." in value.split("/"):
        raise ValueError("expected a normal path below /, without '.', '..', '//' or a '/' at its end")
    for reserved in _RESERVED:
        if _overlap(value, reserved):
            raise ValueError(f"expected a path apart from {reserved}, which the session needs as it is")
    return value


def _overlap(one: str, other: str) -> bool:
    return _within(one, other) or _within(other, one)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
