"""Room is kept for a large job, so that small ones do not go on for ever before it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.platform_messages import PendingJob
from platform_protocol.resources import Resources
from platform_validator.cvm.placement import Limits, Share, Wish
from platform_validator.cvm.quota import Quota, Reservation
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.jobs.passed_over import PassedOver

FOUR, ONE = (Resources(cpu_cores=cores, memory_mb=1, disk_mb=1) for cores in (4, 1))
TOTALS = Limits(Resources(cpu_cores=4, memory_mb=99, disk_mb=99), max_cvms=9)


def job(name: str, priority: int = 0) -> PendingJob:
    """A pending one."""
    return PendingJob(
        id=JobId(name),
        challenge_id=ChallengeId("c"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        resources=ONE,
        timeout_s=60,
        priority=priority,
    )


LARGE, SMALL, URGENT = job("large"), job("small"), job("urgent", priority=1)


def where(wish: Wish) -> Share:
    """Every CVM could be made somewhere."""
    return Share(DEFAULT_HOST, wish.resources)


def test_room_is_kept_after_a_minute_from_every_job_but_more_urgent_ones() -> None:
    """The job itself may take it."""
    over = PassedOver()
    over.begin({LARGE.id}, 0, where)
    over.noted(LARGE, Wish(FOUR), 0)
    over.begin({LARGE.id}, 59, where)
    assert over.kept is None
    over.begin({LARGE.id}, 60, where)
    assert over.kept_from(SMALL) == Share(DEFAULT_HOST, FOUR)
    assert over.kept_from(LARGE) is None
    assert over.kept_from(URGENT) is None


def test_no_room_is_kept_for_what_is_not_pending_or_has_had_its_turn() -> None:
    """Nor for a job that is held up by something else."""
    over = PassedOver(timedelta(0))
    for turn in (True, False):
        over.noted(LARGE, Wish(FOUR), 0)
        over.begin({LARGE.id}, 1, where)
        assert over.kept is not None
        over.forget(LARGE.id) if turn else over.begin({SMALL.id}, 1, where)
        assert over.kept_from(SMALL) is None
        over.begin({LARGE.id}, 2, where)
        assert over.kept is None


def test_a_job_that_is_too_large_for_every_host_keeps_nothing_from_the_next() -> None:
    """The one after it that waited long is kept for instead; a more urgent one comes first."""
    over = PassedOver(timedelta(0))
    huge = job("huge")
    over.noted(huge, Wish(Resources(cpu_cores=9, memory_mb=1, disk_mb=1)), 0)
    over.noted(LARGE, Wish(FOUR), 1)
    over.begin({huge.id, LARGE.id}, 2, Quota(TOTALS).keep)
    assert over.kept is not None
    assert over.kept.job_id == LARGE.id
    over.noted(URGENT, Wish(FOUR), 2)
    over.begin({LARGE.id, URGENT.id}, 3, Quota(TOTALS).keep)
    assert over.kept is not None
    assert over.kept.job_id == URGENT.id


def test_small_jobs_that_come_first_in_every_pass_do_not_starve_a_large_one() -> None:
    """As a queue that alternates between challenges has it: a small one stands before it in each pass.

    Four small jobs run; every ten seconds one of them ends and another is pending, ahead of the large one.
    """
    over, quota = PassedOver(), Quota(TOTALS)
    running = [share for n in range(4) if isinstance(share := quota.reserve(ONE, f"{n}"), Reservation)]
    for now in range(0, 200, 10):
        quota.release(running.pop(0))
        small = job(f"small-{now}")
        over.begin({small.id, LARGE.id}, now, quota.keep)
        share = quota.reserve(ONE, small.id, kept=over.kept_from(small))
        if isinstance(share, Reservation):
            running.append(share)
        if isinstance(quota.reserve(FOUR, LARGE.id, kept=over.kept_from(LARGE)), Reservation):
            assert now == 90
            return
        over.noted(LARGE, Wish(FOUR), now)
    raise AssertionError("the large job never had its room")
