"""Where control groups are made, on hosts of every kind: trees of plain files, shaped as each kernel's.

What a real kernel adds to that on version 2 alone is run in a virtual machine: tests/guest/cgroup2.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from platform_vmm.sandbox.cgroups import ControlGroups, Limits

LIMITS = Limits(memory_bytes=2**28, cpus=2, pids=64)


def tree(root: Path, *groups: str, controllers: str = "cpuset cpu io memory pids") -> Path:
    """A version 2 hierarchy with some groups."""
    for group in ("", *groups):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / "cgroup.controllers").write_text(f"{controllers}\n")
        (root / group / "cgroup.procs").touch()
        (root / group / "cgroup.subtree_control").touch()
    return root


def own(folder: Path, text: str) -> Path:
    """/proc/self/cgroup."""
    path = folder / "own"
    path.write_text(text)
    return path


def refuse(group: Path) -> None:
    """Make the kernel's answer to handing out limits an error, as for a group with processes."""
    (group / "cgroup.subtree_control").unlink()
    (group / "cgroup.subtree_control").mkdir()


def test_version_2_with_delegation_the_vmm_moves_into_a_leaf_of_its_own_group_first(tmp_path: Path) -> None:
    """As under systemd's Delegate=yes; sandboxes are beside the leaf, with all limits."""
    root = tree(tmp_path / "cgroup", "system.slice/vmm.service")
    service = root / "system.slice/vmm.service"
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/system.slice/vmm.service\n"))
    assert (service / "vmm-1.vmm/cgroup.procs").read_text() == str(os.getpid())
    assert (service / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    assert (service / "vmm-1/cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    assert (root / "cgroup.subtree_control").read_text() == ""
    assert groups.limits_hold
    one = service / "vmm-1/one"
    one.mkdir()
    for name in ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max"):
        (one / name).touch()
    groups.create("one", LIMITS)
    assert {path.name: path.read_text() for path in one.iterdir()} == {
        "memory.max": str(2**28),
        "memory.swap.max": "0",
        "memory.oom.group": "0",
        "cpu.max": "200000 100000",
        "pids.max": "64",
    }
    groups.attach("one", 4242)
    assert (one / "cgroup.procs").read_text() == "4242"


def test_version_2_limits_that_others_in_the_group_had_are_left_to_them(tmp_path: Path) -> None:
    """At its end the VMM takes back what it handed out and no more."""
    root = tree(tmp_path / "cgroup", "a")
    (root / "a/cgroup.subtree_control").write_text("cpu memory\n")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/a\n"))
    groups.close()
    assert (root / "a/cgroup.subtree_control").read_text() == "-pids"
    assert (root / "a/cgroup.procs").read_text() == str(os.getpid())


def test_version_2_started_again_from_its_leaf_it_stays_there(tmp_path: Path) -> None:
    """A VMM that was started from a shell of the old one's group makes no leaf below the leaf."""
    root = tree(tmp_path / "cgroup", "a", "a/vmm-1.vmm")
    ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/a/vmm-1.vmm\n"))
    assert (root / "a/vmm-1").is_dir()
    assert not (root / "a/vmm-1.vmm/vmm-1.vmm").exists()


def test_version_2_in_a_group_with_others_root_makes_its_groups_at_the_top(tmp_path: Path) -> None:
    """And goes back from the leaf, so that its group is as it was."""
    root = tree(tmp_path / "cgroup", "session.scope")
    refuse(root / "session.scope")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/session.scope\n"))
    assert groups.limits_hold
    assert (root / "vmm-1").is_dir()
    assert (root / "session.scope/cgroup.procs").read_text() == str(os.getpid())


def test_version_2_that_hands_out_nothing_still_kills(tmp_path: Path) -> None:
    """Groups without limits are told as such; cgroup.kill needs none."""
    root = tree(tmp_path / "cgroup", "session.scope")
    refuse(root)
    refuse(root / "session.scope")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/session.scope\n"))
    assert not groups.limits_hold
    one = root / "session.scope/vmm-1/one"
    one.mkdir()
    (one / "cgroup.kill").touch()
    groups.kill("one")
    assert (one / "cgroup.kill").read_text() == "1"


def test_version_2_with_a_controller_missing_does_not_claim_all_limits(tmp_path: Path) -> None:
    """A delegation of memory and pids alone, as for users on some systems."""
    root = tree(tmp_path / "cgroup", "user", controllers="memory pids")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "0::/user\n"))
    assert (root / "user/cgroup.subtree_control").read_text() == "+memory +pids"
    assert not groups.limits_hold


V1 = "5:memory:/own\n4:pids:/\n3:cpu,cpuacct:/own\n2:freezer:/\n"


@pytest.mark.parametrize("unified", [False, True])
def test_version_1_and_hybrid_groups_are_made_below_the_vmms_own(tmp_path: Path, unified: bool) -> None:
    """Each controller where the VMM is in it; an empty version 2 beside them serves to kill."""
    root = tmp_path / "cgroup"
    for group in ("memory/own", "cpu/own", "cpuacct/own", "pids", "freezer"):
        (root / group).mkdir(parents=True)
    if unified:
        tree(root / "unified", controllers="")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, V1 + "0::/\n"))
    assert groups.limits_hold
    groups.create("one", LIMITS)
    made = {str(path.relative_to(root)) for path in root.rglob("one")}
    expected = {f"{place}/vmm-1/one" for place in ("memory/own", "cpu/own", "cpuacct/own", "pids", "freezer")}
    assert made == expected | ({"unified/vmm-1/one"} if unified else set())


def test_hybrid_what_version_1_has_not_taken_is_limited_by_version_2(tmp_path: Path) -> None:
    """Memory in version 2, the rest in version 1: all three limits hold."""
    root = tmp_path / "cgroup"
    for group in ("cpu", "pids"):
        (root / group).mkdir(parents=True)
    tree(root / "unified", controllers="memory pids")
    groups = ControlGroups("vmm-1", root=root, own=own(tmp_path, "2:cpu:/\n1:pids:/\n0::/\n"))
    assert (root / "unified/cgroup.subtree_control").read_text() == "+memory"
    assert groups.limits_hold


def test_without_any_hierarchy_nothing_is_made_and_nothing_is_claimed(tmp_path: Path) -> None:
    groups = ControlGroups("vmm-1", root=tmp_path / "absent", own=own(tmp_path, ""))
    groups.create("one", LIMITS)
    groups.kill("one")
    assert not groups.limits_hold
    assert groups.leftovers() == []
    groups.close()
