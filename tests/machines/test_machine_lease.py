"""The lease's keeper against a model of the Platform API, under any order of outages, gaps and refusals.

The law: it never goes on believing in a lease that the Platform API has ended, but for a margin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from tests.machines.timed import PROFILE, TimedMachine, finds

from platform_protocol.ids import JobId, LeaseToken
from platform_validator.jobs import lease as lease_module
from platform_validator.jobs.lease import HeldLease, LeaseRules, LeaseState, Renew, Stop, TaskRenewer, Wait
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.memory_client import MemoryPlatformClient
from platform_validator.platform_client.port import JobUnknown, LeaseRefused, PlatformUnavailable

JOB, TOKEN = JobId("job"), LeaseToken("token")
TERM = 120.0
RULES = LeaseRules(stall_limit=timedelta(minutes=10), outage_grace=timedelta(minutes=20))
SLOW = 15.0
MARGIN = TERM / 3 + SLOW + 10.0 + 5.0
"""A third of a term until the next renewal, its slow answer, the longest retry and the longest look away."""


class Api(MemoryPlatformClient):
    """The Platform API's side of one lease."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(MemoryPlatform(), hotkey="ours", instance="ours")
        self._now = now
        self.ends_at = TERM
        self.over: tuple[str, float] | None = None
        self.line = "up"
        self.line_since = 0.0
        self.asked: list[float] = []
        self.granted_at = 0.0

    def end(self, code: str) -> None:
        """End the lease, as of now."""
        if self.over is None:
            self.over = code, self._now()

    async def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """See the port."""
        assert (job_id, token) == (JOB, TOKEN)
        self.asked.append(asked_at := self._now())
        line = self.line
        if line == "slow":
            await asyncio.sleep(SLOW)
        if line == "down":
            raise PlatformUnavailable("no route to host")
        if self.over is not None:
            code = self.over[0]
            if code == "job_not_found":
                raise JobUnknown("404", code=code, status=404)
            raise LeaseRefused("409", code=code, status=409)
        self.ends_at = self._now() + TERM
        if line == "lost":
            raise PlatformUnavailable("the answer was lost")
        self.granted_at = asked_at
        return timedelta(seconds=TERM)


class LeaseMachine(TimedMachine):
    """Time passes, the line fails, the API ends the lease, the process is stopped: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.api = Api(self.clock.boottime)
        self.lost: list[tuple[str, float, float]] = []
        self.held: HeldLease | None = None
        self.fed_at = self.woke_at = 0.0
        self.fed = True
        self.start(self._keep())
        self.let_pass(0)

    async def _keep(self) -> None:
        renewer = TaskRenewer(client=self.api, clock=self.clock, rules=RULES)
        async with renewer.keep(JOB, TOKEN, term=TERM, asked_at=0.0, on_lost=self._on_lost) as self.held:
            await asyncio.Event().wait()

    def _on_lost(self, reason: str) -> None:
        self.lost.append((reason, self.clock.boottime(), self.fed_at))

    def _feed(self) -> None:
        if self.fed and self.held is not None:
            self.held.feed()
            self.fed_at = self.clock.boottime()

    @rule(seconds=st.integers(1, 900))
    def time_passes(self, seconds: int) -> None:
        """The job's task shows life every 30 s, unless it is stuck."""
        while seconds > 0:
            self._feed()
            self.let_pass(min(seconds, 30))
            seconds -= 30
            self.the_keeper_is_right()

    @rule(seconds=st.integers(1, 2000))
    def nothing_runs(self, seconds: int) -> None:
        """SIGSTOP, a sleeping machine: the first thing then is to ask, before anything is believed."""
        asked, believed = len(self.api.asked), not self.lost
        busy = self.api.line == "slow"
        self.freeze(seconds)
        self.woke_at = self.clock.boottime()
        self._feed()
        if self.held is not None and not self.lost and seconds > TERM:
            assert self.held.in_doubt(), "it slept for longer than the term, and believes"
        self.let_pass(0.001)
        if believed and seconds > TERM / 3 and not busy:
            assert self.lost or len(self.api.asked) > asked, "it woke, and did not ask"

    @rule(line=st.sampled_from(["up", "up", "down", "lost", "slow"]))
    def the_line_changes(self, line: str) -> None:
        """To answers, silence, answers that are lost, or slow ones."""
        if line != self.api.line:
            self.api.line, self.api.line_since = line, self.clock.boottime()

    @rule(code=st.sampled_from(["job_cancelled", "attempt_expired", "job_not_found"]))
    def the_api_ends_it(self, code: str) -> None:
        """Cancelled, expired or deleted."""
        self.api.end(code)

    @precondition(lambda self: self.clock.boottime() > self.api.ends_at)
    @rule()
    def another_validator_claims(self) -> None:
        """Which it may once the term is over."""
        self.api.end("lease_lost")

    @rule()
    def a_push_hints(self) -> None:
        """A hint makes it ask, and decides nothing."""
        if self.held is not None:
            self.held.renew_now()

    @rule(fed=st.booleans())
    def the_task_sticks_or_recovers(self, fed: bool) -> None:
        """Whether the job's own task shows life."""
        self.fed = fed
        self._feed()

    @invariant()
    def the_keeper_is_right(self) -> None:
        """What is believed, and what was given up and why."""
        assert len(self.lost) <= 1
        if self.lost:
            self._rightly_lost(*self.lost[0])
        else:
            self._rightly_believed(self.clock.boottime())

    def _rightly_lost(self, reason: str, at: float, fed_at: float) -> None:
        assert not any(asked > at for asked in self.api.asked), "it asked on after it had given up"
        if reason == "stalled":
            assert at - fed_at >= RULES.stall_limit.total_seconds()
        elif reason == "outage":
            assert at - self.api.granted_at >= RULES.outage_grace.total_seconds()
        else:
            assert self.api.over is not None
            assert reason == self.api.over[0]

    def _rightly_believed(self, now: float) -> None:
        answers = self.api.line in {"up", "slow"}
        if self.api.over is not None and answers:
            since = max(self.api.over[1], self.api.line_since, self.woke_at)
            assert now - since <= MARGIN, f"it believes, {now - since:.0f} s after the end"
        quiet = now - max(self.api.granted_at + RULES.outage_grace.total_seconds(), self.woke_at)
        assert quiet <= MARGIN, "it believes in what nobody has confirmed for too long"
        stuck = now - max(self.fed_at + RULES.stall_limit.total_seconds(), self.woke_at)
        assert stuck <= MARGIN, "it renews for a task that is dead"
        calm = now - max(self.api.line_since, self.woke_at) > MARGIN
        if self.api.line == "up" and calm and self.api.over is None:
            assert self.held is not None
            assert not self.held.in_doubt(), "it was answered, and doubts"
            assert now < self.api.ends_at, "it let a lease lapse that it could have renewed"


LeaseMachine.TestCase.settings = PROFILE
TestLeaseMachine = LeaseMachine.TestCase


def _silence_is_yes(patch: pytest.MonkeyPatch) -> None:
    def silent(self: LeaseState, asked_at: float, held_off: float = 0.0) -> LeaseState:
        del held_off
        return self.granted(asked_at, self.term)

    patch.setattr(LeaseState, "silent", silent)


def _refusals_are_silence(patch: pytest.MonkeyPatch) -> None:
    def denied(self: LeaseState, asked_at: float, code: str) -> LeaseState:
        del code
        return self.silent(asked_at)

    patch.setattr(LeaseState, "denied", denied)


def _a_dead_task_keeps_its_lease(patch: pytest.MonkeyPatch) -> None:
    original = lease_module.decide

    def decide(state: LeaseState, *, fed_at: float, now: float, rules: LeaseRules) -> Renew | Wait | Stop:
        del fed_at
        return original(state, fed_at=now, now=now, rules=rules)

    patch.setattr(lease_module, "decide", decide)


def _a_gap_is_waited_out(patch: pytest.MonkeyPatch) -> None:
    original = lease_module.decide

    def decide(state: LeaseState, *, fed_at: float, now: float, rules: LeaseRules) -> Renew | Wait | Stop:
        step = original(state, fed_at=fed_at, now=now, rules=rules)
        return Wait(1.0) if isinstance(step, Renew) and now - state.granted_at > state.term else step

    patch.setattr(lease_module, "decide", decide)


def _a_gap_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def in_doubt(self: LeaseState, now: float) -> bool:
        del self, now
        return False

    patch.setattr(LeaseState, "in_doubt", in_doubt)


def _renewed_at_the_last_moment(patch: pytest.MonkeyPatch) -> None:
    original = lease_module.decide

    def decide(state: LeaseState, *, fed_at: float, now: float, rules: LeaseRules) -> Renew | Wait | Stop:
        step = original(state, fed_at=fed_at, now=now, rules=rules)
        return Wait(1.0) if isinstance(step, Renew) and now - state.granted_at < state.term else step

    patch.setattr(lease_module, "decide", decide)


@pytest.mark.parametrize(
    "fault",
    [
        _silence_is_yes,
        _refusals_are_silence,
        _a_dead_task_keeps_its_lease,
        _a_gap_is_waited_out,
        _a_gap_is_forgotten,
        _renewed_at_the_last_moment,
    ],
)
def test_a_keeper_with_a_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine finds each fault that is put in."""
    fault(monkeypatch)
    finds(LeaseMachine)
