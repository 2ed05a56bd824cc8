"""Settings: precedence, defaults, where each came from, and every fault at once."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path

import pytest

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.signing import Keypair
from platform_validator.config import OPTIONS, ConfigFaults, Settings, load_settings, parse

HOTKEY = Keypair.from_seed(bytes(32)).address
REQUIRED = {"VALIDATOR_HOTKEY": HOTKEY, "PLATFORM_BASE_API": "http://platform-api:8080"}
EXAMPLE = Path(__file__).resolve().parents[3] / "config.example.toml"
GUIDE = """\
# Resource limits
[resource_limits]
cpu_cores = 4
memory_mb = 2048
disk_mb = 10240

# Sandbox configuration
[sandbox_config]
isolation_level = "Tee"
resource_monitoring = true

# Network policy
[sandbox_config.network_policy]
allow_outbound = true
allowed_hosts = ["api.openai.com", "huggingface.co"]
allowed_ports = [443, 80]

# Scoring configuration
[scoring_config]
algorithm = "Linear"
normalization = "MinMax"
"""


def load(tmp_path: Path, toml: str = "", **environment: str) -> Settings:
    """Settings of a file and an environment."""
    path = tmp_path / "given.toml"
    path.write_text(toml)
    return load_settings(REQUIRED | environment, flag_file=path, folder=tmp_path)


def faults(tmp_path: Path, toml: str = "", **environment: str) -> list[str]:
    """The faults of a file and an environment."""
    with pytest.raises(ConfigFaults) as caught:
        load(tmp_path, toml, **environment)
    return caught.value.faults


def test_the_guides_defaults_hold(tmp_path: Path) -> None:
    """With what is required alone."""
    settings = load_settings(REQUIRED, folder=tmp_path)
    assert settings["dstack.vmm_url"] == "http://localhost:11530"
    assert settings.limits == Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240, gpu_count=0)
    assert settings["validator.db_path"] == "./validator.db"
    assert settings["validator.base_url"] == "http://10.0.2.2:18080"
    assert settings["validator.http_listen"] == ("127.0.0.1", 18080)
    assert settings["validator.admin_listen"] == ("127.0.0.1", 18081)
    assert settings["jobs.outage_grace"] == timedelta(hours=1)
    assert settings["jobs.drain_timeout"] == timedelta(minutes=15)
    assert settings.level is IsolationLevel.TEE
    assert settings["sandbox_config.network_policy.allowed_ports"] == (443, 80)
    assert settings["sandbox_config.network_policy.allow_outbound"] is False
    assert settings["attestation.allow_simulated"] is False


@pytest.mark.parametrize(
    ("name", "key", "text", "value"),
    [
        ("DSTACK_VMM_URL", "dstack.vmm_url", "unix:/run/vmm.sock", "unix:/run/vmm.sock"),
        ("VALIDATOR_CPU_CORES", "resource_limits.cpu_cores", "8", 8),
        ("VALIDATOR_MEMORY_MB", "resource_limits.memory_mb", "512", 512),
        ("VALIDATOR_DISK_MB", "resource_limits.disk_mb", "99", 99),
        ("VALIDATOR_GPU_COUNT", "resource_limits.gpu_count", "2", 2),
        ("VALIDATOR_DB_PATH", "validator.db_path", "/var/lib/v.db", "/var/lib/v.db"),
        ("VALIDATOR_BASE_URL", "validator.base_url", "https://v.example/", "https://v.example"),
        ("VALIDATOR_HTTP_LISTEN", "validator.http_listen", "[::1]:9", ("::1", 9)),
        ("VALIDATOR_ADMIN_LISTEN", "validator.admin_listen", "127.0.0.1:9", ("127.0.0.1", 9)),
        ("VALIDATOR_LOG", "validator.log", "debug", "debug"),
        ("RUST_LOG", "validator.log", "warn", "warn"),
        ("VALIDATOR_MAX_CONCURRENT_JOBS", "jobs.max_concurrent", "7", 7),
        ("VALIDATOR_METRICS", "http.metrics", "off", False),
        ("PCCS_URL", "attestation.pccs_url", "https://pccs.example", "https://pccs.example"),
        ("DSTACK_VMM_TOKEN", "dstack.token", "t0ken", "t0ken"),
    ],
)
def test_each_environment_variable_sets_its_setting(
    tmp_path: Path, name: str, key: str, text: str, value: object
) -> None:
    settings = load(tmp_path, **{name: text})
    assert settings[key] == value
    assert settings.origins[key].where == f"environment {name}"


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    toml = "[resource_limits]\ncpu_cores = 1\nmemory_mb = 1\ndisk_mb = 1\n"
    path = tmp_path / "given.toml"
    path.write_text(toml)
    settings = load_settings(
        REQUIRED | {"VALIDATOR_CPU_CORES": "2", "VALIDATOR_MEMORY_MB": "2"},
        flag_file=path,
        flags={"resource_limits.cpu_cores": 3},
    )
    keys = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count")
    assert [settings[f"resource_limits.{key}"] for key in keys] == [3, 2, 1, 0]
    found = [settings.origins[f"resource_limits.{key}"].where for key in keys]
    assert found == ["flag", "environment VALIDATOR_MEMORY_MB", str(path), "default"]


def test_validator_log_wins_over_rust_log(tmp_path: Path) -> None:
    assert load(tmp_path, VALIDATOR_LOG="error", RUST_LOG="debug")["validator.log"] == "error"


def test_the_file_is_the_flags_the_environments_or_the_folders(tmp_path: Path) -> None:
    """`--config`, VALIDATOR_CONFIG, else config.toml if it is there."""
    for number, name in enumerate(("flag.toml", "named.toml", "config.toml"), start=1):
        (tmp_path / name).write_text(f"[jobs]\nmax_concurrent = {number}\n")
    named = REQUIRED | {"VALIDATOR_CONFIG": str(tmp_path / "named.toml")}
    flag = load_settings(named, flag_file=tmp_path / "flag.toml", folder=tmp_path)
    loaded = [flag, load_settings(named, folder=tmp_path), load_settings(REQUIRED, folder=tmp_path)]
    assert [each["jobs.max_concurrent"] for each in loaded] == [1, 2, 3]


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    """One line each: which setting, where it came from, what was expected, what came."""
    toml = """
    [resource_limits]
    cpu_cores = 0
    cpu_corse = 4
    [scoring_config]
    algorithm = "Cubic"
    [attestation]
    allow_simulated = true
    """
    found = faults(tmp_path, toml, VALIDATOR_MEMORY_MB="much", VALIDATOR_HOTKEY="5DD", DSTACK_VMM_URL="ftp:x")
    text = "\n".join(found)
    assert len(found) == 7
    assert all("\n" not in line for line in found)
    assert "resource_limits.cpu_cores" in text
    assert "given.toml" in text
    assert "resource_limits.memory_mb (environment VALIDATOR_MEMORY_MB): expected an integer" in text
    assert "did you mean resource_limits.cpu_cores?" in text
    assert "validator.hotkey (environment VALIDATOR_HOTKEY)" in text
    assert "dstack.vmm_url (environment DSTACK_VMM_URL)" in text
    assert "expected one of Linear" in text
    assert "only a TDX quote" in text


def test_what_is_required_says_how_to_set_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigFaults) as caught:
        load_settings({}, folder=tmp_path)
    assert ["VALIDATOR_HOTKEY" in caught.value.faults[0], "PLATFORM_BASE_API" in caught.value.faults[1]] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ('[sandbox_config]\nisolation_level = "None"', "unsafe_no_isolation"),
        (
            '[sandbox_config]\nisolation_level = "Container"\n[attestation]\nallow_simulated = true',
            "needs attestation.simulated_root_file",
        ),
        ("[attestation]\nallow_session_v1 = true", "version 1 binds no keys"),
        ('[validator]\nadmin_listen = "127.0.0.1:18080"', "another address"),
        ('[validator]\nlog_format = "xml"', "auto, json, people"),
        ('[sources]\nallow = ["ftp"]', "expected https, ssh or file"),
        ('[dstack]\ntoken = "hunter2hunter2"', "give it in the environment"),
        (
            '[sandbox_config.filesystem_policy]\nallowed_paths = ["/a"]\ndenied_paths = ["/a/b"]',
            "denied_paths (",
        ),
        ("not toml", "not TOML"),
    ],
)
def test_contradictions_and_secrets_in_files_are_faults(tmp_path: Path, toml: str, expected: str) -> None:
    [fault] = faults(tmp_path, toml)
    assert expected in fault
    assert "hunter2" not in fault


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("allowed_paths", '["scratch"]', "absolute path"),
        ("allowed_paths", '["/usr/local"]', "read_only = false makes the whole root writable"),
        ("denied_paths", '["/dstack/x"]', "apart from /dstack"),
        ("denied_paths", '["/usr"]', "a CVM can start without"),
        ("denied_paths", f"{[f'/{number}' for number in range(33)]}", "expected at most 32"),
        ("tmpfs_size", '"1M"', "expected at least 16M"),
        ("read_only", '"maybe"', "true or false"),
    ],
)
def test_a_filesystem_policy_that_no_cvm_could_keep_is_a_fault(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    [fault] = faults(tmp_path, f"[sandbox_config.filesystem_policy]\n{key} = {value}")
    assert fault.startswith(f"sandbox_config.filesystem_policy.{key} (")
    assert expected in fault


def test_a_filesystem_policy_is_read_in_whole_megabytes(tmp_path: Path) -> None:
    table = "[sandbox_config.filesystem_policy]"
    more = (
        'read_only = false\nallowed_paths = ["/s"]\ndenied_paths = ["/usr/bin/curl"]\ntmpfs_size = "64 MiB"'
    )
    assert load(tmp_path, f"{table}\n{more}").filesystem == FilesystemPolicy(
        read_only=False, allowed_paths=("/s",), denied_paths=("/usr/bin/curl",), tmpfs_size_mb=64
    )
    assert load(tmp_path).filesystem == FilesystemPolicy()


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigFaults, match=r"absent\.toml: cannot be read"):
        load_settings(REQUIRED, flag_file=tmp_path / "absent.toml")


def test_settings_show_no_secret(tmp_path: Path) -> None:
    assert "hunter2" not in repr(load(tmp_path, DSTACK_VMM_TOKEN="hunter2"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1h", 3600), ("500ms", 0.5), ("1.5h", 5400)]
)
def test_durations_are_written_with_their_unit(tmp_path: Path, text: str, seconds: float) -> None:
    settings = load(tmp_path, f'[jobs]\nstall_limit = "{text}"')
    assert settings.seconds("jobs.stall_limit") == seconds


def test_the_example_begins_with_the_guides_block_and_is_loaded(tmp_path: Path) -> None:
    """Word for word; and it means what the guide says."""
    assert GUIDE in EXAMPLE.read_text()
    settings = load_settings(REQUIRED, flag_file=EXAMPLE, folder=tmp_path)
    assert settings["sandbox_config.network_policy.allowed_hosts"] == ("api.openai.com", "huggingface.co")
    assert settings.level is IsolationLevel.TEE


@pytest.mark.parametrize(
    ("parser", "value", "expected"),
    [
        (parse.host_pattern, "api.example.com", "api.example.com"),
        (parse.host_pattern, "*.example.com", "*.example.com"),
        (parse.host_pattern, "API.example.com", None),
        (parse.host_pattern, "10.0.0.1", None),
        (parse.host_pattern, "*", None),
        (parse.host_pattern, "*.*.example.com", None),
        (parse.host_pattern, "localhost", None),
        (parse.host_pattern, "a." * 127 + "com", None),
        (parse.host_pattern, 7, None),
        (parse.dns_server, "9.9.9.9", ("9.9.9.9", 53)),
        (parse.dns_server, "127.0.0.1:5353", ("127.0.0.1", 5353)),
        (parse.dns_server, "2620:fe::fe", ("2620:fe::fe", 53)),
        (parse.dns_server, "[2620:fe::fe]:5353", ("2620:fe::fe", 5353)),
        (parse.dns_server, "dns.example.com", None),
        (parse.dns_server, "9.9.9.9:0", None),
        (parse.dns_server, "9.9.9.9:x", None),
        (parse.network, "198.51.100.0/24", "198.51.100.0/24"),
        (parse.network, "198.51.100.1/24", None),
    ],
)
def test_what_the_egress_proxy_is_given_has_one_form(
    parser: parse.Parser, value: object, expected: object
) -> None:
    """Names that can be reached, servers by address, networks; anything else is a fault."""
    if expected is None:
        with pytest.raises(ValueError, match="expected"):
            parser(value)
    else:
        assert parser(value) == expected


def test_the_example_names_every_setting_with_its_default() -> None:
    """But those that belong into the environment; what is commented out is TOML too."""
    text = EXAMPLE.read_text()
    live = set(tomllib.loads(text))
    table, named = "", set()
    for line in text.splitlines():
        if header := re.fullmatch(r"(?:# )?\[([a-z_.]+|\[vmm\])\]", line):
            table = header[1]
            named |= {"vmm"} & {table.strip("[]")}
        elif setting := re.match(r"(?:# )?([a-z0-9_]+) = ", line):
            named |= set() if table == "[vmm]" else {f"{table}.{setting[1]}"}
            tomllib.loads(line.removeprefix("# "))
    assert named == {option.key for option in OPTIONS if not option.secret}
    assert live == {"resource_limits", "sandbox_config", "scoring_config"}
