"""The table of settings. One row each: TOML key, environment, default, what it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from platform_protocol.filesystem_policy import (
    LEAST_TMPFS_MB,
    MOST_PATHS,
    FilesystemPolicy,
    hidden_path,
    writable_path,
)
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.config import parse
from platform_validator.config.hosts import HostSettings, hosts
from platform_validator.config.parse import Parser
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.network_policy import NetworkPolicy

REQUIRED = object()
MIB = 1024 * 1024


class ValueKeyOrigin(StrEnum):
    """Where the key of dynamic values comes from."""

    KEYRING = "keyring"
    CREDENTIAL = "credential"
    DSTACK = "dstack"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting.

    `secret`: never shown; `later`: read and checked, and named as not in force yet; `reloads`: a reload
    brings a new value into force, where the others wait for a restart.
    """

    key: str
    parser: Parser
    default: Any
    meaning: str
    env: tuple[str, ...] = ()
    secret: bool = False
    later: bool = False
    reloads: bool = False


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `flag --x`, `environment X`, `config.toml`, or `default`."""

    where: str
    value: Any


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration, checked. Read it with the properties; `origins` says where each came from."""

    values: Mapping[str, Any] = field(repr=False)
    origins: Mapping[str, Origin] = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def db_path(self) -> Path:
        """The validator's database; its folder is the state directory."""
        return Path(self["validator.db_path"]).absolute()

    @property
    def level(self) -> IsolationLevel:
        """The least isolation."""
        level: IsolationLevel = self["sandbox_config.isolation_level"]
        return level

    @property
    def limits(self) -> Resources:
        """Totals for all CVMs."""
        names = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count")
        return Resources(**{name: self[f"resource_limits.{name}"] for name in names})

    @property
    def hosts(self) -> tuple[HostSettings, ...]:
        """The VMM hosts: those of `[[vmm]]`, else the one of `dstack.vmm_url`."""
        listed: tuple[HostSettings, ...] = self["vmm"]
        if listed:
            return listed
        url, address = self["dstack.vmm_url"], self["dstack.port_address"]
        return (HostSettings(DEFAULT_HOST, url, port_address=address),)

    @property
    def network(self) -> NetworkPolicy:
        """What CVMs may reach."""
        return NetworkPolicy(
            allow_outbound=self[f"{_POLICY}.allow_outbound"],
            hosts=tuple(self[f"{_POLICY}.allowed_hosts"]),
            ports=tuple(self[f"{_POLICY}.allowed_ports"]),
        )

    @property
    def filesystem(self) -> FilesystemPolicy:
        """What CVMs may write and may not see."""
        size: int | None = self[f"{_FILES}.tmpfs_size"]
        return FilesystemPolicy(
            read_only=self[f"{_FILES}.read_only"],
            allowed_paths=self[f"{_FILES}.allowed_paths"],
            denied_paths=self[f"{_FILES}.denied_paths"],
            tmpfs_size_mb=None if size is None else size // MIB,
        )

    def taking(self, other: Settings, keys: Iterable[str]) -> Settings:
        """These settings with some keys as they are in another configuration."""
        keys = set(keys)
        return Settings(
            {**self.values, **{key: other.values[key] for key in keys}},
            {**self.origins, **{key: other.origins[key] for key in keys}},
        )

    def seconds(self, key: str) -> float:
        """A duration's seconds."""
        duration: timedelta = self[key]
        return duration.total_seconds()


def _o(key: str, parser: Parser, default: Any, meaning: str, *env: str, **more: bool) -> Option:
    return Option(key, parser, default, meaning, env, **more)


def _r(key: str, parser: Parser, default: Any, meaning: str, *env: str) -> Option:
    """One that reloads."""
    return Option(key, parser, default, meaning, env, reloads=True)


_POSITIVE = parse.whole(1)
_POLICY, _FILES = "sandbox_config.network_policy", "sandbox_config.filesystem_policy"

# Intel's words, from best to worst; Revoked is never accepted.
_TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
_CHECKS = {
    "tcb_status": "a TCB status that is not accepted: required, warn or off (default: required)",
    "advisories": "an advisory that is not accepted (default: required)",
    "key_provider": "another key provider than the app-compose asks for (default: required)",
    "mr_config_id": "an MRCONFIGID that binds another app (default: required)",
    "os_image": "an OS image whose measurements are not known (default: required at Tee, else off)",
}

OPTIONS: tuple[Option, ...] = (
    _o("validator.hotkey", parse.hotkey, REQUIRED, "SS58 address of the validator", "VALIDATOR_HOTKEY"),
    _o(
        "validator.db_path",
        parse.text,
        "./validator.db",
        "its folder is the state directory",
        "VALIDATOR_DB_PATH",
    ),
    _o(
        "validator.base_url",
        parse.web_url,
        "http://10.0.2.2:18080",
        "this validator, as a CVM reaches it",
        "VALIDATOR_BASE_URL",
    ),
    _o(
        "validator.http_listen",
        parse.listen,
        "127.0.0.1:18080",
        "the listener for CVMs and probes",
        "VALIDATOR_HTTP_LISTEN",
    ),
    _o(
        "validator.admin_listen",
        parse.listen,
        "127.0.0.1:18081",
        "the operator's API",
        "VALIDATOR_ADMIN_LISTEN",
    ),
    _r(
        "validator.log",
        parse.text,
        "info",
        "log level and directives: info, platform_validator=debug",
        "VALIDATOR_LOG",
        "RUST_LOG",
    ),
    _r("validator.log_format", parse.text, "auto", "auto, json or people", "VALIDATOR_LOG_FORMAT"),
    _o("platform.base_api", parse.web_url, REQUIRED, "the Platform API", "PLATFORM_BASE_API"),
    _o(
        "dstack.vmm_url",
        parse.vmm_url,
        "http://localhost:11530",
        "the VMM: http, https or unix:",
        "DSTACK_VMM_URL",
    ),
    _o(
        "dstack.token",
        parse.text,
        None,
        "the VMM's token (environment only)",
        "DSTACK_VMM_TOKEN",
        secret=True,
    ),
    _o("dstack.auth_user", parse.text, None, "Basic authentication at the VMM", "DSTACK_VMM_AUTH_USER"),
    _o(
        "dstack.auth_password",
        parse.text,
        None,
        "its password (environment only)",
        "DSTACK_VMM_AUTH_PASSWORD",
        secret=True,
    ),
    _o("dstack.port_range", parse.port_range, "10000-19999", "host ports for CVMs"),
    _o("dstack.port_address", parse.text, "127.0.0.1", "the host under which mapped ports are reached"),
    _o("vmm", hosts, (), "VMM hosts, one table [[vmm]] each, instead of dstack.vmm_url"),
    _r("resource_limits.cpu_cores", _POSITIVE, 4, "CPU cores of all CVMs together", "VALIDATOR_CPU_CORES"),
    _r(
        "resource_limits.memory_mb", _POSITIVE, 2048, "memory of all CVMs together, MB", "VALIDATOR_MEMORY_MB"
    ),
    _r("resource_limits.disk_mb", _POSITIVE, 10240, "disk of all CVMs together, MB", "VALIDATOR_DISK_MB"),
    _r("resource_limits.gpu_count", parse.whole(0), 0, "GPUs of all CVMs together", "VALIDATOR_GPU_COUNT"),
    _r("resource_limits.max_cvms", _POSITIVE, 16, "CVMs at once"),
    _r("jobs.max_concurrent", _POSITIVE, 4, "active jobs at once", "VALIDATOR_MAX_CONCURRENT_JOBS"),
    _r("jobs.outage_grace", parse.duration, "1h", "how long work goes on with unanswered renewals"),
    _r("jobs.stall_limit", parse.duration, "10min", "how long a job's own task may be silent"),
    _r("jobs.drain_timeout", parse.duration, "15min", "how long a drain may take"),
    _r("http.metrics", parse.boolean, True, "serve /metrics", "VALIDATOR_METRICS"),
    _o(
        "sources.allow",
        parse.listing(parse.text),
        ("https",),
        "how challenges may be fetched: https, ssh, file",
    ),
    _o("sources.cache_size", parse.size, "10GiB", "challenge bundles kept on disk; those in use count"),
    _o(
        "sources.credentials_file",
        parse.text,
        None,
        "for private repositories over https: lines https://user:token@host, 0600",
    ),
    _o("sources.ssh_key_file", parse.text, None, "for repositories over ssh: a private key, 0600"),
    _o("sources.ssh_known_hosts_file", parse.text, None, "the ssh servers that are trusted (known_hosts)"),
    _o("cvm.runtime", parse.text, None, "runtime for dstack images: repository@sha256:…"),
    _o(
        "sandbox_config.isolation_level",
        parse.choice(IsolationLevel),
        IsolationLevel.TEE,
        "the least isolation",
    ),
    _o("sandbox_config.unsafe_no_isolation", parse.boolean, False, "allow level None"),
    _o("sandbox_config.resource_monitoring", parse.boolean, True, "sample what CVMs use"),
    _o(f"{_POLICY}.allow_outbound", parse.boolean, False, "let CVMs out through the egress proxy"),
    _o(
        f"{_POLICY}.allowed_hosts",
        parse.listing(parse.host_pattern),
        (),
        "hosts that CVMs may reach, where their challenge asks for them",
    ),
    _o(
        f"{_POLICY}.allowed_ports",
        parse.listing(parse.whole(1, 65535)),
        (443, 80),
        "ports that CVMs may reach: a tunnel carries TLS on all but 80",
    ),
    _o(
        f"{_POLICY}.dns_servers",
        parse.listing(parse.dns_server),
        (),
        "the egress proxy's resolvers (default: the system's)",
    ),
    _o(
        "egress.listen",
        parse.listen,
        "127.0.0.1:3128",
        "the egress proxy's listener",
        "VALIDATOR_EGRESS_LISTEN",
    ),
    _o(
        "egress.base_url",
        parse.web_url,
        "http://10.0.2.2:3128",
        "the egress proxy, as a CVM reaches it",
        "VALIDATOR_EGRESS_BASE_URL",
    ),
    _o("egress.connections", _POSITIVE, 64, "connections of one CVM to the outside at once"),
    _o("egress.all_connections", _POSITIVE, 512, "connections of all CVMs to the outside at once"),
    _o("egress.max_bytes", parse.size, "10GiB", "what one CVM may move out and in, in its life"),
    _o("egress.rate", parse.size, 0, "bytes a second of one CVM, out and in together; 0: any"),
    _o(
        "egress.denied_networks",
        parse.listing(parse.network),
        (),
        "networks that no CVM is connected to, beside all that is not public",
    ),
    _o(f"{_FILES}.read_only", parse.boolean, True, "the system in a CVM is read-only"),
    _o(
        f"{_FILES}.allowed_paths",
        parse.listing(writable_path, MOST_PATHS),
        (),
        "more writable places in a CVM, on its one disk",
    ),
    _o(
        f"{_FILES}.denied_paths",
        parse.listing(hidden_path, MOST_PATHS),
        (),
        "paths that show nothing in a CVM",
    ),
    _o(
        f"{_FILES}.tmpfs_size",
        parse.size_from(LEAST_TMPFS_MB * MIB),
        None,
        "most bytes in all writable places of a CVM together (default: its disk)",
    ),
    _o("scoring_config.algorithm", parse.text, "Linear", "Linear, Logarithmic or Exponential"),
    _o("scoring_config.normalization", parse.text, "MinMax", "None, MinMax, ZScore or Robust"),
    _o("attestation.allow_simulated", parse.boolean, False, "accept simulated quotes, below Tee"),
    _o("attestation.simulated_root_file", parse.text, None, "the root that simulated quotes must have (PEM)"),
    _o(
        "attestation.allow_session_v1",
        parse.boolean,
        None,
        "speak session version 1, below Tee (default: as allow_simulated)",
    ),
    _o(
        "attestation.pccs_url",
        parse.web_url,
        "https://api.trustedservices.intel.com",
        "the collateral service",
        "PCCS_URL",
    ),
    _o("attestation.offline", parse.boolean, False, "never ask the collateral service: what is kept must do"),
    _o("attestation.collateral_refresh", parse.duration, "12h", "how often the collateral service is asked"),
    _o(
        "attestation.tcb_statuses",
        parse.listing(parse.word(*_TCB_STATUSES)),
        ("UpToDate",),
        "accepted TCB statuses of the platform",
    ),
    _o("attestation.advisories", parse.listing(parse.text), (), "accepted Intel advisories, or any"),
    _o("attestation.tcb_grace", parse.duration, "0s", "how long an out-of-date platform is still accepted"),
    _o("attestation.images_file", parse.text, None, "known OS images (default: images.toml beside db_path)"),
    *(
        _o(f"attestation.checks.{name}", parse.word("required", "warn", "off"), None, meaning)
        for name, meaning in _CHECKS.items()
    ),
    _o(
        "values.key_source",
        parse.choice(ValueKeyOrigin),
        ValueKeyOrigin.KEYRING,
        "where the key of dynamic values comes from: keyring, credential or dstack",
    ),
    _o(
        "values.agent_socket",
        parse.text,
        "/var/run/dstack.sock",
        "the guest agent, where the validator itself runs in a CVM (values.key_source dstack)",
    ),
    _o("values.max_keys", _POSITIVE, 10_000, "dynamic values of one challenge"),
    _o("values.max_bytes", parse.size, "64MiB", "keys and values of one challenge together, bytes"),
    _o(
        "keys.hotkey_file",
        parse.text,
        None,
        "a Bittensor keyfile, a mnemonic or a 0x seed",
        "VALIDATOR_HOTKEY_FILE",
    ),
    _o(
        "keys.password_file",
        parse.text,
        None,
        "the password of an encrypted hotkey file, in its first line (0600)",
        "VALIDATOR_HOTKEY_PASSWORD_FILE",
    ),
    _o(
        "keys.passphrase",
        parse.text,
        None,
        "a mnemonic with an optional derivation path (environment only)",
        "HOTKEY_PASSPHRASE",
        secret=True,
    ),
)
