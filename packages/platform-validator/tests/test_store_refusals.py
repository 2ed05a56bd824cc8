"""A journal that cannot be trusted ends the start: a clear message, exit code 4, and nothing is changed."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from platform_protocol.signing import Keypair
from platform_validator.cli.main import app
from platform_validator.store.inspection import inspect
from platform_validator.store.migrate import known_migrations
from platform_validator.store.opening import open_database
from platform_validator.store.port import StoreCorrupt
from platform_validator.store.sqlite import SqliteStore

GOLDEN = Path(__file__).parent / "data" / "store"
NEWEST = len(known_migrations())


def journal(path: Path) -> None:
    """A good one, with rows in every table."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((GOLDEN / f"version-{NEWEST:04}.sql").read_text(encoding="utf-8"))
    open_database(path).close()


def execute(path: Path, statement: str) -> None:
    """Change it, as some other program would."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_bytes(b"this is a text, and not a database\n" * 400)


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def cut_by_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def cut_in_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def a_page_of_noise(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(range(256)) * 16
    path.write_bytes(data)


def a_page_of_zeros(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


def newer(path: Path) -> None:
    execute(path, "INSERT INTO migrations VALUES (9999, '9999_future.sql', 'x')")


def another_text(path: Path) -> None:
    execute(path, "UPDATE migrations SET checksum = 'x' WHERE version = 1")


def a_gap(path: Path) -> None:
    execute(path, "DELETE FROM migrations WHERE version = 1")


def of_another_program(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE accounts (name TEXT)")


def without_a_table(path: Path) -> None:
    path.unlink()
    execute(path, "VACUUM")
    execute(path, "PRAGMA user_version = 7")


def only_its_log(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}-wal"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (emptied, "is empty"),
    (text, "is damaged"),
    (cut_in_the_header, "is damaged"),
    (cut_by_a_page, "is damaged"),
    (cut_in_a_page, "is damaged"),
    (a_page_of_noise, "damaged"),
    (a_page_of_zeros, "damaged"),
    (newer, "install the newer program"),
    (another_text, "another text"),
    (a_gap, "lacks a migration"),
    (of_another_program, "not a validator's journal"),
    (without_a_table, "wrong file"),
    (only_its_log, "is missing"),
]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory, and settings that lead to it. The command's logging ends with the test."""
    logging = structlog.get_config()
    seed = "0x" + "11" * 32
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "VALIDATOR_HOTKEY": Keypair.from_seed(bytes.fromhex(seed[2:])).address,
        "HOTKEY_PASSPHRASE": seed,
        "PLATFORM_BASE_API": "http://127.0.0.1:1",
        "DSTACK_VMM_URL": f"unix:{tmp_path}/vmm.sock",
        "DSTACK_VMM_TOKEN": "made-up-token-0123456789",
        "VALIDATOR_DB_PATH": str(folder / "validator.db"),
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    yield folder
    structlog.configure(**logging)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the database, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*validator.db*"))}


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda one: getattr(one, "__name__", None))
@pytest.mark.robustness(7, "corrupt", "newer")
async def test_what_cannot_be_trusted_is_refused_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Robustness 7: corrupt, truncated, not a database, zero bytes, from a newer version. Twice the same."""
    path = tmp_path / "validator.db"
    journal(path)
    damage(path)
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreCorrupt, match=words):
            await SqliteStore.open(path)
        assert contents(tmp_path) == before


@pytest.mark.robustness(7, "truncated")
def test_no_truncation_goes_unnoticed(tmp_path: Path) -> None:
    """Robustness 7: wherever the file was cut, it does not open with less in it."""
    whole, path = tmp_path / "whole.db", tmp_path / "validator.db"
    journal(whole)
    for size in range(0, whole.stat().st_size, 997):
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(StoreCorrupt):
            open_database(path)


@pytest.mark.parametrize("damage", [emptied, text, cut_by_a_page, a_page_of_noise, newer, of_another_program])
@pytest.mark.robustness(7, "corrupt", "newer", "truncated")
def test_the_daemon_ends_with_code_4_and_says_why(state: Path, damage: Callable[[Path], None]) -> None:
    """Robustness 7: state unusable; the message names what mends it, and the files stay as they are."""
    path = state / "validator.db"
    journal(path)
    damage(path)
    before = contents(state)
    ended = CliRunner().invoke(app, ["run"])
    assert ended.exit_code == 4
    told = [line for line in ended.output.splitlines() if "daemon_cannot_run" in line]
    assert len(told) == 1
    assert any(word in told[0] for word in ("backup", "newer program", "wrong file"))
    assert contents(state) == before


def test_what_a_killed_writer_left_is_not_folded_into_a_refused_journal(tmp_path: Path) -> None:
    """Robustness 7: a log beside the database is read with it, and stays beside it when it is refused."""
    program = """
import os, signal, sys
from pathlib import Path
from platform_validator.store.opening import open_database
connection = open_database(Path(sys.argv[1]))
connection.execute("INSERT INTO migrations VALUES (9999, '9999_future.sql', 'x')")
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "validator.db"
    journal(path)
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=50)
    assert killed.returncode == -signal.SIGKILL
    log = path.with_name("validator.db-wal")
    before = [path.read_bytes(), log.read_bytes()]
    with pytest.raises(StoreCorrupt, match="newer program"):
        open_database(path)
    assert [path.read_bytes(), log.read_bytes()] == before


@pytest.mark.robustness(8, "start")
def test_of_a_long_history_what_is_open_is_checked(tmp_path: Path) -> None:
    """Robustness 8: above a size, the past is not read at each start; what recovery needs is."""
    good, path = tmp_path / "good.db", tmp_path / "validator.db"
    journal(good)
    inspect(good, known_migrations(), read_whole=0)
    with closing(sqlite3.connect(good)) as connection:
        roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0"))
    unread = {"sqlite_autoindex_jobs_journal_1", "sqlite_autoindex_cvms_journal_1"}
    unread |= {"sqlite_autoindex_cvms_journal_2", "jobs_journal_ended", "cvms_journal_gone"}
    assert unread < set(roots)
    for name, root in roots.items():
        shutil.copy(good, path)
        data = bytearray(path.read_bytes())
        data[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
        path.write_bytes(data)
        with pytest.raises((StoreCorrupt, sqlite3.DatabaseError)):
            inspect(path, known_migrations())
        if name not in unread:
            with pytest.raises((StoreCorrupt, sqlite3.DatabaseError)):
                inspect(path, known_migrations(), read_whole=0)
