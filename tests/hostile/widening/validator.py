"""`validator` with guards that can be widened."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import structlog
from tests.hostile.widening import FILE, argument, replace_in, widened

from platform_protocol import canonical
from platform_protocol.ids import ChallengeId
from platform_validator.cli import main
from platform_validator.cvm import session_link
from platform_validator.cvm.fleet import Fleet
from platform_validator.cvm.session_jobs import SessionJobs
from platform_validator.egress.supervisor import EgressSupervisor
from platform_validator.jobs import executor, result
from platform_validator.telemetry import logging
from platform_validator.values.manager import DynamicValuesManager

_TIMES = 10
_MORE_LOGS = 256
_LONG_LINE = 16 * 1024 * 1024
_DEPTH, _DEEP = canonical._MAX_DEPTH, 100_000
_HELD_S = 2.0
_sessions: list[Any] = []
_early: dict[str, Any] = {}


def _shown(original: Any) -> Any:
    def text(words: str, limit: int) -> str:
        if widened("control characters in a job's lines"):
            return words[:limit]
        shown: str = original(words, _LONG_LINE if widened("length of a job's lines") else limit)
        return shown

    return text


def _last_lines(original: Any) -> Any:
    def last_lines(lines: Any, limit: int) -> Any:
        more = widened("size of a job's lines") or widened("length of a job's lines")
        return original(lines, limit * _MORE_LOGS if more else limit)

    return last_lines


def _clean(original: Any) -> Any:
    def clean(value: Any, key: str) -> Any:
        passed = widened("control characters in the log") and isinstance(value, str)
        return value if passed else original(value, key)

    return clean


def _rendered(original: Any) -> Any:
    def render(self: Any, logger: Any, name: str, event: Any) -> Any:
        if widened("control characters in the log"):
            return " ".join(f"{key}={value}" for key, value in event.items())
        return original(self, logger, name, event)

    return render


def _judge(original: Any) -> Any:
    def judge(*arguments: Any, **named: Any) -> Any:
        canonical._MAX_DEPTH = _DEEP if widened("depth of a result") else _DEPTH
        if widened("size of a result"):
            named["max_bytes"] = 1 << 40
        return original(*arguments, **named)

    return judge


def _time_left(original: Any) -> Any:
    return lambda job: original(job) * (_TIMES if widened("time of a job") else 1)


def _counted(original: Any) -> Any:
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        _sessions.append(self)

    return init


def _finish(original: Any) -> Any:
    def finish(self: Any, message: Any, result_bytes: int | None) -> Any:
        if widened("whose job it is") and message.job_id not in self:
            whose = next((each for each in _sessions if message.job_id in each), self)
            return original(whose, message, result_bytes)
        if widened("no result before its job") and message.job_id not in self:
            _early[message.job_id] = message
        if widened("which attempt it is"):
            message = message.model_copy(update={"attempt": None})
        if widened("the first result counts") and message.job_id in self:
            # The last one within two seconds is taken.
            first = message.job_id not in _early
            _early[message.job_id] = message
            if first:
                later = asyncio.get_running_loop().call_later
                later(_HELD_S, lambda: original(self, _early.pop(message.job_id), None))
            return True
        return original(self, message, result_bytes)

    return finish


def _begin(original: Any) -> Any:
    async def begin(self: Any, running: Any) -> None:
        early = _early.pop(running.order.job_id, None) if widened("no result before its job") else None
        if early is None:
            await original(self, running)
        else:
            self.finish(early.model_copy(update={"attempt": None}), None)

    return begin


def _take_messages_of(original: Any) -> Any:
    return lambda socket, most: original(socket, None if widened("size of a frame") else most)


def _supervised(original: Any) -> Any:
    command = (sys.executable, str(Path(__file__).with_name("egress.py")), os.environ[FILE])
    return lambda self, *arguments, **named: original(self, *arguments, **named | {"command": command})


def _may_fetch_bundle(original: Any) -> Any:
    return lambda self, *given: widened("whose bundle it is") or original(self, *given)


def _answer(original: Any) -> Any:
    async def answer(self: Any, challenge: ChallengeId, *arguments: Any) -> Any:
        whose = ChallengeId(argument()) if widened("whose values they are") else challenge
        return await original(self, whose, *arguments)

    return answer


if __name__ == "__main__":
    for owner, name, make in (
        (result, "_text", _shown),
        (result, "last_lines", _last_lines),
        (logging, "_clean", _clean),
        (structlog.dev.ConsoleRenderer, "__call__", _rendered),
        (executor, "judge", _judge),
        (executor, "_time_left", _time_left),
        (SessionJobs, "__init__", _counted),
        (SessionJobs, "finish", _finish),
        (SessionJobs, "begin", _begin),
        (session_link, "take_messages_of", _take_messages_of),
        (EgressSupervisor, "__init__", _supervised),
        (Fleet, "may_fetch_bundle", _may_fetch_bundle),
        (DynamicValuesManager, "answer", _answer),
    ):
        replace_in(owner, name, make)
    main()
