"""Finds where a VMM may make control groups: below its own group, in each hierarchy that it was given.

On a host with version 2 alone a group either has processes or hands out limits, never both, so the VMM first
moves into a leaf of its own.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")
_LIMITS = ("memory", "cpu", "pids")
_LEAF = ".vmm"


@dataclass(slots=True)
class Hierarchies:
    """Where groups are made.

    Attributes:
        bases: Of each hierarchy its kind and the VMM's folder of sandboxes: a controller's name (version 1),
            `v2`, or `kill` (version 2 without controllers, which still kills a whole tree at once).
        limited: The controllers that really limit.
        moved: The group that the VMM left for a leaf, and that leaf.
        enabled: Controllers of that group that hand out limits since then, and did not before.
    """

    bases: list[tuple[str, Path]] = field(default_factory=list)
    limited: frozenset[str] = frozenset()
    moved: tuple[Path, Path] | None = None
    enabled: tuple[str, ...] = ()

    def leave(self) -> None:
        """Go back from the leaf, as far as the kernel lets us."""
        if self.moved is None:
            return
        group, leaf = self.moved
        with contextlib.suppress(OSError):
            _enable(group, self.enabled, sign="-")
            (group / "cgroup.procs").write_text(str(os.getpid()))
            leaf.rmdir()


def find_hierarchies(name: str, root: Path = ROOT, own: Path = OWN) -> Hierarchies:
    """Find them, and on version 2 make the VMM's own base `name`. Nothing is left where that is refused."""
    if (root / "cgroup.controllers").exists():
        return _version_2(name, root, own)
    found = Hierarchies()
    for controller in _V1_CONTROLLERS:
        group = _own_group(root / controller, controller, own)
        if os.access(group, os.W_OK):
            found.bases.append((controller, group / name))
    kinds = {kind for kind, _ in found.bases}
    unified = _own_group(root / "unified", "", own)
    if os.access(unified, os.W_OK):
        # Hybrid: what version 1 has not taken may be left to version 2.
        spare = [one for one in _available(unified) if one not in kinds]
        enabled = _enable(unified, spare) and _make(unified / name, spare)
        found.bases.append(("v2" if enabled and spare else "kill", unified / name))
        kinds |= set(spare) if enabled else set()
    found.limited = frozenset(kinds & set(_LIMITS))
    return found


def _version_2(name: str, root: Path, own: Path) -> Hierarchies:
    group = _own_group(root, "", own)
    if group.name == f"{name}{_LEAF}":
        group = group.parent
    moved = _into_leaf(group, name)
    # Below our own group where it is ours alone; else, as root, beside everybody at the top.
    for place in (group, root):
        wanted = _available(place)
        before = _words(place / "cgroup.subtree_control")
        if _enable(place, wanted) and _make(place / name, wanted):
            found = Hierarchies([("v2" if wanted else "kill", place / name)], frozenset(wanted))
            if place == group:
                found.moved, found.enabled = moved, tuple(one for one in wanted if one not in before)
            else:
                Hierarchies(moved=moved).leave()
            return found
    Hierarchies(moved=moved).leave()
    if _make(group / name, []):
        return Hierarchies([("kill", group / name)])
    return Hierarchies()


def _into_leaf(group: Path, name: str) -> tuple[Path, Path] | None:
    leaf = group / f"{name}{_LEAF}"
    try:
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with contextlib.suppress(OSError):
            leaf.rmdir()
        return None
    return group, leaf


def _available(group: Path) -> list[str]:
    given = _words(group / "cgroup.controllers")
    return [controller for controller in _LIMITS if controller in given]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _make(base: Path, controllers: list[str]) -> bool:
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return _enable(base, controllers)


def _enable(group: Path, controllers: list[str] | tuple[str, ...], sign: str = "+") -> bool:
    """Whether the group's children are limited by these now."""
    if not controllers:
        return True
    try:
        (group / "cgroup.subtree_control").write_text(" ".join(f"{sign}{one}" for one in controllers))
    except OSError:
        return False
    return True


def _own_group(mount: Path, controller: str, own: Path) -> Path:
    """The group that we are in, of a version 1 controller or (empty) of version 2; else the mount itself."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = mount / path.lstrip("/")
                return group if group.is_dir() else mount
    return mount
