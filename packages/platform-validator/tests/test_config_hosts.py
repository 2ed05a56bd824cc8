"""`[[vmm]]`: several VMM hosts, their credentials, and all that may be wrong with them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from platform_protocol.resources import Resources
from platform_validator.clock import SystemClock
from platform_validator.config import ConfigFaults, Settings, load_settings
from platform_validator.config.hosts import (
    Credentials,
    CredentialsUnusable,
    HostSettings,
    hosts,
    read_credentials,
)
from platform_validator.config.promises import promised_beyond
from platform_validator.daemon.vmm_hosts import make_hosts, make_vmms
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.state import StateUnusable

REQUIRED = {
    "VALIDATOR_HOTKEY": "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY",
    "PLATFORM_BASE_API": "http://platform.invalid",
}
EXAMPLE = Path(__file__).resolve().parents[3] / "config.example.toml"
TWO = """
[[vmm]]
name = "big"
url = "https://vmm.example:11530"
base_url = "https://validator.example"
port_address = "10.0.0.7"
port_range = "20000-20009"
limits = { cpu_cores = 8, max_cvms = 3 }
labels = ["rack-1", "gpu"]

[[vmm]]
name = "small"
url = "unix:/run/vmm.sock"
"""


def load(folder: Path, toml: str, **environment: str) -> Settings:
    (folder / "config.toml").write_text(toml)
    return load_settings(REQUIRED | environment, folder=folder)


def faults(folder: Path, toml: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigFaults) as caught:
        load(folder, toml, **environment)
    return caught.value.faults


def test_without_vmm_tables_the_vmm_url_is_the_only_host(tmp_path: Path) -> None:
    """The simple default, with its credentials from the environment."""
    settings = load(tmp_path, "", DSTACK_VMM_URL="unix:/run/vmm.sock", DSTACK_VMM_TOKEN="t0ken")
    assert settings.hosts == (HostSettings(DEFAULT_HOST, "unix:/run/vmm.sock"),)
    [vmm] = make_vmms(settings)
    [host] = make_hosts(settings, (vmm,), SystemClock())
    assert (host.name, host.limits, host.base_url) == ("default", None, None)
    assert vmm._wire._headers["X-Admin-Token"] == "t0ken"


def test_each_table_is_a_host(tmp_path: Path) -> None:
    """What a limit leaves out is bounded by the totals; ports are shared under one address."""
    settings = load(tmp_path, TWO)
    big, small = make_hosts(settings, make_vmms(settings), SystemClock())
    assert (big.name, big.url, big.base_url, big.labels) == (
        "big",
        "https://vmm.example:11530",
        "https://validator.example",
        ("rack-1", "gpu"),
    )
    assert big.limits is not None
    assert (big.limits.resources.cpu_cores, big.limits.max_cvms) == (8, 3)
    assert big.limits.resources.memory_mb > 10**9
    assert [big.ports.take(), small.ports.take()] == [20_000, 10_000]
    assert small.limits is None


def test_hosts_under_one_address_never_give_one_port_twice(tmp_path: Path) -> None:
    toml = '[[vmm]]\nname = "a"\nurl = "unix:/a"\n[[vmm]]\nname = "b"\nurl = "unix:/b"\n'
    settings = load(tmp_path, toml)
    first, second = make_hosts(settings, make_vmms(settings), SystemClock())
    assert [first.ports.take(), second.ports.take()] == [10_000, 10_001]


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("vmm = 1", ["expected tables [[vmm]]"]),
        ("[[vmm]]", ["host 1: name is required", "host 1: url is required"]),
        (
            '[[vmm]]\nname = "A b"\nurl = "ftp://x"\nlabel = ["x"]',
            ["host 1 (A b): name: expected up to 40", "url: expected", "label: did you mean labels?"],
        ),
        (
            '[[vmm]]\nname = "a"\nurl = "unix:/a"\nlimits = { cpu_core = 1 }\nport_range = "9"',
            ["limits: unknown setting cpu_core: did you mean cpu_cores?", "port_range: expected FIRST-LAST"],
        ),
        (
            '[[vmm]]\nname = "a"\nurl = "unix:/a"\nlimits = { cpu_cores = 0 }',
            ["limits: expected an integer from 1"],
        ),
        (
            '[[vmm]]\nname = "a"\nurl = "unix:/a"\n[[vmm]]\nname = "a"\nurl = "unix:/a"',
            ["two hosts have the name a", "two hosts have the url unix:/a"],
        ),
    ],
)  # fmt: skip
def test_all_faults_of_all_hosts_are_told_in_one_line(tmp_path: Path, toml: str, parts: list[str]) -> None:
    [fault] = faults(tmp_path, toml)
    assert fault.startswith("vmm (")
    for part in parts:
        assert part in fault


def test_the_single_vmm_s_settings_beside_a_list_are_a_contradiction(tmp_path: Path) -> None:
    """Which one is meant cannot be known; several simulated roots are none that can be trusted."""
    toml = TWO + '[attestation]\nallow_simulated = true\nsimulated_root_file = "r.pem"\n'
    toml += '[sandbox_config]\nisolation_level = "Container"\n'
    found = faults(tmp_path, toml, DSTACK_VMM_URL="unix:/x", DSTACK_VMM_TOKEN="s3cret")
    assert [line.partition(" ")[0] for line in found] == [
        "dstack.vmm_url",
        "dstack.token",
        "attestation.allow_simulated:",
    ]
    assert "s3cret" not in "".join(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t0ken==\n", Credentials(token="t0ken==")),
        ("# made by hand\n\nDSTACK_VMM_TOKEN=a=b\n", Credentials(token="a=b")),
        ("DSTACK_VMM_AUTH_USER=me\nDSTACK_VMM_AUTH_PASSWORD=p w\n", Credentials(user="me", password="p w")),
    ],
)
def test_credentials_are_a_token_or_the_environment_s_names(
    tmp_path: Path, text: str, expected: Credentials
) -> None:
    path = tmp_path / "credentials"
    path.write_text(text)
    path.chmod(0o600)
    assert read_credentials(path) == expected


@pytest.mark.parametrize(
    ("data", "mode", "said"),
    [
        (b"t0ken", 0o640, "chmod 600"),
        (b"", 0o600, "expected a token alone"),
        (b"two words", 0o600, "expected a token alone"),
        (b"TOKEN=a\nUSER=b", 0o600, "expected a token alone"),
        (b"\xff\xfe", 0o600, "cannot be read"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_credentials_that_cannot_be_used_end_the_start(
    tmp_path: Path, data: bytes | None, mode: int, said: str
) -> None:
    """And say what to do, never what is in them."""
    path = tmp_path / "credentials"
    if data is not None:
        path.write_bytes(data)
        path.chmod(mode)
    with pytest.raises(CredentialsUnusable, match=said) as caught:
        read_credentials(path)
    assert "t0ken" not in str(caught.value)
    settings = load(tmp_path, f'[[vmm]]\nname = "a"\nurl = "unix:/a"\ncredentials_file = "{path}"\n')
    with pytest.raises(StateUnusable, match="VMM host a: credentials_file"):
        make_vmms(settings)


def test_limits_of_a_host_on_this_machine_are_judged_by_it(tmp_path: Path) -> None:
    """Totals only where every host is here: elsewhere there may be more."""
    settings = load(tmp_path, TWO + "limits = { cpu_cores = 64 }\n", VALIDATOR_MEMORY_MB="99999999")
    has = Resources(cpu_cores=2, memory_mb=2, disk_mb=10**9)
    found = [line.partition(",")[0] for line in promised_beyond(settings, has)]
    assert found == ["vmm small: cpu_cores = 64"]


def test_the_example_s_hosts_are_loaded_as_they_stand_there(tmp_path: Path) -> None:
    """What is commented out is a configuration."""
    block = re.search(r"(?:^# .*\n|^#\n)*^# \[\[vmm\]\]\n(?:^#.*\n)+", EXAMPLE.read_text(), re.MULTILINE)
    assert block is not None
    toml = "\n".join(line[2:] for line in block[0].splitlines() if re.match(r"# (\[|[a-z_]+ = )", line))
    names = {host.name for host in hosts(tomllib.loads(toml)["vmm"])}
    assert names == {"big", "small"}
