"""The egress proxy's decisions: who may use it, how much, and which refusals are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.ids import VmName
from platform_validator.egress.accounts import Account, Accounts, EgressLimits, has_room
from platform_validator.egress.control import RefusedRequest
from platform_validator.egress.policy import Grant
from platform_validator.egress.process import RefusalTelling
from platform_validator.egress.refusals import Reason, Refused

GRANT = Grant(("api.example.com", "*.wild.example"), (443, 80))


def account(vm: str = "a", password: str = "1" * 64, *, most: int = 100, rate: int = 0) -> Account:
    """One that may move so much."""
    return Account(VmName(vm), password, GRANT, EgressLimits(2, most, rate, 4))


def test_only_the_right_password_of_a_cvm_that_exists_is_known() -> None:
    """And who has none is counted together."""
    accounts = Accounts()
    accounts.allow(known := account())
    assert accounts.authenticate("a", "1" * 64) is known
    assert accounts.authenticate("a", "2" * 64) is None
    assert accounts.authenticate("b", "1" * 64) is None
    assert accounts.authenticate("b", "0" * 64) is None
    assert accounts.authenticate("a", "\u00e9") is None
    assert accounts.unauthenticated == 4
    accounts.forget(VmName("a"))
    assert accounts.authenticate("a", "1" * 64) is None


def test_what_a_cvm_used_counts_on_when_it_is_told_again() -> None:
    """A new password or policy makes no new budget; one that is gone is seen once more."""
    accounts = Accounts()
    accounts.allow(account())
    [first] = accounts.look()
    first.count(sent=60, now=0)
    accounts.allow(account())
    assert accounts.look() == [first]
    accounts.allow(account(password="2" * 64))
    [second] = accounts.look()
    with pytest.raises(Refused) as error:
        second.count(received=60, now=0)
    assert error.value.reason is Reason.BYTES_SPENT
    with pytest.raises(Refused):
        second.enter()
    accounts.forget(VmName("a"))
    assert accounts.look() == [second]
    assert accounts.look() == []


@pytest.mark.parametrize(
    ("held", "others", "room"),
    [
        (0, [], True),
        (63, [], True),
        (64, [], False),
        (0, [64], False),
        (8, [0, 30, 0], True),  # 26 are free, 16 of them are the others'
        (8, [0, 40, 0], False),
        (7, [0, 40, 0], True),
        (7, [0, 40, 16], True),
        (0, [1] * 62, True),
        (1, [1] * 62, True),
        (1, [1] * 63, False),
    ],
)
def test_of_all_connections_half_are_kept_in_equal_shares(held: int, others: list[int], room: bool) -> None:
    """Of 64: whoever takes many, as several CVMs, takes no other's last."""
    assert has_room(held, others, 64) is room


@given(st.lists(st.integers(0, 9), max_size=200))
def test_however_many_others_want_each_cvm_gets_its_share(wants: list[int]) -> None:
    """Ten CVMs ask in any order; then each of them can still have a twentieth of all."""
    held = [0] * 10
    for each in wants:
        held[each] += has_room(held[each], [*held[:each], *held[each + 1 :]], 100)
    for each in range(10):
        while held[each] < 5:
            assert has_room(held[each], [*held[:each], *held[each + 1 :]], 100)
            held[each] += 1
    assert sum(held) <= 100


def test_a_rate_is_kept_after_a_second_of_grace() -> None:
    """Ten bytes a second: the wait grows with what is ahead, and goes with time."""
    paced = account(most=10**6, rate=10)
    assert paced.count(sent=10, now=100.0) == 0
    assert paced.count(sent=30, now=100.0) == pytest.approx(3.0)
    assert paced.count(sent=10, now=104.0) == pytest.approx(0.0)
    assert account(most=10**6).count(sent=10**5, now=0) == 0


def test_refusals_are_told_five_times_a_minute_escaped_and_capped() -> None:
    """Of each CVM and reason; the rest is counted into the next one that is told."""
    said: list[RefusedRequest] = []
    now = 0.0
    telling = RefusalTelling(said.append, lambda: now)
    for _ in range(9):
        telling.tell("a", Reason.NO_SNI, "x\r\n\x1b[31m\u00fc" + "y" * 500)
    telling.tell("b", Reason.NO_SNI, "")
    assert [(one.vm, one.more) for one in said] == [("a", 0)] * 5 + [("b", 0)]
    assert said[0].target.startswith(r"x\r\n\x1b[31m\xfcyyy")
    assert len(said[0].target) < 220
    now = 61.0
    telling.tell("a", Reason.NO_SNI, "")
    assert said[-1].more == 4
    telling.forget("a")
    telling.tell("a", Reason.NO_SNI, "")
    assert said[-1].more == 0
