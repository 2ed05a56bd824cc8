"""What a CVM proves to its validator outside the session: MACs under its launch secret L."""

from __future__ import annotations

import hashlib
import hmac
import re

from platform_protocol.ids import VmName

_BUNDLE = re.compile(r"Bearer ([A-Za-z0-9_-]{1,128})\.([0-9a-f]{64})")


def proxy_password(launch_secret: bytes) -> str:
    """`HMAC-SHA256(L, "proxy")`, hex: the password of the CVM at the egress proxy."""
    return hmac.new(launch_secret, b"proxy", hashlib.sha256).hexdigest()


def bundle_authorization(launch_secret: bytes, vm: VmName, sha256: str) -> str:
    """`Bearer <vm>.<hex HMAC-SHA256(L, "bundle" ‖ sha256)>`: the header of `GET /bundles/{sha256}`."""
    return f"Bearer {vm}.{_bundle_mac(launch_secret, sha256)}"


def bundle_vm(authorization: str) -> VmName | None:
    """The VM that an Authorization header names, unproved; None when it has another form."""
    found = _BUNDLE.fullmatch(authorization)
    return VmName(found[1]) if found else None


def check_bundle_authorization(authorization: str, launch_secret: bytes, vm: VmName, sha256: str) -> bool:
    """Whether the header is this VM's for this bundle. Compared in constant time."""
    found = _BUNDLE.fullmatch(authorization)
    if found is None or found[1] != vm:
        return False
    return hmac.compare_digest(found[2], _bundle_mac(launch_secret, sha256))


def _bundle_mac(launch_secret: bytes, sha256: str) -> str:
    return hmac.new(launch_secret, b"bundle" + sha256.encode("ascii"), hashlib.sha256).hexdigest()
