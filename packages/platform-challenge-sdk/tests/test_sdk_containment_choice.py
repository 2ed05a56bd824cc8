"""How submissions are contained is decided by facts, and holds when those around a run are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from waiting import wait_until

from platform_challenge_sdk import contained, landlock
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.containment import LOST, Containment, Facts, choose
from platform_challenge_sdk.errors import ContainmentUnavailable


class TestTheChoice:
    @pytest.mark.parametrize(
        ("facts", "chosen"),
        [
            (Facts("x86_64", root=True, namespaces=None), Containment()),
            (Facts("aarch64", root=False, namespaces=None, landlock=7), Containment()),
            (
                Facts("x86_64", root=True, namespaces="no", own_uid=None, landlock=1),
                Containment("landlock", True, 1),
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid=None, landlock=6),
                Containment("landlock", False, 6),
            ),
        ],
    )
    def test_the_strongest_that_holds_is_used(self, facts: Facts, chosen: Containment) -> None:
        assert choose(facts) == chosen

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            (Facts("riscv64", root=True, namespaces=None), "expected an x86_64 or aarch64 machine"),
            (
                Facts("x86_64", root=True, namespaces="refused"),
                "namespaces: refused; the kernel has no Landlock",
            ),
            (
                Facts(
                    "x86_64", root=True, namespaces="no", own_uid="no CAP_SETUID", same_uid=None, landlock=7
                ),
                "under an own uid: no CAP_SETUID",
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid=None, landlock=5),
                "Landlock 5 keeps no signals in: expected 6",
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid="it signals the SDK", landlock=7),
                "under the SDK's uid: it signals the SDK",
            ),
        ],
    )
    def test_where_nothing_holds_nothing_is_run_and_each_reason_is_named(
        self, facts: Facts, reason: str
    ) -> None:
        with pytest.raises(ContainmentUnavailable, match=reason):
            choose(facts)

    def test_what_falls_away_is_named_and_explained(self) -> None:
        assert Containment().lost == ()
        weakest = Containment("landlock", own_uid=False, landlock=2)
        assert set(weakest.lost) == set(LOST)
        assert "lost: network" in str(weakest)


KILLED = """
import os, sys
from pathlib import Path
from platform_challenge_sdk import recipe, room
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.errors import ContainmentUnavailable

recipe._prefixes = list  # a Python below /root is out of another uid's reach; the shell needs none
room._FIRST_UID, room._UIDS = int(sys.argv[2]), 1
program = "setsid sh -c 'trap : TERM; while :; do sleep 1; done' & sleep 50"
order = Order(["sh", "-c", program], Path(sys.argv[1]), b"", 50.0, 64 * MIB, {}, MIB)
try:
    run_contained(order, (), Containment("landlock", True, int(sys.argv[3])))
except ContainmentUnavailable as error:
    print(error)
"""


@pytest.mark.slow(reason="starts Python with the SDK in it")
@pytest.mark.needs("root", why="it gives runs a uid of their own")
@pytest.mark.parametrize("killed", ["the SDK", "the stage"])
def test_what_a_run_left_ends_with_whoever_is_killed(tmp_path: Path, killed: str) -> None:
    """`kill -9` of the SDK or of the stage in the middle of a run: a helper or the next in line ends it."""
    uid = 65_100 + os.getpid() % 400
    tmp_path.chmod(0o755)
    rooms = tempfile.mkdtemp()  # not below pytest's, which only root may enter
    Path(rooms).chmod(0o711)

    def of_the_run() -> set[int]:
        found = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    found.add(int(entry.name))
        return found

    command = [sys.executable, "-c", KILLED, str(tmp_path), str(uid), str(min(7, landlock.version()))]
    environment = os.environ | {"TMPDIR": rooms}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as sdk:
        wait_until("begun", lambda: len(of_the_run()) >= 4)
        [stage] = Path(f"/proc/{sdk.pid}/task/{sdk.pid}/children").read_text().split()
        os.kill(sdk.pid if killed == "the SDK" else int(stage), signal.SIGKILL)
        wait_until("ended", lambda: not of_the_run())
        told, _ = sdk.communicate()
    shutil.rmtree(rooms)
    assert (b"the stage died" in told) == (killed == "the stage")


def test_a_stage_that_is_killed_while_bubblewrap_starts_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before bubblewrap could ask for its parent's death: what it would run would run for ever."""
    tmp_path.chmod(0o755)
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(1) as pool:
        told, slow = Path(made, "told"), Path(made, "bwrap")
        Path(made).chmod(0o777)
        slow.write_text(f"#!/bin/sh\necho $PPID $$ > {told}; exec sleep 50\n")
        slow.chmod(0o755)
        monkeypatch.setattr(contained, "_program", lambda _: str(slow))
        running = pool.submit(run_contained, Order(["true"], tmp_path, b"", 50.0, 64 * MIB, {}, MIB))
        wait_until("begun", lambda: told.exists() and told.read_text().endswith("\n"))
        stage, started = (int(word) for word in told.read_text().split())
        os.kill(stage, signal.SIGKILL)
        with pytest.raises(ContainmentUnavailable, match="the stage died"):
            running.result(50)
        wait_until("ended", lambda: not _lives(started))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
