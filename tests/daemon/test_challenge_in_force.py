"""A challenge in a running engine: what is shown to be in force, and what an operator gives it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.daemon.world import CHALLENGE, World, play, until

from platform_validator.challenges.environment import ListEnv, SetEnv, UnsetEnv
from platform_validator.challenges.source import FetchedTree
from platform_validator.daemon.board import Board
from platform_validator.daemon.control import DaemonControl, Started
from platform_validator.daemon.systemd import Systemd
from platform_validator.store.records import InstanceState
from platform_validator.telemetry.metrics import Metrics

TOML = (
    b'name = "digits"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'
    b'[execution]\nready = 0\ntimeout_s = 30\n[network]\nhosts = ["api.example"]\n'
    b'[scoring]\nalgorithm = "Logarithmic"\n[env.API_KEY]\nsecret = true\n'
)


class WantsKey:
    """Code whose platform.toml wants a variable of the operator."""

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        return FetchedTree("b" * 64, Path("/nowhere"), TOML)

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        raise NotImplementedError


def test_a_variable_that_is_given_makes_a_challenge_active_and_what_is_in_force_is_shown(
    tmp_path: Path,
) -> None:
    """Failed with the command; given, Active without a backoff; shown with limits, rule and names alone."""

    async def story(world: World) -> None:
        world.source = WantsKey()
        board, engine = Board(world.settings, Metrics()), world.engine()
        control = DaemonControl(
            world.settings, reread=lambda: world.settings, board=board, systemd=Systemd(None)
        )
        board.components = engine.parts
        control.start(Started(engine, world.store, world.renewer))
        running = asyncio.create_task(engine.run())

        def candidate() -> tuple[InstanceState, str] | None:
            for view in engine.parts.challenges.views():
                if view.candidate is not None:
                    return view.candidate.state, view.candidate.reason or ""
            return None

        def failed() -> bool:
            found = candidate()
            return found is not None and found[0] is InstanceState.FAILED

        await until(failed)
        assert f"validator env set {CHALLENGE} API_KEY" in str(candidate())
        repository = "https://github.com/o/digits"
        failed_at = asyncio.get_running_loop().time()
        given = SetEnv(challenge_id=CHALLENGE, repository=repository, name="API_KEY", value="canary")
        assert (await control.env(given))["set"] is True
        await until(lambda: bool(engine.parts.challenges.active_ids()))
        assert asyncio.get_running_loop().time() - failed_at < 10
        shown = await board.challenge(str(CHALLENGE))
        assert shown is not None
        found = shown["effective"]
        assert found["resources"] == {"cpu_cores": 1, "memory_mb": 256, "disk_mb": 512, "gpu_count": 0}
        assert found["limits"] == world.settings.limits.model_dump()
        assert found["network"]["refused_hosts"] == ["api.example"]
        assert (found["scoring"]["algorithm"], found["scoring"]["normalization"]) == ("Logarithmic", "MinMax")
        assert (found["timeout_s"], found["env"]) == (30.0, {"API_KEY": "given"})
        assert "canary" not in str(shown) + str(board.status()) + str(await control.env(ListEnv()))
        await control.env(UnsetEnv(challenge_id=CHALLENGE, name="API_KEY"))
        # What runs has it already; the instance without it is Failed beside the Active one.
        await until(lambda: "env_missing" in str(candidate()))
        assert engine.parts.challenges.active_ids() == [CHALLENGE]
        engine.drain("over")
        await running

    play(story, tmp_path)
