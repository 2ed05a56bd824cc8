"""When pushes fail the poll carries the work, and the metrics show which of the two does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, play, until

from platform_validator.daemon.board import Board
from platform_validator.daemon.engine import Engine
from platform_validator.platform_client.port import PlatformUnavailable


def measured(board: Board, name: str) -> float:
    """A sample of `/metrics`, by its name and labels."""
    exposition = board.metrics()
    assert exposition is not None
    for line in exposition[0].decode().splitlines():
        if line.startswith(f"platform_validator_{name} "):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{name} is not exposed")


def board_of(world: World, engine: Engine) -> Board:
    """What the daemon shows."""
    board = Board(world.settings, engine._metrics)
    board.components, board.notifications = engine.parts, engine.notifications
    return board


@pytest.mark.robustness(15, "none")
def test_the_metrics_show_whether_pushes_or_the_poll_bring_jobs(tmp_path: Path) -> None:
    """Connected: a push. Broken: within the poll's five seconds, and said. Connected again: a push."""

    async def story(world: World) -> None:
        world.guests.may_finish.set()
        engine = world.engine()
        board = board_of(world, engine)
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())

        async def done_by(source: str, within: float) -> None:
            before = measured(board, f'claims_dispatched_total{{source="{source}"}}')
            # Not in the moment of a poll, which would find it first.
            polls = world.platform.calls.count("pending_jobs")
            await until(lambda: world.platform.calls.count("pending_jobs") > polls)
            began = asyncio.get_running_loop().time()
            job_id = world.platform.add_job(CHALLENGE)
            await until(lambda: world.platform.jobs[job_id].attempt == 1)
            assert asyncio.get_running_loop().time() - began <= within
            await until(lambda: world.platform.jobs[job_id].finished and not world.vmm.machines())
            assert measured(board, f'claims_dispatched_total{{source="{source}"}}') == before + 1

        await done_by("push", within=1)
        assert measured(board, "notifications_connected") == 1
        for _ in range(5):
            world.platform.fail_next("notifications", PlatformUnavailable("refused"))
        world.platform.close_connections(PlatformUnavailable("closed with 1012"))
        await until(lambda: measured(board, "notifications_connected") == 0)
        assert measured(board, 'degraded{component="notifications"}') == 1
        await done_by("poll", within=6)
        await until(lambda: engine.notifications.view().connected)
        assert measured(board, "notifications_connected") == 1
        assert measured(board, 'degraded{component="notifications"}') == 0
        assert measured(board, "notification_connections_total") == 2
        await done_by("push", within=1)
        engine.drain("the story is over")
        await running

    play(story, tmp_path)
