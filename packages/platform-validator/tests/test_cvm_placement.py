"""Where a CVM is made: a table of cases, and what holds for any hosts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.resources import Resources
from platform_validator.cvm.placement import (
    HostState,
    Limits,
    Placement,
    Refusal,
    Share,
    Wish,
    add,
    decide,
    keeper,
    placement,
)
from platform_validator.host_name import HostName

BIG, SMALL, GPU = HostName("big"), HostName("small"), HostName("gpu")


def size(cores: int = 1, memory: int = 512, disk: int = 1024, gpus: int = 0) -> Resources:
    """A size."""
    return Resources(cpu_cores=cores, memory_mb=memory, disk_mb=disk, gpu_count=gpus)


TOTALS = Limits(size(100, 100_000, 1_000_000, 8), max_cvms=100)


def host(name: HostName, limits: Resources, **more: object) -> HostState:
    """A host that is open."""
    return HostState(name, Limits(limits, max_cvms=10), **more)  # type: ignore[arg-type] # the table mixes fields


NOTHING = size(0, 0, 0)
half_open = host(SMALL, size(4, 2048), half_open=True)
big = host(BIG, size(8, 8192, 80_000))
small = host(SMALL, size(4, 2048, 20_000))
gpu = host(GPU, size(16, 65_536, 500_000, 2))


@dataclass(frozen=True)
class Case:
    """What is there, what is wanted, and what becomes of it."""

    hosts: tuple[HostState, ...]
    wish: Resources
    expected: Placement | tuple[str, HostName | None]
    held: tuple[Share, ...] = ()
    totals: Limits = TOTALS
    image: str | None = None


CASES = {
    "the only host": Case((small,), size(), Placement(SMALL)),
    "a host without limits is bounded by the totals": Case((HostState(SMALL),), size(100), Placement(SMALL)),
    "beyond the totals": Case((HostState(SMALL),), size(101), ("cpu", None)),
    "empty hosts: the one that is used the least afterwards": Case((small, big), size(), Placement(BIG)),
    "spread: the fuller one is passed": Case(
        (small, big), size(), Placement(SMALL), held=(Share(BIG, size(6, 512, 1024)),)
    ),
    "spread looks at the scarcest kind": Case(
        (small, big), size(1, 512, 1024), Placement(BIG), held=(Share(SMALL, size(0, 1024, 0)),)
    ),
    "equals: the first of the configuration": Case(
        (host(SMALL, size(4, 4096)), host(BIG, size(4, 4096))), size(), Placement(SMALL)
    ),
    "fit comes before spread": Case((small, big), size(5), Placement(BIG), held=(Share(BIG, size(3)),)),
    "two hosts are not one large one": Case((small, big), size(10), ("cpu", BIG)),
    "the reason of the host that comes nearest": Case((small, big), size(6, 9000), ("memory", BIG)),
    "of two reasons the guide's first": Case(
        (small,), size(5), ("cpu", SMALL), totals=Limits(size(100, 100_000, 1_000_000), max_cvms=0)
    ),
    "the number of CVMs is the last": Case(
        (small,), size(), ("cvms", SMALL), held=(Share(SMALL, NOTHING),) * 10
    ),
    "a host that is drained or failed": Case(
        (host(SMALL, size(4), closed="drained"), big), size(), Placement(BIG), held=(Share(BIG, size(7)),)
    ),
    "no host is open": Case((host(SMALL, size(4), closed="drained"),), size(), ("host", None)),
    "no host at all": Case((), size(), ("host", None)),
    "a host without the image": Case(
        (
            host(SMALL, size(4, 2048), images=frozenset({"a"})),
            host(BIG, size(8, 8192), images=frozenset({"b"})),
        ),
        size(),
        Placement(SMALL),
        image="a",
    ),
    "no host with the image": Case(
        (host(SMALL, size(4), images=frozenset({"a"})),), size(), ("image", None), image="b"
    ),
    "a host that was never asked may have any image": Case((small,), size(), Placement(SMALL), image="b"),
    "GPUs are left to those that want one": Case((gpu, small), size(), Placement(SMALL)),
    "unless there is no other": Case((gpu, small), size(5), Placement(GPU)),
    "GPUs": Case((gpu, big), size(gpus=2), Placement(GPU)),
    "all GPUs are taken": Case((gpu, big), size(gpus=1), ("gpu", GPU), held=(Share(GPU, size(gpus=2)),)),
    "a half-open host takes one": Case((half_open,), size(), Placement(SMALL, probe=True)),
    "and no second": Case(
        (half_open,),
        size(),
        ("host", None),
        held=(Share(SMALL, size(), probe=True),),
    ),
    "what a failed host still holds counts against the totals": Case(
        (host(SMALL, size(4), closed="no answer"), big),
        size(2),
        ("cpu", None),
        held=(Share(SMALL, size(4)),),
        totals=Limits(size(5, 100_000, 1_000_000), max_cvms=10),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_cvm_is_placed(case: Case) -> None:
    """Case by case."""
    answer = placement(case.totals, case.hosts, case.held, Wish(case.wish, case.image))
    if isinstance(answer, Refusal):
        assert (answer.reason, answer.host) == case.expected
        assert str(answer)
    else:
        assert answer == case.expected


def test_why_no_host_is_open_is_said_of_each() -> None:
    """The operator reads it in the status."""
    hosts = (host(SMALL, size(4), closed="drained"), host(BIG, size(8), closed="no answer"))
    assert str(placement(TOTALS, hosts, (), Wish(size()))) == "host: small: drained; big: no answer"


def test_room_is_kept_on_the_open_host_that_is_large_enough_and_used_the_least() -> None:
    """A job that fits nowhere now waits for one host, and not for a bit of each."""
    held = (Share(BIG, size(8)), Share(GPU, size(16)))
    assert keeper(TOTALS, (small, big, gpu), held, Wish(size(6))) == BIG
    assert keeper(TOTALS, (small, big), held, Wish(size(9))) is None
    assert keeper(TOTALS, (small, host(BIG, size(8, 8192), closed="drained")), held, Wish(size(6))) is None
    assert keeper(Limits(size(5), 9), (big,), held, Wish(size(6))) is None


@dataclass(frozen=True)
class World:
    """Some hosts with what they hold."""

    hosts: list[HostState]
    held: list[Share] = field(default_factory=list)


sizes = st.builds(size, st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2))
limits = st.builds(Limits, sizes, st.integers(0, 4))
NAMES = [HostName(name) for name in "abc"]


@given(
    limits,
    st.lists(
        st.builds(
            HostState,
            st.sampled_from(NAMES),
            st.none() | limits,
            st.sampled_from([None, None, "drained"]),
            st.booleans(),
        ),
        max_size=3,
        unique_by=lambda one: one.name,
    ),
    st.lists(st.builds(Share, st.sampled_from(NAMES), sizes, st.booleans()), max_size=4),
    sizes,
)
def test_what_is_placed_fits_and_what_is_refused_does_not(
    totals: Limits, hosts: list[HostState], held: list[Share], wish: Resources
) -> None:
    """Beneath its host's limits and the totals; refused only where every open host, or the total, is full."""
    answer = placement(totals, hosts, held, Wish(wish))
    fits_in_all = decide(totals, [share.resources for share in held], wish) is None
    open_and_fitting = {
        one.name
        for one in hosts
        if one.closed is None
        and not (one.half_open and any(share.probe and share.host == one.name for share in held))
        and decide(one.limits or totals, [each.resources for each in held if each.host == one.name], wish)
        is None
    }
    if isinstance(answer, Refusal):
        assert not (fits_in_all and open_and_fitting)
        return
    assert fits_in_all
    assert answer.host in open_and_fitting
    chosen = next(one for one in hosts if one.name == answer.host)
    there = [each.resources for each in held if each.host == answer.host]
    bound = chosen.limits or totals
    for kind in ("cpu_cores", "memory_mb", "disk_mb", "gpu_count"):
        wanted = getattr(wish, kind)
        assert wanted == 0 or getattr(add([*there, wish]), kind) <= getattr(bound.resources, kind)
    assert len(there) < bound.max_cvms
