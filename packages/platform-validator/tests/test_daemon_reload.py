"""What a reload applies, what waits for a restart and why, and what changes nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from platform_protocol.signing import Keypair
from platform_validator.config import OPTIONS, ConfigFaults, Settings, load_settings
from platform_validator.config.settings import Option
from platform_validator.daemon.reload import Change, plan_reload, why

HOTKEY = Keypair.from_seed(bytes(32)).address
OTHER = Keypair.from_seed(bytes([1]) * 32).address
ENVIRONMENT = {"VALIDATOR_HOTKEY": HOTKEY, "PLATFORM_BASE_API": "http://platform-api:8080"}

APPLIED = [
    ("validator.log", "info", "debug"),
    ("validator.log_format", "auto", "json"),
    ("resource_limits.cpu_cores", 4, 8),
    ("resource_limits.memory_mb", 2048, 1024),
    ("resource_limits.disk_mb", 10240, 20480),
    ("resource_limits.gpu_count", 0, 1),
    ("resource_limits.max_cvms", 16, 2),
    ("jobs.max_concurrent", 4, 1),
    ("jobs.outage_grace", "1h", "2h"),
    ("jobs.stall_limit", "10min", "1min"),
    ("jobs.drain_timeout", "15min", "1h"),
    ("http.metrics", True, False),
]

WAITING = [
    ("validator.hotkey", OTHER, "signed with its key"),
    ("validator.db_path", "/srv/validator.db", "is locked"),
    ("validator.base_url", "http://10.0.2.2:9000", "were told it"),
    ("validator.http_listen", "127.0.0.1:9000", "is bound"),
    ("validator.admin_listen", "127.0.0.1:9001", "is bound"),
    ("platform.base_api", "http://elsewhere:8080", "claims that are held"),
    ("dstack.vmm_url", "unix:/run/vmm.sock", "made there"),
    ("dstack.auth_user", "me", "made there"),
    ("dstack.port_range", "20000-20010", "ports counted"),
    ("dstack.port_address", "10.0.0.1", "ports counted"),
    ("sources.allow", ["ssh"], "fetched under it"),
    ("cvm.runtime", f"runtime@sha256:{'0' * 64}", "resolved with it"),
    ("sandbox_config.isolation_level", "Container", "admitted under it"),
    ("sandbox_config.unsafe_no_isolation", True, "admitted under it"),
    ("sandbox_config.resource_monitoring", False, "begins with a start"),
    ("scoring_config.algorithm", "Logarithmic", "scored alike"),
    ("scoring_config.normalization", "ZScore", "scored alike"),
    ("attestation.pccs_url", "https://pccs.example", "admitted under it"),
    ("attestation.allow_session_v1", False, "admitted under it"),
    ("keys.hotkey_file", "/etc/hotkey", "signed with its key"),
]

INVALID = [
    ("[jobs]\nmax_concurrent = 0", ["jobs.max_concurrent"]),
    ("[jobs]\nmax_concurent = 3", ["did you mean jobs.max_concurrent"]),
    ("[validator]\nlog = 'loud'", ["given.toml): expected a level"]),
    ("[jobs]\nstall_limit = 'soon'\n[http]\nmetrics = 'perhaps'", ["jobs.stall_limit", "http.metrics"]),
    ("[attestation]\nallow_simulated = true", ["at level Tee only a TDX quote"]),
    ("no toml", ["not TOML"]),
]


def given(folder: Path, toml: str = "", **environment: str) -> Settings | ConfigFaults:
    """What reading the configuration gives."""
    path = folder / "given.toml"
    path.write_text(toml)
    try:
        return load_settings(ENVIRONMENT | environment, flag_file=path, folder=folder)
    except ConfigFaults as error:
        return error


def changed(folder: Path, **values: Any) -> Settings:
    """The defaults but for some values."""
    return load_settings(ENVIRONMENT, flags=values, folder=folder)


@pytest.fixture
def old(tmp_path: Path) -> Settings:
    return changed(tmp_path)


def test_nothing_changed_changes_nothing(old: Settings, tmp_path: Path) -> None:
    plan = plan_reload(old, changed(tmp_path))
    assert (plan.applied, plan.restart, plan.invalid) == ((), (), ())
    assert dict(plan.settings.values) == dict(old.values)


@pytest.mark.parametrize(("key", "before", "after"), APPLIED)
def test_what_reloads_comes_into_force(
    old: Settings, tmp_path: Path, key: str, before: object, after: object
) -> None:
    new = changed(tmp_path, **{key: after})
    plan = plan_reload(old, new)
    assert plan.applied == (Change(key, before, after),)
    assert (plan.restart, plan.invalid) == ((), ())
    assert plan.settings[key] == new[key]
    assert plan.settings.origins[key].where == "flag"


@pytest.mark.parametrize(("key", "after", "reason"), WAITING)
def test_the_rest_keeps_its_value_and_says_why(
    old: Settings, tmp_path: Path, key: str, after: object, reason: str
) -> None:
    """It is told again at each reload, until a restart."""
    plan = plan_reload(old, changed(tmp_path, **{key: after}))
    [change] = plan.restart
    assert (change.setting, change.new) == (key, after)
    assert reason in change.reason
    assert (plan.applied, plan.invalid) == ((), ())
    assert plan.settings[key] == old[key]
    assert plan_reload(plan.settings, changed(tmp_path, **{key: after})).restart == plan.restart


@pytest.mark.parametrize(("toml", "faults"), INVALID)
def test_of_an_invalid_configuration_nothing_is_applied(
    old: Settings, tmp_path: Path, toml: str, faults: list[str]
) -> None:
    """Not even what is right in it; each fault is told."""
    plan = plan_reload(old, given(tmp_path, toml, VALIDATOR_CPU_CORES="8"))
    assert len(plan.invalid) == len(faults)
    assert all(any(fault in line for line in plan.invalid) for fault in faults)
    assert (plan.applied, plan.restart) == ((), ())
    assert plan.settings is old


def test_both_kinds_together(old: Settings, tmp_path: Path) -> None:
    new = changed(tmp_path, **{"jobs.max_concurrent": 2, "dstack.vmm_url": "unix:/run/vmm.sock"})
    plan = plan_reload(old, new)
    assert [change.setting for change in plan.applied] == ["jobs.max_concurrent"]
    assert [change.setting for change in plan.restart] == ["dstack.vmm_url"]
    assert plan.settings["jobs.max_concurrent"] == 2
    assert plan.settings["dstack.vmm_url"] == old["dstack.vmm_url"]


def test_a_value_written_in_another_way_is_no_change(old: Settings, tmp_path: Path) -> None:
    plan = plan_reload(old, changed(tmp_path, **{"jobs.drain_timeout": "900s"}))
    assert (plan.applied, plan.restart) == ((), ())


def test_a_secret_is_not_shown(old: Settings, tmp_path: Path) -> None:
    plan = plan_reload(old, changed(tmp_path, **{"dstack.token": "hunter2hunter2"}))
    assert plan.restart == (Change("dstack.token", None, "(secret)", plan.restart[0].reason),)
    assert "hunter2" not in repr(plan)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_setting_reloads_or_says_why_not(option: Option) -> None:
    """And the cases above have every setting that reloads."""
    assert (option.key in {key for key, _, _ in APPLIED}) == option.reloads
    assert not (option.reloads and option.later)
    assert option.reloads or why(option)
