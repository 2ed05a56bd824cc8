"""What a VM is asked to run: app-compose.json, and the documented subset of docker-compose inside it.

The subset: one service with image (by digest), command, environment, ports, tmpfs, read_only, mem_limit, the
two mounts of user config and agent socket, and the security_opt that lets submissions be contained, which a
sandbox grants anyway. Anything else is a boot error that names the key.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from dataclasses import dataclass
from typing import Any

import yaml

from platform_protocol.compose import NESTING
from platform_protocol.guest_init import INIT_SCRIPT
from platform_vmm.errors import ComposeUnsupported

USER_CONFIG = "/dstack/.host-shared/.user-config"
AGENT_SOCKETS = frozenset({"/var/run/dstack.sock", "/run/dstack.sock", "/var/run/dstack/dstack.sock"})
_KNOWN = frozenset({"image", "command", "environment", "ports", "tmpfs", "read_only", "mem_limit"})
_KNOWN |= {"volumes", "security_opt"}
_UNSUPPORTED = {
    "kms_enabled": "the local VMM has no KMS",
    "gateway_enabled": "the local VMM has no gateway",
    "tproxy_enabled": "the local VMM has no gateway",
    "local_key_provider_enabled": "the local VMM has no key provider",
    "pre_launch_script": "the local VMM runs the service alone",
    "bash_script": "the local VMM runs docker-compose only",
    "verity_volumes": "the local VMM mounts nothing else",
    "requirements": "the local VMM can promise none",
}
"""Keys of app-compose.json that ask for something when they are neither false nor empty."""
_MANIFESTS = (1, 2, "1", "2")
_IMAGE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._/:-]*?)@(?P<digest>sha256:[0-9a-f]{64})")
_PORT = re.compile(r"(?:127\.0\.0\.1:|0\.0\.0\.0:)?(?P<host>\d{1,5}):(?P<inside>\d{1,5})(?:/tcp)?")
_SIZE = re.compile(r"(?P<number>\d{1,12})(?P<unit>[bkmg]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_TAKEN = ("/bin", "/dev", "/dstack", "/etc", "/lib", "/lib64", "/opt/platform", "/proc", "/run", "/sbin")
_TAKEN_TOO = ("/sys", "/usr", "/var/run")
_MAX_BYTES = 1024 * 1024
_MAX_COMPOSE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class AppCompose:
    """app-compose.json, as far as a VMM reads it. `hash` is the SHA-256 (hex) of its bytes."""

    name: str
    hash: str
    docker_compose: str
    key_provider: str
    unsupported: str | None
    """What the local VMM cannot do of it, naming the key; known at CreateVm, told as a boot error."""

    @property
    def app_id(self) -> str:
        """The first 20 bytes of the hash, hex."""
        return self.hash[:40]


@dataclass(frozen=True, slots=True)
class Service:
    """The one service of a docker-compose file. `memory_limit` in bytes; `scratch` are tmpfs places."""

    image: str
    digest: str
    command: tuple[str, ...]
    environment: dict[str, str]
    scratch: tuple[str, ...] = ()
    memory_limit: int | None = None


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
    key_provider = value.get("key_provider") or "none"
    return AppCompose(
        name=value["name"],
        hash=hashlib.sha256(text.encode()).hexdigest(),
        docker_compose=str(value.get("docker_compose_file", "")),
        key_provider=str(key_provider),
        unsupported=_unsupported(value, key_provider),
    )


def check_supported(app: AppCompose) -> None:
    """Refuse what the local VMM would otherwise silently leave out.

    Raises:
        ComposeUnsupported: The message names the key.
    """
    if app.unsupported is not None:
        raise ComposeUnsupported(app.unsupported)


def read_service(text: str) -> Service:
    """The one service of a docker-compose file.

    Raises:
        ComposeUnsupported: Outside the subset; the message names the key.
    """
    if len(text) > _MAX_COMPOSE_BYTES:
        raise ComposeUnsupported(f"docker_compose_file: expected at most {_MAX_COMPOSE_BYTES} characters")
    value = _parse(text)
    services = value.get("services") if isinstance(value, dict) else None
    if not isinstance(services, dict) or len(services) != 1:
        raise ComposeUnsupported("services: expected exactly one service")
    unknown = sorted(str(key) for key in value if key not in ("services", "version", "name"))
    if unknown:
        raise ComposeUnsupported(f"{unknown[0]}: not in the local VMM's subset of docker-compose")
    name, service = next(iter(services.items()))
    at = f"services.{_text(name, 'services')}"
    if not isinstance(service, dict):
        raise ComposeUnsupported(f"{at}: expected a mapping")
    for key in service:
        if key not in _KNOWN:
            raise ComposeUnsupported(f"{at}.{key}: not in the local VMM's subset of docker-compose")
    found = _IMAGE.fullmatch(_text(service.get("image", ""), f"{at}.image"))
    if found is None:
        raise ComposeUnsupported(f"{at}.image: expected name@sha256:<64 hex digits>")
    _check_mounts(f"{at}.volumes", service.get("volumes", []))
    _check_ports(f"{at}.ports", service.get("ports", []))
    options = service.get("security_opt", [])
    if not isinstance(options, list) or any(option not in NESTING for option in options):
        raise ComposeUnsupported(f"{at}.security_opt: expected a list of {' and '.join(NESTING)}")
    if not isinstance(service.get("read_only", True), bool):
        raise ComposeUnsupported(f"{at}.read_only: expected true or false (the root is read-only anyway)")
    return Service(
        image=found["name"],
        digest=found["digest"],
        command=_command(f"{at}.command", service.get("command")),
        environment=_environment(f"{at}.environment", service.get("environment", {})),
        scratch=_scratch(f"{at}.tmpfs", service.get("tmpfs", [])),
        memory_limit=_size(f"{at}.mem_limit", service.get("mem_limit")),
    )


def _unsupported(value: dict[str, Any], key_provider: object) -> str | None:
    if value["manifest_version"] not in _MANIFESTS or isinstance(value["manifest_version"], bool):
        return "manifest_version: the local VMM reads 1 and 2"
    if value["runner"] != "docker-compose":
        return "runner: the local VMM runs docker-compose only"
    if key_provider != "none":
        return "key_provider: the local VMM has none"
    if value.get("init_script") not in (None, "", INIT_SCRIPT):
        return "init_script: the local VMM enforces the platform's own, and runs no other"
    return next((f"{key}: {why}" for key, why in _UNSUPPORTED.items() if value.get(key)), None)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ComposeUnsupported("docker_compose_file: not YAML") from error


def _text(value: object, at: str) -> str:
    """A scalar as text; never `str` of a nested value, which aliases can make as large as they like."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ComposeUnsupported(f"{at}: expected text")
    text = str(value)
    if "$" in text.replace("$$", ""):
        raise ComposeUnsupported(f"{at}: variables are not in the local VMM's subset of docker-compose")
    if "\0" in text:
        raise ComposeUnsupported(f"{at}: expected text without NUL")
    return text.replace("$$", "$")


def _check_mounts(at: str, volumes: object) -> None:
    if not isinstance(volumes, list):
        raise ComposeUnsupported(f"{at}: expected a list")
    for volume in volumes:
        source, _, target = _text(volume, at).partition(":")
        allowed = source == USER_CONFIG or source in AGENT_SOCKETS
        if not allowed or target.removesuffix(":ro").removesuffix(":rw") != source:
            raise ComposeUnsupported(
                f"{at}: {source[:128]!r}: only user config and agent socket, each at its own place"
            )


def _check_ports(at: str, ports: object) -> None:
    if not isinstance(ports, list):
        raise ComposeUnsupported(f"{at}: expected a list")
    for port in ports:
        found = _PORT.fullmatch(_text(port, at))
        if found is None or int(found["host"]) != int(found["inside"]):
            raise ComposeUnsupported(f"{at}: expected PORT:PORT, the same one twice, tcp")


def _command(at: str, command: object) -> tuple[str, ...]:
    if isinstance(command, str):
        command = command.split()
    if not isinstance(command, list) or not command:
        raise ComposeUnsupported(f"{at}: expected a list of strings")
    return tuple(_text(word, at) for word in command)


def _environment(at: str, environment: object) -> dict[str, str]:
    if isinstance(environment, list):
        pairs = [_text(item, at).partition("=") for item in environment]
        if any(not sign for _, sign, _ in pairs):
            raise ComposeUnsupported(f"{at}: expected NAME=value")
        return {name: value for name, _, value in pairs}
    if not isinstance(environment, dict):
        raise ComposeUnsupported(f"{at}: expected a mapping")
    return {_text(key, at): _text(value, f"{at}.{key}") for key, value in environment.items()}


def _scratch(at: str, places: object) -> tuple[str, ...]:
    if not isinstance(places, list):
        places = [places]
    found = []
    for place in places:
        path = _text(place, at)
        taken = any(path == one or path.startswith(f"{one}/") for one in (*_TAKEN, *_TAKEN_TOO))
        if (
            not path.startswith("/")
            or path == "/"
            or posixpath.normpath(path) != path
            or taken
            or ":" in path
        ):
            raise ComposeUnsupported(
                f"{at}: {path[:128]!r}: expected an absolute path that is free, no options"
            )
        found.append(path)
    return tuple(dict.fromkeys(found))


def _size(at: str, size: object) -> int | None:
    if size is None:
        return None
    found = _SIZE.fullmatch(_text(size, at))
    if found is None or not int(found["number"]):
        raise ComposeUnsupported(f"{at}: expected a size as 512m or 1g")
    return int(found["number"]) * _UNITS[found["unit"].lower()]
