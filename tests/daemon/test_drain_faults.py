"""A drain comes to its end whatever fails on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.daemon.world import World, play, until

from platform_validator.daemon.engine import Engine


def failing_at_its_end(error: Exception) -> Callable[[], object]:
    """A loop with a task of its own, which fails when it is cancelled: the group raises that instead."""

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise error from None

    async def loop() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            await asyncio.Event().wait()

    return loop


@pytest.mark.parametrize("which", ["extra", "jobs", "challenges", "fleet", "outbox"])
def test_a_loop_that_fails_while_it_is_cancelled_is_not_started_again(tmp_path: Path, which: str) -> None:
    """The failure hides the cancellation; the daemon ends all the same."""

    async def story(world: World) -> None:
        engine: Engine = world.engine()
        loop = failing_at_its_end(RuntimeError("the disk is full"))
        if which == "extra":
            engine._extra = {"extra": loop}  # type: ignore[dict-item] # an awaitable
        else:
            getattr(engine.parts, which).run = loop
        async with asyncio.TaskGroup() as group:
            running = group.create_task(engine.run())
            await until(lambda: engine.phase == "running")
            await asyncio.sleep(1)
            engine.drain("test")
            async with asyncio.timeout(300):
                left = await running
        assert (left.undelivered, left.cvms_left) == (0, 0)

    play(story, tmp_path)
