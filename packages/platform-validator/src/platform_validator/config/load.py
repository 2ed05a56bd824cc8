"""Reads flags, environment, TOML and defaults into Settings; collects every fault before it gives up."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from platform_protocol.filesystem_policy import overlaps
from platform_protocol.platform_messages import IsolationLevel
from platform_validator.config.settings import OPTIONS, REQUIRED, Option, Origin, Settings
from platform_validator.errors import ValidatorError

_MAX_FILE = 1024 * 1024
_ENVIRONMENT_ONLY = "(environment only)"


class ConfigFaults(ValidatorError):
    """The configuration cannot be used; `faults` has one line for each thing that is wrong."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def load_settings(
    environment: Mapping[str, str],
    *,
    flag_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Settings:
    """Load. `flag_file` is --config; else VALIDATOR_CONFIG; else `config.toml` in `folder`, if it is there.

    Raises:
        ConfigFaults: With every fault.
    """
    faults: list[str] = []
    named = flag_file or (
        Path(environment["VALIDATOR_CONFIG"]) if environment.get("VALIDATOR_CONFIG") else None
    )
    default = (folder or Path()) / "config.toml"
    path = named or (default if default.exists() else None)
    table = _read(path, faults) if path is not None else {}
    known = {option.key: option for option in OPTIONS}
    origins: dict[str, Origin] = {}
    for option in OPTIONS:
        origins[option.key] = _origin(option, environment, table, flags or {}, path)
    faults += [_unknown(key, known, path) for key in table if key not in known]
    values: dict[str, Any] = {}
    for key, origin in origins.items():
        try:
            values[key] = _value(known[key], origin)
        except ValueError as error:
            faults.append(_fault(known[key], origin, str(error)))
    faults += _contradictions(values, origins)
    if faults:
        raise ConfigFaults(faults)
    return Settings(values, origins)


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ValueError(f"expected at most {_MAX_FILE} bytes")
        return dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        faults.append(f"{path}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        faults.append(f"{path}: not TOML: {error}")
    return {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _origin(
    option: Option,
    environment: Mapping[str, str],
    table: Mapping[str, Any],
    flags: Mapping[str, Any],
    path: Path | None,
) -> Origin:
    # 1. Flag. 2. Environment. 3. config.toml. 4. Default.
    if flags.get(option.key) is not None:
        return Origin("flag", flags[option.key])
    for name in option.env:
        if environment.get(name):
            return Origin(f"environment {name}", environment[name])
    if option.key in table:
        return Origin(str(path), table[option.key])
    return Origin("default", option.default)


def _value(option: Option, origin: Origin) -> Any:
    if origin.where == "default":
        if origin.value is REQUIRED:
            raise ValueError("required")
        if origin.value is None or not isinstance(origin.value, str):
            return origin.value
    if option.meaning.endswith(_ENVIRONMENT_ONLY) and origin.where.endswith(".toml"):
        raise ValueError("a secret does not belong into a file that is shared: give it in the environment")
    return option.parser(origin.value)


def _fault(option: Option, origin: Origin, expected: str) -> str:
    if origin.value is REQUIRED:
        given = f"set {option.env[0]}" if option.env else "set it in config.toml"
        return f"{option.key}: required ({option.meaning}): {given}, or in config.toml"
    came = "a secret" if option.secret else repr(origin.value)[:120]
    return f"{option.key} ({origin.where}): {expected}, got {came}"


def _unknown(key: str, known: Mapping[str, Option], path: Path | None) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near else ""
    return f"{key} ({path}): unknown setting{hint}"


def _contradictions(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> list[str]:
    """What each value allows and together they do not; a value that has its own fault is not there."""
    faults = []
    level = values.get("sandbox_config.isolation_level")
    if values.get("attestation.allow_simulated"):
        where = origins["attestation.allow_simulated"].where
        if level is IsolationLevel.TEE:
            faults.append(
                f"attestation.allow_simulated ({where}): at level Tee only a TDX quote is accepted: "
                "unset it, or lower the level"
            )
        elif values.get("attestation.simulated_root_file", "") is None:
            faults.append(f"attestation.allow_simulated ({where}): needs attestation.simulated_root_file")
    if level is IsolationLevel.TEE and values.get("attestation.allow_session_v1"):
        where = origins["attestation.allow_session_v1"].where
        faults.append(
            f"attestation.allow_session_v1 ({where}): expected false at level Tee: version 1 binds no keys "
            "to the quote, so whoever passes a genuine quote on reads submissions and writes results: "
            "unset it, or lower the level"
        )
    if level is IsolationLevel.NONE and not values.get("sandbox_config.unsafe_no_isolation", True):
        faults.append("sandbox_config.isolation_level: None needs sandbox_config.unsafe_no_isolation = true")
    faults += _host_contradictions(values, origins)
    files = "sandbox_config.filesystem_policy"
    faults += [
        f"{files}.denied_paths ({origins[f'{files}.denied_paths'].where}): {clash}"
        for clash in overlaps(
            values.get(f"{files}.allowed_paths", ()), values.get(f"{files}.denied_paths", ())
        )
    ]
    listen = values.get("validator.http_listen")
    if listen is not None and listen == values.get("validator.admin_listen"):
        faults.append("validator.admin_listen: expected another address than validator.http_listen")
    faults += [
        f"{key} ({origins[key].where}): expected one of {', '.join(known)}, got {values[key]!r}"
        for key, known in (
            ("scoring_config.algorithm", ("Linear", "Logarithmic", "Exponential")),
            ("scoring_config.normalization", ("None", "MinMax", "ZScore", "Robust")),
            ("validator.log_format", ("auto", "json", "people")),
        )
        if key in values and values[key] not in known
    ]
    faults += [
        f"sources.allow ({origins['sources.allow'].where}): expected https, ssh or file, got {one!r}"
        for one in values.get("sources.allow", ())
        if one not in ("https", "ssh", "file")
    ]
    return faults


def _host_contradictions(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> list[str]:
    listed = values.get("vmm", ())
    if not listed:
        return []
    faults = [
        f"{key} ({origins[key].where}): each [[vmm]] has its own: leave one of them out"
        for key in ("dstack.vmm_url", "dstack.port_address", "dstack.token", "dstack.auth_user")
        if origins[key].where != "default"
    ]
    if len(listed) > 1 and values.get("attestation.allow_simulated"):
        faults.append(
            "attestation.allow_simulated: the simulated quotes of several hosts have a root each, and one is "
            "trusted: unset it, or use one host"
        )
    return faults
