"""app-compose.json of a challenge: a pure function of its tree and the runtime's digest.

Nothing of the operator, the job or the VM goes in, so that anyone can compute the compose hash.
"""

from __future__ import annotations

import json
import re

from platform_protocol.canonical import sha256_hex
from platform_protocol.errors import ProtocolError
from platform_protocol.guest_init import INIT_SCRIPT
from platform_protocol.spec import ChallengeSpec

SDK_PORT = 10000
USER_CONFIG_PATH = "/dstack/.host-shared/.user-config"
AGENT_SOCKET = "/var/run/dstack.sock"
NESTING = ("seccomp=unconfined", "systempaths=unconfined")
"""The service's `security_opt`: with Docker's default profile and its covers over /proc, nobody in the
container could make the namespaces that hold a submission, and by its sources dstack's guest kernel has no
Landlock instead (meta-dstack's configuration, July 2026: CONFIG_USER_NS=y, no CONFIG_SECURITY_LANDLOCK).
Docker Compose knows the second from v2.6.0 (its issue 9505)."""
_RUNTIME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]*@sha256:[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ComposeInvalid(ProtocolError):
    """The runtime or the tree's digest has no exact form."""


def app_compose(
    spec: ChallengeSpec, *, bundle_sha256: str, runtime: str, compose_file: str | None = None
) -> bytes:
    """The exact bytes of app-compose.json: sorted keys, compact, UTF-8 (dstack's normalised form).

    Args:
        spec: The challenge's platform.toml.
        bundle_sha256: SHA-256 (hex) of the challenge's bundle.
        runtime: `name@sha256:<hex>`, the runtime image by digest.
        compose_file: The challenge's own docker-compose file's text, for one that brings its own image.

    Raises:
        ComposeInvalid: `runtime` has no digest, or `bundle_sha256` is not 64 hex digits.
    """
    if not _SHA256.fullmatch(bundle_sha256):
        raise ComposeInvalid(f"expected the bundle's SHA-256 in hex, got {bundle_sha256[:80]!r}")
    if not _RUNTIME.fullmatch(runtime):
        raise ComposeInvalid(f"expected a runtime as name@sha256:<64 hex digits>, got {runtime[:200]!r}")
    document = {
        "manifest_version": 2,
        "name": spec.name,
        "runner": "docker-compose",
        "docker_compose_file": compose_file or _compose_file(spec, bundle_sha256, runtime),
        "kms_enabled": False,
        "gateway_enabled": False,
        "key_provider": "none",
        "secure_time": False,
        "public_logs": False,
        "public_sysinfo": False,
        "init_script": INIT_SCRIPT,
    }
    return _normal(document).encode()


def compose_hash(compose: bytes) -> str:
    """SHA-256 (hex) of the bytes as sent to CreateVm."""
    return sha256_hex(compose)


def _compose_file(spec: ChallengeSpec, bundle_sha256: str, runtime: str) -> str:
    environment = {"CHALLENGE_SHA256": bundle_sha256, "CHALLENGE_ENTRY": spec.entry}
    if spec.network.hosts:
        environment["CHALLENGE_HOSTS"] = ",".join(sorted(spec.network.hosts))
    service = {
        "image": runtime,
        "command": ["platform-boot"],
        "environment": environment,
        "ports": [f"{SDK_PORT}:{SDK_PORT}"],
        "security_opt": list(NESTING),
        "volumes": [f"{USER_CONFIG_PATH}:{USER_CONFIG_PATH}:ro", f"{AGENT_SOCKET}:{AGENT_SOCKET}"],
    }
    return _normal({"services": {"challenge": service}})


def _normal(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
