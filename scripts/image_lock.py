"""Writes the runtime image's own lock: of each library of the SDK, the one wheel that its Python takes."""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from platform_vmm.distributions import closure
from platform_vmm.rootfs import wheels

SDK = "platform-challenge-sdk"
LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"


def main() -> None:
    """Write it."""
    names = {name for name in closure(SDK) if not name.startswith("platform-")}
    wanted = [
        found[0]
        for found in re.finditer(r"^([a-zA-Z0-9._-]+)==.*(?:\n {4}--hash.*)+", LOCK.read_text(), re.MULTILINE)
        if canonicalize_name(found[1]) in names
    ]
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "wanted.txt")
        requirements.write_text("\n".join(wanted) + "\n")
        wheels.download(requirements, Path(scratch))
        lines = []
        for path in Path(scratch).glob("*.whl"):
            name, version, _, _ = parse_wheel_filename(path.name)
            lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    wheels.LOCK.write_text("".join(sorted(lines)))
    sys.stdout.write(f"{wheels.LOCK}: {len(lines)} wheels\n")


if __name__ == "__main__":
    main()
