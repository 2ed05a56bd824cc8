"""`validator values` on a journal without a daemon: every command, its refusals, what it leaves on disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from platform_validator.cli.main import app
from platform_validator.store.sqlite import SqliteStore

HOTKEY = "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory in which a validator once ran."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("VALIDATOR_HOTKEY", HOTKEY)
    monkeypatch.setenv("PLATFORM_BASE_API", "http://127.0.0.1:1")
    monkeypatch.setenv("VALIDATOR_DB_PATH", str(folder / "validator.db"))
    monkeypatch.chdir(tmp_path)

    async def make() -> None:
        await (await SqliteStore.open(folder / "validator.db")).close()

    asyncio.run(make())
    return folder


def run(*words: str, stdin: str | None = None) -> Result:
    """One command."""
    return CliRunner().invoke(app, ["values", *words], input=stdin)


def found(*words: str) -> object:
    """One command with --json, which must succeed."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_value_s_life(state: Path) -> None:
    """Set, got, listed, deleted; a process a command: it is on disk in between."""
    assert found("set", "c", "k", '{"a": [1, "é"]}') == {"key": "k", "version": 1}
    assert found("get", "c", "k") == {"key": "k", "value": {"a": [1, "é"]}, "version": 1}
    assert json.loads(run("get", "c", "k").stdout) == {"a": [1, "é"]}
    run("set", "c", "other", "-", stdin="5\n")
    assert found("list", "c") == {"values": [{"key": "k", "version": 1}, {"key": "other", "version": 1}]}
    assert found("list", "c", "--prefix", "o") == {"values": [{"key": "other", "version": 1}]}
    assert found("list") == {"challenges": [{"challenge_id": "c", "keys": 2, "bytes": 21}]}
    assert found("delete", "c", "k") == {"key": "k", "deleted": True}
    refused = run("get", "c", "k", "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["code"] == "not_found"
    assert "keeps no" in refused.stderr
    assert "other" in run("list", "c").stdout


def test_export_and_import(state: Path, tmp_path: Path) -> None:
    """What was exported is imported elsewhere; the file is private, and never written over."""
    run("set", "c", "a", "1")
    run("set", "c", "b", '"two"')
    file = tmp_path / "values.json"
    assert found("export", "c", str(file)) == {"file": str(file), "exported": 2}
    assert file.stat().st_mode & 0o777 == 0o600
    again = run("export", "c", str(file))
    assert again.exit_code == 2
    assert "cannot be made" in again.stderr
    assert found("import", "d", str(file)) == {"written": 2}
    assert found("get", "d", "b") == {"key": "b", "value": "two", "version": 1}
    exported = run("export", "c").stdout
    assert json.loads(exported) == json.loads(file.read_text())
    assert run("import", "e", "-", stdin=exported).exit_code == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "platform-values-v1"}', '{"format": "other", "values": {}}']
)
def test_what_is_no_export_is_not_imported(state: Path, text: str) -> None:
    """And nothing changes."""
    done = run("import", "c", "-", stdin=text)
    assert done.exit_code == 2
    assert "cannot be imported" in done.stderr
    assert found("list") == {"challenges": []}


def test_an_import_with_one_bad_value_writes_nothing(state: Path) -> None:
    """All is looked at before the first is written."""
    text = json.dumps({"format": "platform-values-v1", "values": {"a": 1, "b": 2**60}})
    done = run("import", "c", "-", "--json", stdin=text)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["code"] == "not_json"
    assert found("list") == {"challenges": []}


def test_rekey(state: Path) -> None:
    """The key file changes, the values stay."""
    run("set", "c", "k", "1")
    keys = state / "keyring" / "values"
    before = [path.name for path in keys.glob("*.key")]
    assert found("rekey") == {"resealed": 1, "unreadable": 0}
    assert [path.name for path in keys.glob("*.key")] != before
    assert found("get", "c", "k") == {"key": "k", "value": 1, "version": 1}


def test_what_is_no_json_is_refused_with_what_was_expected(state: Path) -> None:
    """The commonest mistake: a string without its quotes."""
    done = run("set", "c", "k", "text")
    assert done.exit_code == 2
    assert "a string wants quotes" in done.stderr


def test_where_no_validator_ever_ran_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong path is told, and not begun anew."""
    monkeypatch.setenv("VALIDATOR_HOTKEY", HOTKEY)
    monkeypatch.setenv("PLATFORM_BASE_API", "http://127.0.0.1:1")
    monkeypatch.setenv("VALIDATOR_DB_PATH", str(tmp_path / "nowhere" / "validator.db"))
    done = run("list")
    assert done.exit_code == 2
    assert "no validator ever ran" in done.stderr
    assert not (tmp_path / "nowhere").exists()
