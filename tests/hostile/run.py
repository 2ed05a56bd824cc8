"""Makes every attempt, attack and control side by side, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.processes import DemoFailed
from tests.canary.places import Search, search_files, search_pages, search_processes
from tests.hostile.attack import Attack, Facts
from tests.hostile.house import Attempt, House

_TICK = 0.1
_END_S = 120.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an attack and of its control. `emulated`: its time may have been up before it began."""

    attack: Attack
    facts: Facts
    control: Facts | None
    live: bool
    seconds: float
    emulated: bool = False

    @property
    def faults(self) -> list[str]:
        """Why it does not count as contained; empty: it does."""
        found = ["it succeeded"] if self.attack.won(self.facts) else []
        outcomes = self.attack.outcomes | ({"timeout"} if self.emulated else set())
        if self.facts.outcome not in outcomes:
            wanted = " or ".join(sorted(outcomes))
            found.append(f"its job is {self.facts.outcome} ({self.facts.error[:200]}), expected {wanted}")
        found += [f"{name} left the VM" for name in self.facts.found]
        return found

    @property
    def contained(self) -> bool:
        """Whether it is."""
        return not self.faults

    def line(self) -> str:
        """In words."""
        said = "contained" if self.contained else f"NOT CONTAINED: {'; '.join(self.faults)}"
        shown = "control live" if self.live else "CONTROL DEAD"
        if not self.live and self.control is not None:
            shown += f" ({self.control.outcome}: {self.control.error[:200]}; {self.control.logs[-300:]!r})"
        what = f"{self.attack.case} {self.attack.name}: {said} ({self.facts.outcome})"
        return f"{what}; {shown}; {self.seconds:.1f} s"


@dataclass(slots=True)
class Run:
    """One run. `say` is told each verdict; `closed` is attacked, `opened` has the controls."""

    closed: House
    opened: House
    say: Callable[[str], None]
    emulated: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    honest: dict[str, int] = field(default_factory=dict)
    _made: int = 0

    def carry_out(self, attacks: list[Attack]) -> None:
        """Attack after attack, honest jobs beside them.

        Raises:
            DemoFailed: A part does not answer, or a job never ends.
        """
        for number, attack in enumerate(attacks, 1):
            began = time.monotonic()
            facts, control = self._pair(attack)
            live = attack.control.apart() if attack.control.apart else attack.won(control or Facts())
            verdict = Verdict(attack, facts, control, live, time.monotonic() - began, self.emulated)
            self.verdicts.append(verdict)
            self.say(f"{number}/{len(attacks)} {verdict.line()}")

    def settle(self) -> None:
        """Every honest job comes to its end."""
        deadline = time.monotonic() + _END_S
        while not self.closed.all_ended(self.honest) and time.monotonic() < deadline:
            time.sleep(_TICK)

    def figures(self) -> dict[str, Any]:
        """All but what is looked at when everything has ended."""
        leaks, places = self._leaks()
        failed = self.closed.honest_failed(self.honest)
        for each in failed:
            self.say(f"an honest job suffered: {each}")
        for name, place in leaks:
            self.say(f"{name} is in {place}")
        return {
            "attacks": len(self.verdicts),
            "contained": sum(each.contained for each in self.verdicts),
            "controls_live": sum(each.live for each in self.verdicts),
            "canary_leaks": len(leaks) + sum(len(each.facts.found) for each in self.verdicts),
            "validator_restarts": self.closed.system.restarts,
            "other_jobs_failed": len(failed),
            "other_jobs": len(self.honest),
            "canaries": len(self.closed.system.canaries),
            "places_searched": places,
            "controls_in_the_whole_system": sum(
                each.attack.control.apart is None and each.live for each in self.verdicts
            ),
            "trapped": sum(bool(each.facts.trapped) for each in self.verdicts),
            "unexpected_timeouts": sum(
                each.facts.outcome == "timeout" and "timeout" not in each.attack.outcomes
                for each in self.verdicts
            ),
            "validator_grew_mb": max((each.facts.validator_bytes for each in self.verdicts), default=0) >> 20,
            "validator_answered_within_s": round(
                max((each.facts.answers_s for each in self.verdicts), default=0.0), 2
            ),
        }

    def _pair(self, attack: Attack) -> tuple[Facts, Facts | None]:
        """Both at once, each in its own system."""
        mine = self.closed.begin(attack, widened=False)
        other: Attempt | None = None
        if attack.control.apart is None:
            other = self.opened.begin(attack, widened=True)
        ended = [False, other is None]
        while not all(ended):
            self._feed()
            ended[0] = ended[0] or self.closed.poll(mine)
            if other is not None:
                ended[1] = ended[1] or self.opened.poll(other)
            time.sleep(_TICK)
        return self.closed.facts(mine), None if other is None else self.opened.facts(other)

    def _feed(self) -> None:
        """One honest job is always open."""
        if "echo" in self.closed.system.challenges and self.closed.all_ended(self.honest):
            self._made += 1
            self.honest[self.closed.upload_honest(self._made)] = self._made

    def _leaks(self) -> tuple[list[tuple[str, str]], int]:
        """Canaries in files, pages and processes where they do not belong; how many places were looked at."""
        search = Search(self.closed.system.canaries)
        search_files(search, self.closed.system.state)
        search_pages(search, self.closed.system.stack)
        parts = self.closed.system.stack.processes.parts.items()
        search_processes(search, {part.process.pid: name for name, part in parts})
        return search.found, search.places


def left_behind(states: tuple[Path, ...]) -> list[str]:
    """Folders of a run that are still there."""
    return [str(state) for state in states if state.exists()]


__all__ = ["DemoFailed", "Run", "Verdict", "left_behind"]
