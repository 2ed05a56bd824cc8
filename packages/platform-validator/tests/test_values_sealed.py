"""Values at rest: sealed, bound to their place, resealed under a new key, and readable to nobody else."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

import pytest

from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import ValuesGet, ValuesIncrement, ValuesSet
from platform_validator.clock import SystemClock
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Resealed
from platform_validator.store.sqlite import SqliteStore
from platform_validator.values import ValueKeeper
from platform_validator.values.errors import ValueKeysUnusable, ValueUnreadable
from platform_validator.values.keys import AgentKeys, CredentialKeys, KeyringFiles, MemoryKeys, ValueKeySource
from platform_validator.values.sealing import ValueKey, ValuesSeal

A = ChallengeId("challenge-a")
CANARY = "canary-5f1d"


def keeper_of(store: SqliteStore | MemoryStore, source: ValueKeySource) -> ValueKeeper:
    return ValueKeeper(source=source, store=store, clock=SystemClock())


def on_disk(folder: Path) -> bytes:
    """Every byte of the database and what lies beside it."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("validator.db*")))


def rows(path: Path, query: str, *arguments: object) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(query, arguments).fetchall()


async def test_neither_values_nor_replies_are_on_disk_in_clear(tmp_path: Path) -> None:
    """The key is, and is meant to be: only what it stands for is secret."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    await keeper.settle()
    request = ValuesSet(request_id="r", key="token", value={"secret": CANARY})
    answer = await keeper.manager.answer(A, "session", request)
    assert answer.error is None
    assert await keeper.manager.answer(A, "session", request) == answer
    await store.close()
    assert CANARY.encode() not in on_disk(tmp_path)
    assert b"token" in on_disk(tmp_path)
    reopened = await SqliteStore.open(tmp_path / "validator.db")
    again = keeper_of(reopened, KeyringFiles(tmp_path / "keys"))
    assert await again.manager.for_challenge(A).get("token") == {"secret": CANARY}
    await reopened.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [("key", "other"), ("challenge_id", "challenge-b"), ("version", 2), ("value", None), ("key_id", None)],
)
async def test_what_was_moved_or_changed_does_not_open(tmp_path: Path, column: str, value: object) -> None:
    """Under another key, challenge or version, with other bytes, or put there in clear: unreadable."""
    path = tmp_path / "validator.db"
    store = await SqliteStore.open(path)
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    await keeper.settle()
    await keeper.manager.for_challenge(A).set("k", 1)
    if column == "value":
        [[sealed]] = rows(path, "SELECT value FROM values_current")
        value = str(sealed)[:-8] + "AAAAAAA="
    if column == "key_id":
        rows(path, "UPDATE values_current SET key_id = NULL, value = '1'")
    else:
        rows(path, f"UPDATE values_current SET {column} = ?", value)
    where = ChallengeId("challenge-b") if column == "challenge_id" else A
    key = "other" if column == "key" else "k"
    answer = await keeper.manager.answer(where, "session", ValuesGet(request_id="r", key=key))
    assert answer.error is not None
    assert (answer.error.code, answer.value) == ("value_unreadable", None)
    written = await keeper.manager.answer(where, "session", ValuesIncrement(request_id="r2", key=key, by=1))
    assert written.error is not None
    assert written.error.code == "value_unreadable"
    await store.close()


async def test_a_reply_of_another_request_does_not_open(tmp_path: Path) -> None:
    """A reply that was moved to another request is no answer to it."""
    path = tmp_path / "validator.db"
    store = await SqliteStore.open(path)
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    await keeper.manager.answer(A, "session", ValuesIncrement(request_id="r", key="n", by=1))
    rows(path, "UPDATE values_replies SET request_id = 'moved'")
    answer = await keeper.manager.answer(A, "session", ValuesIncrement(request_id="moved", key="n", by=1))
    assert answer.error is not None
    assert answer.error.code == "value_unreadable"
    await store.close()


async def test_what_an_older_version_kept_in_clear_is_sealed_and_overwritten(tmp_path: Path) -> None:
    """At the first start; nothing of it is left in the file or beside it; later, clear text is refused."""
    path = tmp_path / "validator.db"
    store = await SqliteStore.open(path)
    rows(
        path,
        "INSERT INTO values_current (challenge_id, key, value, version, updated_at, size)"
        " VALUES (?, 'k', ?, 3, '2026-01-02T03:04:05.000000Z', 14)",
        A,
        json.dumps(CANARY),
    )
    rows(path, "INSERT INTO values_replies (session_id, request_id, reply) VALUES ('s', 'r', ?)", CANARY)
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    assert await keeper.settle() == Resealed(2, 0)
    assert await keeper.manager.for_challenge(A).get_versioned("k") == (CANARY, 3)
    await store.close()
    assert CANARY.encode() not in on_disk(tmp_path)
    rows(path, "UPDATE values_current SET key_id = NULL, value = '1'")
    reopened = await SqliteStore.open(path)
    again = keeper_of(reopened, KeyringFiles(tmp_path / "keys"))
    await again.settle()
    with pytest.raises(ValueUnreadable, match="in clear"):
        await again.manager.entries(A)
    await reopened.close()


async def test_rekeying_reseals_everything_and_forgets_the_old_key(tmp_path: Path) -> None:
    """More than one batch; the values stay, with their versions; the old key file is gone."""
    path, keys = tmp_path / "validator.db", tmp_path / "keys"
    store = await SqliteStore.open(path)
    keeper = keeper_of(store, KeyringFiles(keys))
    await keeper.settle()
    mine = keeper.manager.for_challenge(A)
    for number in range(250):
        await mine.set(f"k{number}", number)
    await keeper.manager.answer(A, "session", ValuesIncrement(request_id="r", key="k0", by=1))
    before = rows(path, "SELECT DISTINCT key_id FROM values_current")
    assert await keeper.rekey() == Resealed(251, 0)
    after = rows(path, "SELECT DISTINCT key_id FROM values_current")
    assert len(after) == 1
    assert after != before
    assert [path.name for path in sorted(keys.glob("*.key"))] == ["0002.key"]
    assert [each.value for each in await keeper.manager.entries(A, "k24")] == [24, *range(240, 250)]
    repeated = await keeper.manager.answer(A, "session", ValuesIncrement(request_id="r", key="k0", by=1))
    assert (repeated.value, repeated.version) == (1, 2)
    await store.close()


async def test_a_rekeying_that_was_cut_off_is_finished_at_the_next_start(tmp_path: Path) -> None:
    """The new key is durable before the first value is under it; both are read until none is left."""
    failing = 0

    def fail(name: str) -> bool:
        nonlocal failing
        failing += name == "reseal_values"
        return name == "reseal_values" and failing == 2

    store = MemoryStore(fail)
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    for number in range(300):
        await keeper.manager.for_challenge(A).set(f"k{number:03}", number)
    with pytest.raises(StoreUnavailable):
        await keeper.rekey()
    assert len(list((tmp_path / "keys").glob("*.key"))) == 2
    assert await keeper.manager.for_challenge(A).get("k299") == 299
    after = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    assert [each.value for each in await after.manager.entries(A)] == list(range(300))
    assert await after.settle() == Resealed(100, 0)
    assert len(list((tmp_path / "keys").glob("*.key"))) == 1
    assert [each.value for each in await after.manager.entries(A)] == list(range(300))


async def test_a_value_that_does_not_open_stops_no_rekeying_and_keeps_its_key(tmp_path: Path) -> None:
    """The others are resealed; the older key stays for what may be mended."""
    path = tmp_path / "validator.db"
    store = await SqliteStore.open(path)
    keeper = keeper_of(store, KeyringFiles(tmp_path / "keys"))
    await keeper.settle()
    for key in ("a", "b", "c"):
        await keeper.manager.for_challenge(A).set(key, key)
    rows(path, "UPDATE values_current SET version = 9 WHERE key = 'b'")
    assert await keeper.rekey() == Resealed(2, 1)
    assert len(list((tmp_path / "keys").glob("*.key"))) == 2
    rows(path, "UPDATE values_current SET version = 1 WHERE key = 'b'")
    assert [each.value for each in await keeper.manager.entries(A)] == ["a", "b", "c"]
    await store.close()


async def test_writes_go_on_while_everything_is_resealed() -> None:
    """What is written meanwhile is under the new key, and nothing is lost."""
    keeper = keeper_of(MemoryStore(), MemoryKeys())
    mine = keeper.manager.for_challenge(A)
    for number in range(300):
        await mine.set(f"k{number}", 0)
    async with asyncio.TaskGroup() as group:
        rekeyed = group.create_task(keeper.rekey())
        for number in range(300):
            group.create_task(mine.increment(f"k{number}"))
    assert rekeyed.result().left == 0
    assert {each.value for each in await keeper.manager.entries(A)} == {1}


def test_a_key_file_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    """And left as it is."""
    source = KeyringFiles(tmp_path / "keys")
    source.load()
    (tmp_path / "keys" / "0001.key").write_bytes(b"short")
    with pytest.raises(ValueKeysUnusable, match="restore it from a backup"):
        source.load()


def test_key_files_are_private_and_numbered(tmp_path: Path) -> None:
    """0600 in 0700; a half-written one is none."""
    source = KeyringFiles(tmp_path / "keys")
    [first] = source.load().keys
    (tmp_path / "keys" / ".new.key").write_bytes(b"half")
    keys, clear = source.advance()
    assert keys[0] == first
    assert (len(keys), clear) == (2, True)
    assert source.load() == (keys, True)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").glob("*.key")} == {0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    source.settled()
    assert source.load() == (keys[1:], False)


def test_a_credential_is_read_as_bytes_or_hex_and_rekeyed_by_the_operator(tmp_path: Path) -> None:
    """The old one beside the new one, under its own name."""
    credentials, folder = tmp_path / "credentials", tmp_path / "keys"
    credentials.mkdir()
    source = CredentialKeys(credentials, folder)
    with pytest.raises(ValueKeysUnusable, match="cannot be read"):
        source.load()
    (credentials / "values.key").write_text("ab" * 32 + "\n")
    assert source.load() == ((ValueKey(b"\xab" * 32),), True)
    with pytest.raises(ValueKeysUnusable, match=r"values\.key\.old"):
        source.advance()
    (credentials / "values.key.old").write_bytes(b"\xab" * 32)
    (credentials / "values.key").write_bytes(b"\xcd" * 32)
    assert source.advance().keys == (ValueKey(b"\xab" * 32), ValueKey(b"\xcd" * 32))
    source.settled()
    assert not source.load().clear
    with pytest.raises(ValueKeysUnusable, match="LoadCredential"):
        CredentialKeys(None, folder).load()


@contextmanager
def agent(path: Path, answer: Callable[[str], tuple[int, bytes]]) -> Iterator[list[str]]:
    """A guest agent that answers GetKey."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(f"{self.path} {body['path']}")
            status, text = answer(body["path"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    with UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_inside_a_cvm_the_key_comes_from_the_guest_agent(tmp_path: Path) -> None:
    """One path a generation; the number is on disk, the key is not."""

    def key(path: str) -> tuple[int, bytes]:
        return 200, json.dumps({"key": f"{int(path[-1]):02x}" * 32, "signature_chain": []}).encode()

    with agent(tmp_path / "agent.sock", key) as asked:
        source = AgentKeys(tmp_path / "agent.sock", tmp_path / "keys")
        assert source.load() == ((ValueKey(b"\x01" * 32),), True)
        assert source.advance().keys == (ValueKey(b"\x01" * 32), ValueKey(b"\x02" * 32))
        source.settled()
        assert source.load() == ((ValueKey(b"\x02" * 32),), False)
    assert asked[0] == "/GetKey platform-validator/values/1"
    kept = b"".join(path.read_bytes() for path in (tmp_path / "keys").iterdir())
    assert kept == b"2 2\n"
    with pytest.raises(ValueKeysUnusable, match=r"agent\.sock"):
        source.load()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"{}", "HTTP 500"),
        (200, b"{}", "gave no key"),
        (200, b"[1]", "gave no key"),
        (200, b'{"key": 5}', "gave no key"),
        (200, b'{"key": "zz"}', "gave no key"),
        (200, b'{"key": "abcd"}', "expected 32 bytes"),
    ],
)
def test_an_agent_that_answers_otherwise_gives_no_key(
    tmp_path: Path, status: int, body: bytes, said: str
) -> None:
    """The start fails and says what came."""
    source = AgentKeys(tmp_path / "agent.sock", tmp_path / "keys")
    with (
        agent(tmp_path / "agent.sock", lambda _: (status, body)),
        pytest.raises(ValueKeysUnusable, match=said),
    ):
        source.load()


def test_a_key_s_bytes_are_in_no_repr() -> None:
    """Nor in a traceback that shows one."""
    assert "cdcd" not in repr(ValueKey(b"\xcd" * 32))
    assert repr(b"\xcd") not in repr(ValueKey(b"\xcd" * 32))


def test_the_same_value_twice_is_not_seen_to_be_the_same() -> None:
    """Each sealing has a nonce."""
    seal = ValuesSeal(ValueKey(b"k" * 32))
    assert seal.seal_value("c", "k", 1, b"1") != seal.seal_value("c", "k", 1, b"1")
