"""What is in force for a challenge: the operator's side always wins."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.ids import ChallengeId
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec, NetworkSpec
from platform_validator.challenges.effective import effective
from platform_validator.cli.show import in_force
from platform_validator.cvm.plan import CvmPlan
from platform_validator.daemon.board import plain
from platform_validator.egress.effective import EffectiveNetwork, narrowed
from platform_validator.network_policy import NetworkPolicy

SIZE = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)


@pytest.mark.parametrize(
    ("wanted", "policy", "reached"),
    [
        ((["a.x"], []), (True, ["a.x"], [443]), (["a.x"], [443], [], [])),
        ((["a.x", "b.x"], [443, 22]), (True, ["a.x"], [443, 80]), (["a.x"], [443], ["b.x"], [22])),
        ((["a.x"], []), (True, ["*.x"], [443]), (["a.x"], [443], [], [])),
        ((["*.x"], []), (True, ["a.x"], [443]), (["a.x"], [443], [], [])),
        ((["*.a.x"], []), (True, ["*.x"], [443]), (["*.a.x"], [443], [], [])),
        ((["x"], []), (True, ["*.x"], [443]), ([], [], ["x"], [])),
        ((["evilx"], []), (True, ["*.x"], [443]), ([], [], ["evilx"], [])),
        ((["a.x"], [443]), (False, ["a.x"], [443]), ([], [], ["a.x"], [443])),
        ((["a.x"], [443]), (True, [], [443]), ([], [], ["a.x"], [443])),
        (([], []), (True, ["a.x"], [443]), ([], [], [], [])),
    ],
)
def test_the_network_is_what_both_sides_name(
    wanted: tuple[list[str], list[int]],
    policy: tuple[bool, list[str], list[int]],
    reached: tuple[list[str], list[int], list[str], list[int]],
) -> None:
    """Hosts and ports of both, the narrower pattern; what is refused is named."""
    allow, hosts, ports = policy
    found = narrowed(
        NetworkSpec(hosts=wanted[0], ports=wanted[1]), NetworkPolicy(allow, tuple(hosts), tuple(ports))
    )
    assert found == EffectiveNetwork(*(tuple(part) for part in reached))  # type: ignore[arg-type] # four lists as they stand in the table


names = st.sampled_from(["x", "a.x", "b.a.x", "*.x", "*.a.x", "y", "*.y"])


def matches(patterns: list[str], host: str) -> bool:
    """Whether a plain host is named."""
    return any(each == host or (each[:2] == "*." and host.endswith(each[1:])) for each in patterns)


@given(st.lists(names), st.lists(names), st.sampled_from(["x", "a.x", "b.a.x", "c.b.a.x", "y", "d.y"]))
def test_a_host_is_reached_when_both_name_it(theirs: list[str], ours: list[str], host: str) -> None:
    """For every host: exactly when the challenge and the operator both do."""
    found = narrowed(
        NetworkSpec(hosts=theirs), NetworkPolicy(allow_outbound=True, hosts=tuple(ours), ports=(1,))
    )
    assert matches(list(found.hosts), host) == (matches(theirs, host) and matches(ours, host))


def test_it_is_shown_with_the_limits_and_without_values() -> None:
    """Sizes beside the operator's totals; of a variable only whether it was given."""
    spec = ChallengeSpec.model_validate(
        {"name": "x", "version": "1", "env": {"KEY": {}, "MORE": {}}, "network": {"hosts": ["a.x"]}}
    )
    plan = CvmPlan(
        challenge_id=ChallengeId("c"),
        instance_key="k",
        commit="a" * 40,
        image="an-image",
        compose=b"{}",
        compose_hash="d" * 64,
        bundle_sha256="b" * 64,
        resources=SIZE,
        timeout=timedelta(seconds=30),
        env={"KEY": "canary"},
    )
    limits = Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240)
    policy = NetworkPolicy(allow_outbound=False, hosts=(), ports=())
    files = FilesystemPolicy(read_only=False, allowed_paths=("/scratch",), denied_paths=("/srv",))
    found: dict[str, Any] = plain(
        effective(spec, plan, limits=limits, policy=policy, filesystem=files, scoring={"algorithm": "Linear"})
    )
    out = io.StringIO()
    in_force(found, Console(file=out, width=200))
    shown = out.getvalue()
    assert "canary" not in shown + str(found)
    hidden = "root writable; also writable: /scratch; hidden: /srv; dstack does not enforce it"
    for words in (
        "an-image",
        "memory_mb 256 of 2048",
        "nothing; refused: a.x",
        "KEY given, MORE not given",
        hidden,
    ):
        assert words in shown
