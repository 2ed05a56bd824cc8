"""Control groups of version 2 alone, which a host need not have: in a virtual machine that has no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.guest.machine import run

import platform_vmm
from platform_vmm.rootfs import build_guest_image

SOURCES = Path(platform_vmm.__file__).parent
MODULES = ("__init__", "errors", "state", "sandbox/__init__", "sandbox/cgroups", "sandbox/hierarchies")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that the program in the machine found."""
    state = Path(__file__).resolve().parents[2] / ".cache" / "platform-vmm"
    state.mkdir(parents=True, exist_ok=True)
    modules = {f"platform_vmm/{name}.py": SOURCES / f"{name}.py" for name in MODULES}
    program = Path(__file__).with_name("cgroup2_inside.py")
    told: dict[str, Any] = run(
        build_guest_image(state), program, modules, tmp_path_factory.mktemp("machine"), limit=400
    )
    assert "error" not in told, told["error"]
    return told


pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "mksquashfs"),
    pytest.mark.slow(reason="boots a virtual machine on an emulated processor"),
    pytest.mark.timeout(500),
]


@pytest.mark.parametrize("who", ["root", "user"])
class TestVersion2:
    def test_the_vmm_moves_into_a_leaf_and_back(self, found: dict[str, Any], who: str) -> None:
        """Else its own group could hand out no limits; at its end the group is as it was."""
        assert found[who]["limits_hold"] is True, found[who]
        assert found[who]["own"] == "0::/system.slice/vmm.service/vmm-1.vmm"
        assert found[who]["after"] == {"own": "0::/system.slice/vmm.service", "left": []}

    def test_of_a_group_that_outgrows_its_memory_one_process_dies(
        self, found: dict[str, Any], who: str
    ) -> None:
        """The one with the higher score, a submission's; the SDK lives and tells its end."""
        memory = found[who]["memory"]
        assert (memory["code"], memory["oom_kills"]) == (7, 1)
        assert memory["peak"] <= 64 * 1024**2

    def test_processes_and_processor_are_limited(self, found: dict[str, Any], who: str) -> None:
        assert found[who]["pids"] == 39
        assert found[who]["cpu"]["share"] < 1.3
        assert found[who]["cpu"]["throttled"] > 0

    def test_a_tree_is_killed_and_what_was_left_is_reclaimed(self, found: dict[str, Any], who: str) -> None:
        assert found[who]["killed_ms"] < 20_000
        assert found[who]["reclaimed"] == ["left"]


def test_a_handler_of_core_dumps_is_fed_at_limit_0_and_not_at_1(found: dict[str, Any]) -> None:
    """Why a guest's RLIMIT_CORE is 1: the control shows that 0 does not keep a piped core_pattern away."""
    assert found["core"] == {"0": True, "1": False}
