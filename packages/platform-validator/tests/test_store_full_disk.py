"""A disk that takes no more: every write says so, leaves nothing half done, and works again by itself.

Run as a program, it does the same on the small file system that it is given: see `main`.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from io import RawIOBase
from pathlib import Path

import pytest

from platform_protocol.ids import LeaseToken, VmId, VmName
from platform_validator.host_name import HostName
from platform_validator.store.opening import open_database
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import (
    EnvRecord,
    InstanceState,
    JobOutcome,
    SealedText,
    Stage,
    VmPhase,
)
from platform_validator.store.specimens import CHALLENGE, NOW, cvm, instance, job, writes
from platform_validator.store.sqlite import SqliteStore

OPEN, ENDED, WAITING = (job(number).claim_id for number in (1, 2, 3))
VM = VmName("pv-1")
BODY = b"x" * 50_000
ENV = EnvRecord(CHALLENGE, "KEY", "https://example.org/x", b"sealed", NOW)
Failure = Callable[[SqliteStore], AbstractContextManager[None]]

READS = {
    "close",
    "job",
    "open_jobs",
    "recent_jobs",
    "outbox",
    "vm",
    "open_vms",
    "drained_hosts",
    "instances",
    "challenge_history",
    "values",
    "value",
    "values_used",
    "env",
}
WRITES: dict[str, Callable[[Store], Awaitable[object]]] = {
    "identity": lambda store: store.identity(),
    "open_claim": lambda store: store.open_claim(job(9)),
    "claim_granted": lambda store: store.claim_granted(
        OPEN, granted=BODY, attempt=1, token=LeaseToken("t"), at=NOW
    ),
    "advance": lambda store: store.advance(OPEN, Stage.RUNNING, at=NOW, vm=VM, kit=BODY),
    "store_result": lambda store: store.store_result(OPEN, JobOutcome.SUCCEEDED, BODY, at=NOW),
    "end_job": lambda store: store.end_job(OPEN, outcome=JobOutcome.FAILED, reason="x", at=NOW),
    "compact": lambda store: store.compact(ended_before=NOW + timedelta(days=1), keep=0),
    "outbox_tried": lambda store: store.outbox_tried(WAITING, "no answer"),
    "outbox_delivered": lambda store: store.outbox_delivered(WAITING, at=NOW),
    "outbox_refused": lambda store: store.outbox_refused(WAITING, "lease_lost", at=NOW),
    "intend_vm": lambda store: store.intend_vm(cvm(9)),
    "vm_created": lambda store: store.vm_created(VM, VmId("id")),
    "vm_phase": lambda store: store.vm_phase(VM, VmPhase.DESTROYING, at=NOW, reason="x"),
    "vm_attested": lambda store: store.vm_attested(
        VM, attestation="simulated", vm_instance="aa", os_image="{}"
    ),
    "vm_assigned": lambda store: store.vm_assigned(VM, OPEN),
    "drain_host": lambda store: store.drain_host(HostName("one"), at=NOW),
    "undrain_host": lambda store: store.undrain_host(HostName("other")),
    "put_instance": lambda store: store.put_instance(instance(9)),
    "switch_instances": lambda store: store.switch_instances(
        replace(instance(2), state=InstanceState.ACTIVE), replace(instance(1), state=InstanceState.RECYCLING)
    ),
    "remove_instance": lambda store: store.remove_instance("key-1", at=NOW),
    "reseal_values": lambda store: store.reseal_values(
        "new", limit=9, skip=0, reseal=lambda record: SealedText(record.value, "new")
    ),
    "reseal_replies": lambda store: store.reseal_replies(
        "new", limit=9, skip=0, reseal=lambda reply: SealedText(reply.reply, "new")
    ),
    "put_env": lambda store: store.put_env(replace(ENV, name="OTHER")),
    "remove_env": lambda store: store.remove_env(CHALLENGE, ENV.name),
    "change_value": lambda store: store.change_value(
        CHALLENGE, "k", change=writes("2"), request=("s", "r"), at=NOW
    ),
}


async def prepared(path: Path) -> SqliteStore:
    """A store in which each of the writes has something to change."""
    store = await SqliteStore.open(path)
    for claim in (1, 2, 3):
        await store.open_claim(job(claim))
    await store.end_job(ENDED, outcome=JobOutcome.CANCELLED, reason="x", at=NOW)
    await store.store_result(WAITING, JobOutcome.SUCCEEDED, b"waiting", at=NOW)
    await store.intend_vm(cvm(1))
    await store.drain_host(HostName("other"), at=NOW)
    for number in (1, 2):
        await store.put_instance(instance(number))
    await store.change_value(CHALLENGE, "k", change=writes("1"), request=("s", "before"), at=NOW)
    await store.put_env(ENV)
    return store


def contents(path: Path) -> list[str]:
    """Everything in the database, as a process that starts now would find it: from a copy of its files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.exists():
                shutil.copy(source, Path(folder) / source.name)
        with closing(open_database(Path(folder) / path.name)) as connection:
            return list(connection.iterdump())


async def fails_wholly_and_works_again(path: Path, name: str, failure: Failure) -> None:
    """The law of each write: refused as unavailable, nothing changed, reads go on, then it just works."""
    store = await prepared(path)
    before, jobs = contents(path), await store.recent_jobs(10)
    with failure(store):
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await WRITES[name](store)
        assert await store.recent_jobs(10) == jobs
    assert contents(path) == before, "half of it was done"
    await WRITES[name](store)
    assert contents(path) != before, "it changes nothing: the case is wrong"
    after = contents(path)
    await store.close()
    assert contents(path) == after


@contextmanager
def no_byte_more(store: SqliteStore) -> Iterator[None]:
    """The kernel refuses every write to a file (EFBIG), wherever in it: setrlimit(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(store: SqliteStore) -> Iterator[None]:
    """What SQLite answers on a file system that went read-only under it."""
    store._db.connection.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        store._db.connection.execute("PRAGMA query_only = OFF")


def write_for_ever(file: RawIOBase, data: bytes) -> None:
    while file.write(data):
        pass


def filled(folder: Path) -> Callable[[SqliteStore], AbstractContextManager[None]]:
    """The file system of that folder, full to its last byte (ENOSPC)."""

    @contextmanager
    def full(store: SqliteStore) -> Iterator[None]:
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (65_536, 4096, 1):
                with pytest.raises(OSError, match="No space left on device"):
                    write_for_ever(file, bytes(size))
        try:
            yield
        finally:
            ballast.unlink()

    return full


@pytest.mark.robustness(6, "full", "read-only")
def test_every_write_is_among_the_cases() -> None:
    """Robustness 6: a method of the port is a read, or it is tried on a full disk."""
    methods = {name for name in vars(Store) if not name.startswith("_")}
    assert methods == READS | set(WRITES)
    assert not READS & set(WRITES)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.robustness(6, "full")
async def test_a_write_that_the_kernel_refuses_changes_nothing(tmp_path: Path, name: str) -> None:
    """Robustness 6: disk full at every write; the same store works again when there is room."""
    await fails_wholly_and_works_again(tmp_path / "validator.db", name, no_byte_more)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.robustness(6, "read-only")
async def test_a_write_on_a_read_only_disk_changes_nothing(tmp_path: Path, name: str) -> None:
    """Robustness 6: read-only at every write; the same store works again when it can be written."""
    await fails_wholly_and_works_again(tmp_path / "validator.db", name, read_only)


@pytest.mark.slow(reason="a process in a mount namespace of its own goes through every write")
@pytest.mark.robustness(6, "full", "recovers")
def test_every_write_on_a_real_full_file_system(tmp_path: Path) -> None:
    """Robustness 6: a tmpfs without a free byte (ENOSPC); each write works once the space is back."""
    sandbox = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/dev/shm"]
    small = ["--size", str(4 * 1024 * 1024), "--tmpfs", str(tmp_path)]
    ran = subprocess.run(
        [*sandbox, *small, sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == list(WRITES)


@pytest.mark.robustness(6, "full")
async def test_closing_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Robustness 6: what cannot be folded into the file stays in its log, and is read at the next start."""
    path = tmp_path / "validator.db"
    store = await prepared(path)
    jobs = await store.recent_jobs(10)
    with no_byte_more(store):
        await store.close()
    again = await SqliteStore.open(path)
    assert await again.recent_jobs(10) == jobs
    await again.close()


@pytest.mark.robustness(6, "full")
async def test_a_start_on_a_full_disk_says_so_and_the_next_one_works(tmp_path: Path) -> None:
    """Robustness 6: neither a first start nor a later one leaves anything broken behind."""
    path = tmp_path / "validator.db"
    for _ in range(2):
        store = await prepared(tmp_path / "other.db")
        with no_byte_more(store), pytest.raises(StoreUnavailable):
            await SqliteStore.open(path)
        await store.close()
        (tmp_path / "other.db").unlink()
        await (await SqliteStore.open(path)).close()


def main() -> None:
    """Every write on the small file system of `sys.argv[1]`; prints the names of those that hold."""
    folder = Path(sys.argv[1])
    held = []
    for name in WRITES:
        asyncio.run(fails_wholly_and_works_again(folder / f"{name}.db", name, filled(folder)))
        (folder / f"{name}.db").unlink()
        held.append(name)
    sys.stdout.write(json.dumps(held))


if __name__ == "__main__":
    main()
