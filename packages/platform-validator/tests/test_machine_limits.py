"""Limits that promise more than this machine has are said, where the VMM is on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from platform_protocol.resources import Resources
from platform_validator.config import Settings, load_settings
from platform_validator.daemon.board import Board
from platform_validator.machine import beyond, is_here, machine_resources
from platform_validator.telemetry.metrics import Metrics

HAS = Resources(cpu_cores=4, memory_mb=8000, disk_mb=100_000, gpu_count=1)


def test_a_limit_above_the_machine_is_a_line_in_the_guide_s_order() -> None:
    """What is exactly there is not above it."""
    assert list(beyond(HAS, HAS)) == []
    more = Resources(cpu_cores=5, memory_mb=8001, disk_mb=100_000, gpu_count=2)
    assert list(beyond(more, HAS)) == [
        "cpu_cores = 5, and this machine, where the VMM runs, has 4",
        "memory_mb = 8001, and this machine, where the VMM runs, has 8000",
        "gpu_count = 2, and this machine, where the VMM runs, has 1",
    ]


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("unix:/run/vmm.sock", True),
        ("http://localhost:11530", True),
        ("http://127.0.0.1:11530", True),
        ("http://[::1]:11530", True),
        ("http://vmm.example:11530", False),
        ("https://10.0.0.7", False),
    ],
)
def test_a_vmm_s_url_tells_whether_it_is_here(url: str, here: bool) -> None:
    assert is_here(url) is here


def test_the_machine_is_looked_at(tmp_path: Path) -> None:
    """GPUs are NVIDIA's display controllers as the kernel lists them; the folder need not be there yet."""
    for name, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),
        ("0000:02:00.0", "0x8086", "0x030000"),
    ):
        device = tmp_path / "devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    (tmp_path / "devices" / "0000:03:00.0").mkdir()
    found = machine_resources(tmp_path / "not" / "yet", devices=tmp_path / "devices")
    assert found.gpu_count == 1
    assert found.cpu_cores >= 1
    assert found.memory_mb > 100
    assert found.disk_mb > 100


def settings(**environment: str) -> Settings:
    """A configuration with limits that no machine has."""
    given = {
        "VALIDATOR_HOTKEY": "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY",
        "PLATFORM_BASE_API": "http://platform.invalid",
        "VALIDATOR_CPU_CORES": "100000",
    }
    return load_settings(given | environment)


def test_the_status_warns_of_it_unless_the_vmm_is_elsewhere(tmp_path: Path) -> None:
    here = Board(settings(VALIDATOR_DB_PATH=str(tmp_path / "v.db")), Metrics())
    assert [line.split(",")[0] for line in here.warnings()] == ["resource_limits.cpu_cores = 100000"]
    elsewhere = Board(settings(DSTACK_VMM_URL="http://vmm.example:11530"), Metrics())
    assert elsewhere.warnings() == []
