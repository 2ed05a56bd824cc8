"""`validator support-bundle`: what goes in, and that no secret does, in none of its forms."""

from __future__ import annotations

import base64
import json
import os
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from platform_protocol.signing import Keypair
from platform_validator.cli.known_secrets import KnownSecrets
from platform_validator.cli.main import app
from platform_validator.cli.support_bundle import gather
from platform_validator.config import load_settings

SEED = bytes(range(32))
PASSWORD, TOKEN = "a password of the hotkey", "vmm-token-0123456789"
MASTER = b"m" * 31 + b"\x00"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A validator with a secret of each kind; nothing around it answers."""
    state = tmp_path / "state"
    (state / "keyring" / "values").mkdir(parents=True)
    (state / "keyring" / "master.key").write_bytes(MASTER)
    (state / "keyring" / "values" / "one.key").write_bytes(b"v" * 32)
    (state / "admin.token").write_text("admin-token-0123456789\n")
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (tmp_path / "git").write_text("https://me:git-token-0123456789@example.org\n")
    hotkeys = tmp_path / ".bittensor" / "wallets" / "w" / "hotkeys"
    hotkeys.mkdir(parents=True)
    address = Keypair.from_seed(SEED).address
    (hotkeys / "default").write_text(
        json.dumps({"secretPhrase": "one two three four", "ss58Address": address})
    )
    (tmp_path / "config.toml").write_text(
        f'[keys]\npassword_file = "{tmp_path / "password"}"\n'
        f'[sources]\ncredentials_file = "{tmp_path / "git"}"\n'
    )
    for path in (tmp_path / "config.toml", tmp_path / "password", tmp_path / "git"):
        path.chmod(0o600)
    given = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "VALIDATOR_HOTKEY": address,
        "HOTKEY_PASSPHRASE": f"0x{SEED.hex()}",
        "PLATFORM_BASE_API": "http://127.0.0.1:1",
        "DSTACK_VMM_URL": "http://127.0.0.1:1",
        "DSTACK_VMM_TOKEN": TOKEN,
        "VALIDATOR_HTTP_LISTEN": "127.0.0.1:1",
        "VALIDATOR_DB_PATH": str(state / "validator.db"),
        "VALIDATOR_CONFIG": str(tmp_path / "config.toml"),
    }
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


def secrets_of(environment: dict[str, str], home: Path) -> KnownSecrets:
    return KnownSecrets.of(load_settings(environment), environment, home)


@pytest.mark.slow(reason="asks a platform and a VMM that are not there, twice")
def test_a_bundle_is_private_and_says_what_is_in_it(environment: dict[str, str], tmp_path: Path) -> None:
    """Without a daemon too: what cannot be had is named; nothing is written over; no secret is in it."""
    path, log = tmp_path / "bundle.tar.gz", tmp_path / "log"
    log.write_text('{"event": "started"}\n')
    done = CliRunner().invoke(app, ["support-bundle", str(path), "--log", str(log)])
    assert done.exit_code == 0, done.output
    assert path.stat().st_mode & 0o777 == 0o600
    members: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            members[member.name.removeprefix("validator-support/")] = content.read()
    manifest = json.loads(members["manifest.json"])
    assert set(manifest["members"]) | {"manifest.json"} == set(members)
    expected = {"config.json", "versions.json", "machine.json", "state.json", "status.json", "checks.json"}
    assert expected <= set(members)
    assert set(manifest["left_out"]) == {"metrics.txt", "images.toml"}
    assert members["log.txt"] == log.read_bytes()
    known = secrets_of(environment, tmp_path)
    assert [name for name, data in members.items() if known.found_in(data)] == []
    assert b"(secret)" in members["config.json"]
    assert b"admin.token" in members["state.json"]
    again = CliRunner().invoke(app, ["support-bundle", str(path)])
    assert (again.exit_code, "File exists" in again.output) == (2, True)


PLANTED = {
    "the passphrase": f"0x{SEED.hex()}".encode(),
    "the seed": SEED,
    "the seed in base64": base64.b64encode(SEED).rstrip(b"="),
    "the VMM token": TOKEN.encode(),
    "the VMM token in base64": base64.b64encode(TOKEN.encode()).rstrip(b"="),
    "the password": PASSWORD.encode(),
    "the git token": b"git-token-0123456789",
    "the operators' token": b"admin-token-0123456789",
    "the master key": MASTER,
    "the master key in hex": MASTER.hex().encode(),
    "a values key": b"v" * 32,
    "a wallet's phrase": b"one two three four",
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_what_would_hold_a_secret_is_left_out(
    environment: dict[str, str], tmp_path: Path, planted: bytes
) -> None:
    """Whatever redaction missed: the manifest names the secret, and does not show it."""
    known = secrets_of(environment, tmp_path)
    members, left_out = gather(
        {"log.txt": lambda: b"before " + planted + b" after", "fine.txt": lambda: b"nothing"}, known
    )
    assert list(members) == ["fine.txt"]
    assert list(left_out) == ["log.txt"]
    assert known.found_in(json.dumps(left_out).encode()) == []


def test_a_reason_that_would_show_a_secret_is_not_told(environment: dict[str, str], tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ValueError(f"no answer from http://x?token={TOKEN}")

    _, left_out = gather({"status.json": fail}, secrets_of(environment, tmp_path))
    assert left_out == {"status.json": "(its reason would show a secret)"}
