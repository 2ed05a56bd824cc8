"""The command line: exit codes, faults, what is shown without a daemon, and that no secret is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from platform_protocol.ids import ClaimId
from platform_protocol.signing import Keypair
from platform_validator.cli.main import app
from platform_validator.host_name import HostName
from platform_validator.state import StateDirectory
from platform_validator.store.records import InstanceState
from platform_validator.store.specimens import NOW, cvm, instance, job
from platform_validator.store.sqlite import SqliteStore

SEED = "0x" + "11" * 32


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A folder, a home and a key of our own; nothing listens anywhere. The logging ends with the test."""
    logging = structlog.get_config()
    monkeypatch.chdir(tmp_path)
    given = {
        "VALIDATOR_HOTKEY": Keypair.from_seed(bytes.fromhex(SEED[2:])).address,
        "HOTKEY_PASSPHRASE": SEED,
        "PLATFORM_BASE_API": "http://127.0.0.1:1",
        "DSTACK_VMM_URL": f"unix:{tmp_path}/vmm.sock",
        "DSTACK_VMM_TOKEN": "hunter2hunter2",
        "PCCS_URL": "http://127.0.0.1:1",
        "HOME": str(tmp_path),
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield given
    structlog.configure(**logging)


def invoke(*words: str) -> Result:
    """One command."""
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("words", [(), ("run",), ("config", "show"), ("status",), ("jobs", "list")])
def test_wrong_settings_are_all_told_and_exit_2(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """One line each, by every command; bare `validator` is `validator run`."""
    monkeypatch.setenv("VALIDATOR_CPU_CORES", "none")
    monkeypatch.delenv("PLATFORM_BASE_API")
    result = invoke(*words)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error", "error"]
    assert "platform.base_api" in result.stderr
    assert "resource_limits.cpu_cores (environment VALIDATOR_CPU_CORES)" in result.stderr


def test_no_key_exits_2_and_says_where_it_looked(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOTKEY_PASSPHRASE")
    result = invoke("run")
    assert result.exit_code == 2
    assert f"{environment['HOME']}/.bittensor/wallets" in result.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_config_show_tells_origins_and_no_secret(environment: dict[str, str], as_json: bool) -> None:
    result = invoke("config", "show", *(["--json"] if as_json else []))
    assert result.exit_code == 0
    assert "hunter2" not in result.stdout
    assert SEED not in result.stdout
    if as_json:
        rows = {row["setting"]: row for row in json.loads(result.stdout)}
        assert rows["dstack.token"]["value"] == "(secret)"
        assert rows["platform.base_api"]["from"] == "environment PLATFORM_BASE_API"
        assert rows["resource_limits.cpu_cores"]["from"] == "default"


async def test_without_a_daemon_the_journal_is_read(environment: dict[str, str], tmp_path: Path) -> None:
    """Under the lock, which is free again afterwards."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    await store.open_claim(job())
    await store.intend_vm(cvm())
    await store.put_instance(instance())
    await store.drain_host(HostName("idle"), at=NOW)
    await store.close()

    def read() -> list[object]:
        commands = (
            ("status",),
            ("jobs", "list"),
            ("cvms", "list"),
            ("challenges", "list"),
            ("hosts", "list"),
            ("cvms", "top"),
        )
        return [json.loads(invoke(*words, "--json").stdout) for words in commands]

    status, jobs, cvms, challenges, hosts, top = await asyncio.to_thread(read)
    assert top == cvms
    assert isinstance(status, dict)
    assert (status["status"], status["open_jobs"], status["open_cvms"]) == ("stopped", 1, 1)
    assert isinstance(jobs, list)
    assert jobs[0]["claim_id"] == ClaimId("claim-1")
    assert isinstance(cvms, list)
    assert cvms[0]["name"] == "pv-1"
    assert "sealed_secret" not in cvms[0]
    assert isinstance(hosts, list)
    found = [(host["name"], host["state"], host["quota"]["cvms"]["used"]) for host in hosts]
    assert found == [("default", "unknown", 1), ("idle", "drained", 0)]
    assert isinstance(challenges, list)
    assert challenges[0]["state"] == "Created"
    lock = StateDirectory(tmp_path / "validator.db")
    lock.lock()
    lock.close()


async def test_a_challenge_is_shown_with_its_reason_and_history(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """By id or name, for people and as JSON; one that is not there ends with exit code 1."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    await store.put_instance(instance())
    broken = replace(instance(), state=InstanceState.FAILED, reason="ModuleNotFoundError: torch")
    await store.put_instance(broken)
    await store.close()

    def read() -> list[Result]:
        return [
            invoke("challenges", "show", *words)
            for words in (("challenge", "--json"), ("name",), ("another", "--json"))
        ]

    as_json, for_people, missing = await asyncio.to_thread(read)
    history = json.loads(as_json.stdout)["history"]
    assert [(row["state"], row["reason"]) for row in history] == [
        ("Failed", "ModuleNotFoundError: torch"),
        ("Created", None),
    ]
    assert "torch" in for_people.stdout
    assert missing.exit_code == 1
    assert json.loads(missing.stdout)["code"] == "unknown_challenge"


@pytest.mark.parametrize(
    "words", [("status",), ("jobs", "list"), ("cvms", "list"), ("cvms", "top"), ("challenges", "list")]
)
def test_before_the_first_start_there_is_nothing(environment: dict[str, str], words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code == 0
    assert not Path("validator.db").exists()


def test_a_daemon_that_does_not_answer_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "validator.db").touch()
    holder = StateDirectory(tmp_path / "validator.db")
    holder.lock()
    result = invoke("status")
    holder.close()
    assert result.exit_code == 2
    assert "does not answer" in result.stderr


def test_run_on_a_locked_state_exits_3(environment: dict[str, str], tmp_path: Path) -> None:
    holder = StateDirectory(tmp_path / "validator.db")
    holder.lock()
    result = invoke("run")
    holder.close()
    assert result.exit_code == 3


def test_run_where_others_can_write_exits_4(environment: dict[str, str], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert invoke("run").exit_code == 4


def test_run_on_a_damaged_database_exits_4(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "validator.db").write_bytes(b"no database" * 1000)
    assert invoke("run").exit_code == 4


def test_check_tells_what_fails_and_what_to_do(environment: dict[str, str]) -> None:
    """Every line has a word and a remedy; the exit code says that something fails."""
    result = invoke("check", "--json")
    assert result.exit_code == 1
    found = {row["check"]: row for row in json.loads(result.stdout)}
    assert (found["configuration"]["result"], found["key"]["result"]) == ("ok", "ok")
    assert (found["platform api"]["result"], found["vmm"]["result"]) == ("fail", "fail")
    assert "PLATFORM_BASE_API" in found["platform api"]["detail"]
    assert "DSTACK_VMM_URL" in found["vmm"]["detail"]
    assert "hunter2" not in result.stdout


def test_check_at_tee_tells_what_a_quote_cannot_be_judged_by(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """No image is known, no collateral comes; then some are, by first use too; what was relaxed."""
    found = {row["check"]: row for row in json.loads(invoke("check", "--json").stdout)}
    assert (found["os images"]["result"], found["collateral"]["result"]) == ("warn", "fail")
    assert "validator attestation pin" in found["os images"]["detail"]
    assert "PCCS_URL" in found["collateral"]["detail"]
    (tmp_path / "images.toml").write_text(
        '[[published]]\nimage = "i"\nos_image_hash = "' + "0" * 64 + '"\norigin = "its publisher"\n'
    )
    (tmp_path / "config.toml").write_text(
        '[attestation]\noffline = true\n[attestation.checks]\nos_image = "off"\ntcb_status = "warn"\n'
    )
    found = {row["check"]: row for row in json.loads(invoke("check", "--json").stdout)}
    assert (found["os images"]["result"], found["collateral"]["result"]) == ("ok", "warn")
    assert "os_image, tcb_status" in found["attestation"]["detail"]
    registers = "".join(f'{name} = "{"0" * 96}"\n' for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2"))
    first = 'origin = "this host"\nfirst_use = "2026-11-25T12:00:00Z"\n'
    with (tmp_path / "images.toml").open("a") as file:
        file.write(f'[[pinned]]\nimage = "i"\ncpu = 1\nmemory_mb = 256\ngpus = 0\n{registers}{first}')
    found = {row["check"]: row for row in json.loads(invoke("check", "--json").stdout)}
    assert found["os images"]["result"] == "warn"
    assert "2 entries" in found["os images"]["detail"]
    assert "1 of them trusted on first use" in found["os images"]["detail"]
    (tmp_path / "images.toml").write_text("[")
    found = {row["check"]: row for row in json.loads(invoke("check", "--json").stdout)}
    assert found["os images"]["result"] == "fail"


def test_check_refuses_a_base_url_that_leads_elsewhere(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALIDATOR_BASE_URL", "http://10.0.2.2:9")
    found = {row["check"]: row for row in json.loads(invoke("check", "--json").stdout)}
    assert found["base url"]["result"] == "fail"
    assert "VALIDATOR_HTTP_LISTEN" in found["base url"]["detail"]


@pytest.mark.parametrize(
    ("mode", "result", "told"),
    [(0o600, "ok", "https"), (0o644, "fail", "chmod 600"), (None, "fail", "cannot be read")],
)
def test_check_looks_at_what_fetching_needs(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int | None,
    result: str,
    told: str,
) -> None:
    """Its programs are on PATH, and its credentials are nobody else's to read."""
    file = tmp_path / "credentials"
    if mode is not None:
        file.write_text("")
        file.chmod(mode)
    config = tmp_path / "sources.toml"
    config.write_text(f'[sources]\ncredentials_file = "{file}"\n')
    found = {
        row["check"]: row for row in json.loads(invoke("check", "--json", "--config", str(config)).stdout)
    }
    assert found["sources"]["result"] == result
    assert told in found["sources"]["detail"]
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {
        row["check"]: row for row in json.loads(invoke("check", "--json", "--config", str(config)).stdout)
    }
    assert found["sources"]["result"] == "fail"
    assert "git, prlimit, timeout not on PATH" in found["sources"]["detail"]


def test_version() -> None:
    assert invoke("--version").stdout.strip()[0].isdigit()
