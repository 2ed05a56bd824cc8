"""The challenge's tree inside the CVM: written from its bundle, and imported."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from platform_challenge_sdk.challenge import challenge
from platform_challenge_sdk.errors import BootFailed
from platform_protocol.bundle import BundleInvalid, unpack
from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml

_MAX_TRACE = 3500


class _Importing:
    now = False


def unpack_bundle(data: bytes, target: Path) -> ChallengeSpec:
    """Write the tree and read its platform.toml.

    Raises:
        BootFailed: Not a bundle, or no valid platform.toml in it.
    """
    try:
        for entry in unpack(data):
            path = target / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.link is not None:
                path.symlink_to(entry.link)
            else:
                path.write_bytes(entry.data)
                path.chmod(0o755 if entry.executable else 0o644)
        return parse_platform_toml((target / "platform.toml").read_bytes())
    except (BundleInvalid, OSError) as error:
        raise BootFailed(f"the bundle cannot be unpacked: {error}") from error
    except SpecInvalid as error:
        raise BootFailed(str(error)) from error


def import_challenge(target: Path, entry: str) -> None:
    """Import the entry module, which registers its handlers.

    Raises:
        BootFailed: Whatever it raises, with the end of the traceback; or it registers no job handler.
    """
    sys.path.insert(0, str(target))
    _Importing.now = True
    try:
        importlib.import_module(entry)
    except BaseException as error:
        raise BootFailed(f"importing {entry!r} failed:\n{traceback.format_exc()[-_MAX_TRACE:]}") from error
    finally:
        _Importing.now = False
    if not challenge.handlers:
        raise BootFailed(f"{entry!r} registers no handler: decorate a function with @challenge.on_job()")


def importing() -> bool:
    """Whether the challenge is being imported right now."""
    return _Importing.now
