"""What a VM is asked to run: app-compose.json, and the documented subset of docker-compose inside it.

The subset: one service with image, command, environment, ports, tmpfs, read_only, mem_limit, and the two
mounts of user config and agent socket. Anything else is refused with the key's name: a boot error.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from platform_vmm.errors import ComposeUnsupported

USER_CONFIG = "/dstack/.host-shared/.user-config"
AGENT_SOCKETS = frozenset({"/var/run/dstack.sock", "/run/dstack.sock", "/var/run/dstack/dstack.sock"})
_KNOWN = frozenset(
    {"image", "command", "environment", "ports", "tmpfs", "read_only", "mem_limit", "volumes", "restart"}
)
_IMAGE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._/:-]*?)@(?P<digest>sha256:[0-9a-f]{64})")
_MAX_BYTES = 1024 * 1024
_DEPTH = 32


@dataclass(frozen=True, slots=True)
class AppCompose:
    """app-compose.json, as far as a VMM reads it at CreateVm. `hash` is the SHA-256 (hex) of its bytes."""

    name: str
    hash: str
    docker_compose: str
    key_provider: str

    @property
    def app_id(self) -> str:
        """The first 20 bytes of the hash, hex."""
        return self.hash[:40]


@dataclass(frozen=True, slots=True)
class Service:
    """The one service of a docker-compose file."""

    image: str
    digest: str
    command: tuple[str, ...]
    environment: dict[str, str]


def read_app_compose(text: str) -> AppCompose:
    """Read app-compose.json.

    Raises:
        ComposeUnsupported: Not JSON, or without name, runner or manifest_version (dstack refuses these too).
    """
    if len(text) > _MAX_BYTES:
        raise ComposeUnsupported(f"Failed to read compose file: expected at most {_MAX_BYTES} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ComposeUnsupported("Failed to read compose file: not JSON") from error
    if not isinstance(value, dict):
        raise ComposeUnsupported("Failed to read compose file: expected an object")
    missing = [key for key in ("manifest_version", "name", "runner") if key not in value]
    if missing or not isinstance(value["name"], str):
        raise ComposeUnsupported(f"Failed to read compose file: missing field {', '.join(missing) or 'name'}")
    if value["runner"] != "docker-compose":
        raise ComposeUnsupported(f"runner {value['runner']!r}: the local VMM runs docker-compose only")
    return AppCompose(
        name=value["name"],
        hash=hashlib.sha256(text.encode()).hexdigest(),
        docker_compose=str(value.get("docker_compose_file", "")),
        key_provider=str(value.get("key_provider", "none")),
    )


def read_service(text: str) -> Service:
    """The one service of a docker-compose file.

    Raises:
        ComposeUnsupported: Outside the subset; the message names the key.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ComposeUnsupported("docker_compose_file: not YAML") from error
    services = value.get("services") if isinstance(value, dict) else None
    if not isinstance(services, dict) or len(services) != 1:
        raise ComposeUnsupported("services: expected exactly one service")
    unknown = sorted(str(key) for key in value if key not in ("services", "version", "name"))
    if unknown:
        raise ComposeUnsupported(f"{unknown[0]}: not in the local VMM's subset of docker-compose")
    name, service = next(iter(services.items()))
    if not isinstance(service, dict):
        raise ComposeUnsupported(f"services.{name}: expected a mapping")
    for key in service:
        if key not in _KNOWN:
            raise ComposeUnsupported(
                f"services.{name}.{key}: not in the local VMM's subset of docker-compose"
            )
    found = _IMAGE.fullmatch(str(service.get("image", "")))
    if found is None:
        raise ComposeUnsupported(f"services.{name}.image: expected name@sha256:<64 hex digits>")
    _check_mounts(name, service.get("volumes", []))
    return Service(
        image=found["name"],
        digest=found["digest"],
        command=_command(name, service.get("command")),
        environment=_environment(name, service.get("environment", {})),
    )


def _check_mounts(name: str, volumes: Any) -> None:
    if not isinstance(volumes, list):
        raise ComposeUnsupported(f"services.{name}.volumes: expected a list")
    for volume in volumes:
        source = str(volume).split(":")[0]
        if source != USER_CONFIG and source not in AGENT_SOCKETS:
            raise ComposeUnsupported(
                f"services.{name}.volumes: {source[:128]!r}: only user config and agent socket may be mounted"
            )


def _command(name: str, command: Any) -> tuple[str, ...]:
    if isinstance(command, str):
        return tuple(command.split())
    if isinstance(command, list) and command and all(isinstance(word, str) for word in command):
        return tuple(command)
    raise ComposeUnsupported(f"services.{name}.command: expected a list of strings")


def _environment(name: str, environment: Any) -> dict[str, str]:
    if isinstance(environment, list):
        environment = dict(str(item).partition("=")[::2] for item in environment)
    if not isinstance(environment, dict):
        raise ComposeUnsupported(f"services.{name}.environment: expected a mapping")
    return {str(key): str(value) for key, value in environment.items()}
