"""A host closes for silence and for failures, and opens again with patience: decided without I/O."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from platform_validator.cvm.cordon import Cordon

AT = datetime(2026, 1, 2, tzinfo=UTC)
LATER = datetime(2026, 1, 3, tzinfo=UTC)


def test_three_looks_in_a_row_without_an_answer_close_it_until_one_is_answered() -> None:
    """An answer between them begins anew."""
    cordon = Cordon().unanswered("no", AT).unanswered("no", AT).answered().unanswered("no", AT)
    assert (cordon.closed(0), cordon.silenced) == (None, False)
    cordon = cordon.unanswered("no", AT).unanswered("no answer", AT)
    assert (cordon.closed(1e9), cordon.silenced, cordon.since) == ("no answer", True, AT)
    assert cordon.unanswered("still not", LATER).since == AT
    assert cordon.answered() == Cordon()


def test_a_silent_vmm_is_asked_again_soon_and_then_less_often() -> None:
    """Never less often than a good one."""
    cordon, waits = Cordon(), []
    for _ in range(6):
        waits.append(cordon.look_after)
        cordon = cordon.unanswered("no", AT)
    assert waits == [15, 2, 4, 8, 15, 15]


def test_three_failures_in_a_row_close_it_and_one_cvm_tries_it_again() -> None:
    """Twice as long each time, ten minutes at most; a CVM that comes up opens it wholly."""
    cordon = (
        Cordon().failed("bad", 0, AT).failed("bad", 0, AT).made().failed("bad", 0, AT).failed("bad", 0, AT)
    )
    assert cordon.closed(0) is None
    now, pauses = 0.0, []
    cordon = cordon.failed("CreateVm refused", now, AT)
    for _ in range(7):
        assert cordon.closed(now) is not None
        assert not cordon.half_open(now)
        assert cordon.until is not None
        pauses.append(cordon.until - now)
        now = cordon.until
        assert cordon.closed(now) is None
        assert cordon.half_open(now)
        assert cordon.since == AT
        cordon = cordon.failed("again", now, LATER)
    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert cordon.made() == Cordon()


def test_of_failures_that_were_under_way_when_it_closed_none_counts() -> None:
    """They say what the first one said."""
    closed = Cordon().failed("a", 0, AT).failed("b", 0, AT).failed("c", 0, AT)
    assert closed.failed("d", 1, AT) == closed
    assert closed.full("no room", 1, AT) == closed


def test_a_host_without_room_closes_at_once_and_shortly() -> None:
    """Our account says that there is some: somebody else has it, and may give it back."""
    cordon = Cordon().full("no CIDs", 100, AT)
    assert (cordon.closed(104.9), cordon.closed(105)) == ("no CIDs", None)
    again = cordon.full("no CIDs", 105, AT)
    assert again.until == 115


def test_a_cvm_that_goes_opens_a_host_that_lacked_room_for_one() -> None:
    """It need not wait for ten minutes where others have room to give back; a host that fails has to."""
    cordon, now = Cordon(), 0.0
    for _ in range(8):
        cordon = cordon.full("no CIDs", now, AT)
        now = cordon.until or now
    freed = cordon.freed(now - 100)
    assert (cordon.closed(now - 100), freed.closed(now - 100)) == ("no CIDs", None)
    assert freed.half_open(now - 100)
    assert freed.full("no CIDs", now, AT).until == now + 5
    failed = Cordon().failed("a", 0, AT).failed("b", 0, AT).failed("c", 0, AT)
    assert failed.freed(1) == failed
    silent = cordon.unanswered("no", AT).unanswered("no", AT).unanswered("no", AT)
    assert silent.freed(now) == silent


def test_silence_after_failures_ends_with_the_first_answer() -> None:
    """Whatever it was closed for before."""
    cordon = Cordon().full("no room", 0, AT)
    for _ in range(3):
        cordon = cordon.unanswered("no answer", LATER)
    assert (cordon.silenced, cordon.since) == (True, AT)
    assert cordon.answered().closed(0) is None


EVENTS = st.sampled_from(["answered", "unanswered", "made", "failed", "full", "freed"])


@given(st.lists(st.tuples(EVENTS, st.floats(0, 700)), max_size=40))
def test_no_host_is_closed_for_ever_once_its_vmm_answers(events: list[tuple[str, float]]) -> None:
    """Whatever happened: after an answer and ten minutes it takes one CVM at least."""
    cordon, now = Cordon(), 0.0
    for event, passed in events:
        now += passed
        match event:
            case "answered":
                cordon = cordon.answered()
            case "unanswered":
                cordon = cordon.unanswered("no", AT)
            case "made":
                cordon = cordon.made()
            case "failed":
                cordon = cordon.failed("bad", now, AT)
            case "freed":
                cordon = cordon.freed(now)
            case "full":
                cordon = cordon.full("no room", now, AT)
        assert (cordon.why is None) == (cordon.since is None)
        assert cordon.look_after <= 15
    assert cordon.answered().closed(now + 600) is None
    assert cordon.made().closed(now) is None
