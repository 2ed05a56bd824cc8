"""The journal under real processes: killed while it writes, two daemons at once, no place to write."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from platform_protocol.signing import Keypair
from platform_validator.store.port import Store
from platform_validator.store.records import JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import cvm, job
from platform_validator.store.sqlite import SqliteStore

VALIDATOR = Path(sys.executable).parent / "validator"

# The lives of jobs, one after the other; each step is told once the store has acknowledged it.
WRITER = """
import asyncio, sys
from datetime import timedelta
from pathlib import Path
from platform_protocol.ids import LeaseToken
from platform_validator.store.records import JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import NOW, cvm, job
from platform_validator.store.sqlite import SqliteStore

def told(number, step):
    print(number, step, flush=True)

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    for number in range(10**6):
        claim, vm = job(number).claim_id, cvm(number).name
        await store.open_claim(job(number))
        told(number, "claimed")
        await store.claim_granted(claim, granted=b"g" * 900, attempt=1, token=LeaseToken("t"), at=NOW)
        await store.intend_vm(cvm(number))
        told(number, "intended")
        await store.vm_assigned(vm, claim)
        await store.advance(claim, Stage.RUNNING, at=NOW, vm=vm, kit=b"k" * 900)
        told(number, "running")
        await store.store_result(claim, JobOutcome.SUCCEEDED, b"%d" % number * 5000, at=NOW)
        told(number, "stored")
        if number % 3:
            await store.vm_phase(vm, VmPhase.GONE, at=NOW)
            await store.outbox_delivered(claim, at=NOW)
            told(number, "delivered")
        if number % 5 == 4:
            await store.compact(ended_before=NOW + timedelta(days=1), keep=3)
asyncio.run(main())
"""
STEPS = ["claimed", "intended", "running", "stored", "delivered"]


def _killed_after(lines: int, path: Path) -> dict[int, str]:
    """The last step that was told of each job, by a writer that was killed once it had told so many."""
    told: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            told.append(line)
            if len(told) == lines:
                writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    return {int(number): step for number, step in map(str.split, told)}


@pytest.mark.parametrize("lines", [10, 63, 178, 211, 344])
@pytest.mark.robustness(1, "each-point")
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, lines: int) -> None:
    """Robustness 7: of claims, CVMs and results nothing is lost, and no step is half there."""
    path = tmp_path / "validator.db"
    reached = await asyncio.to_thread(_killed_after, lines, path)
    store = await SqliteStore.open(path)
    for number, step in reached.items():
        await _is_there(store, number, step)
    await store.open_claim(job(-1))
    await store.close()


async def _is_there(store: Store, number: int, step: str) -> None:
    """At that step or the next one; compaction may have forgotten what was delivered."""
    record = await store.job(job(number).claim_id)
    vm = await store.vm(cvm(number).name)
    bodies = {entry.claim_id: entry.body for entry in await store.outbox()}
    body = bodies.get(job(number).claim_id)
    if record is None or record.stage is Stage.DONE:
        assert step in {"stored", "delivered"}
        assert number % 3
        assert body is None
        return
    assert (body is not None) == (record.outcome is JobOutcome.SUCCEEDED)
    if STEPS.index(step) >= STEPS.index("intended"):
        assert record.token == "t"
        assert vm is not None
        assert (vm.claim_id is not None) == (record.vm is not None)
    if STEPS.index(step) >= STEPS.index("running"):
        assert record.kit == b"k" * 900
        assert record.vm == cvm(number).name
    if STEPS.index(step) >= STEPS.index("stored"):
        assert body == b"%d" % number * 5000
        assert vm is not None
        assert vm.phase is VmPhase.INTENDED or number % 3


async def test_each_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    """A power failure takes back nothing that was acknowledged (sqlite.org/pragma: synchronous = FULL)."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    found = {
        name: store._db.connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode", "foreign_keys")
    }
    assert found == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1}
    await store.close()


async def test_one_thread_writes_in_the_order_of_the_calls(tmp_path: Path) -> None:
    """However many callers there are; each waits for its own commit."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    threads: set[str] = set()
    store._db.connection.set_trace_callback(lambda _: threads.add(threading.current_thread().name))
    await asyncio.gather(*(store.open_claim(job(number)) for number in range(100)))
    assert [record.job_id for record in await store.open_jobs()] == [f"job-{n}" for n in range(100)]
    await store.close()
    assert threads == {"store_0"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Settings of a validator to whom nothing answers, with a state directory of its own."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    (tmp_path / "state").mkdir(mode=0o700)
    seed = secrets.token_bytes(32)
    passed = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return passed | {
        "HOME": str(tmp_path),
        "VALIDATOR_HOTKEY": Keypair.from_seed(seed).address,
        "HOTKEY_PASSPHRASE": f"0x{seed.hex()}",
        "PLATFORM_BASE_API": f"http://127.0.0.1:{ports[0]}",
        "DSTACK_VMM_URL": f"http://127.0.0.1:{ports[1]}",
        "DSTACK_VMM_TOKEN": "made-up-vmm-token-0123456789",
        "VALIDATOR_DB_PATH": str(tmp_path / "state" / "validator.db"),
        "VALIDATOR_HTTP_LISTEN": f"127.0.0.1:{ports[2]}",
        "VALIDATOR_ADMIN_LISTEN": f"127.0.0.1:{ports[3]}",
        "VALIDATOR_BASE_URL": f"http://10.0.2.2:{ports[2]}",
    }


def _run(environment: dict[str, str], *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, str(VALIDATOR), "run"],
        env=environment,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@contextmanager
def _daemon(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A running one: it holds the lock, and its journal is open."""
    folder = Path(environment["VALIDATOR_DB_PATH"]).parent
    log = folder.parent / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen([str(VALIDATOR)], env=environment, stdout=out, stderr=out, cwd=folder) as process,
    ):
        try:
            deadline = time.monotonic() + 40
            while "step_2_" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


@pytest.mark.slow(reason="starts the daemon four times")
@pytest.mark.robustness(7, "second-daemon")
def test_a_second_daemon_on_the_state_directory_exits_3(environment: dict[str, str]) -> None:
    """Robustness 7: also with another database's name; a killed one is in nobody's way."""
    folder = Path(environment["VALIDATOR_DB_PATH"]).parent
    with _daemon(environment) as first:
        for name in ("validator.db", "other.db"):
            second = _run(environment | {"VALIDATOR_DB_PATH": str(folder / name)})
            assert second.returncode == 3
            assert "another validator uses" in second.stdout + second.stderr
        assert first.poll() is None
        assert not (folder / "other.db").exists()
        with (folder / "validator.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.send_signal(signal.SIGKILL)
        assert first.wait(20) == -signal.SIGKILL
    with _daemon(environment) as third:
        assert third.poll() is None


@pytest.mark.slow(reason="starts the daemon twice, in mount namespaces")
@pytest.mark.parametrize("used_before", [False, True], ids=["new", "used"])
@pytest.mark.robustness(6, "read-only")
async def test_a_state_directory_that_is_read_only_exits_4(
    environment: dict[str, str], used_before: bool
) -> None:
    """Robustness 6: at the start it is state that cannot be used, and said so; nothing listens."""
    folder = Path(environment["VALIDATOR_DB_PATH"]).parent
    if used_before:
        for name in ("cache", "keyring"):
            (folder / name).mkdir(mode=0o700)
        (folder / "validator.lock").touch(mode=0o600)
        await (await SqliteStore.open(folder / "validator.db")).close()
    before = sorted(path.name for path in folder.iterdir())
    sandbox = ["bwrap", "--bind", "/", "/", "--dev", "/dev", "--ro-bind", str(folder), str(folder)]
    ended = await asyncio.to_thread(_run, environment, *sandbox)
    assert ended.returncode == 4, ended.stderr
    assert "Read-only file system" in ended.stdout + ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow(reason="starts the daemon twice, in a mount namespace with a small file system")
@pytest.mark.robustness(6, "full")
def test_a_start_on_a_full_disk_exits_4_and_the_next_one_runs(environment: dict[str, str]) -> None:
    """Robustness 6: a first start for which there is no room leaves nothing that the next one minds."""
    folder = Path(environment["VALIDATOR_DB_PATH"]).parent
    small = ["bwrap", "--bind", "/", "/", "--dev", "/dev", "--size", "65536", "--tmpfs", str(folder)]
    ended = _run(environment, *small)
    assert ended.returncode == 4, ended.stderr
    assert "full" in ended.stdout + ended.stderr
    with _daemon(environment) as next_one:
        assert next_one.poll() is None
