"""What an installed distribution consists of: its files, and the distributions that it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from platform_vmm.errors import ImageUnknown

_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"}
    | {"lib2to3", "__pycache__"}
)


def closure(name: str, seen: set[str] | None = None) -> set[str]:
    """The names of the distribution and of all that it needs here, normalised.

    Raises:
        ImageUnknown: It is not installed beside the VMM.
    """
    seen = set() if seen is None else seen
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        if not seen:
            raise ImageUnknown(
                f"{name} is not installed beside the VMM: install it to build a runtime image"
            ) from error
        return seen
    seen.add(name)
    for requirement in requires:
        found = re.match(r"[A-Za-z0-9._-]+", requirement)
        needed = found is not None and "extra ==" not in requirement.partition(";")[2]
        if found is not None and needed and _normal(found[0]) not in seen:
            closure(_normal(found[0]), seen)
    return seen


def distribution_files(name: str) -> Iterator[tuple[Path, str]]:
    """(file, its place under site-packages), also of a distribution that is installed in editable form."""
    distribution = importlib.metadata.distribution(name)
    editable = "editable" in (distribution.read_text("direct_url.json") or "")
    if editable:
        spec = importlib.util.find_spec(name.replace("-", "_"))
        for location in (spec.submodule_search_locations or []) if spec else []:
            for path, relative in walk(Path(location)):
                yield path, f"{Path(location).name}/{relative}"
    for entry in sorted(distribution.files or []):
        path = Path(str(entry.locate()))
        inside = ".." not in entry.parts and "__pycache__" not in entry.parts
        noise = editable and (entry.suffix == ".pth" or entry.name in ("RECORD", "direct_url.json"))
        if inside and not noise and path.is_file() and entry.suffix != ".pyc":
            yield path, str(entry)


def walk(top: Path) -> Iterator[tuple[Path, str]]:
    """(file, its place under `top`), sorted; without caches, tests, and what only a desktop uses."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and name[:7] != "config-")
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file() and not name.endswith((".pyc", ".a")):
                yield path, str(path.relative_to(top))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
