"""A challenge's author runs it on a submission, without a VM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from platform_challenge_sdk import Challenge, Context, ValueRefused
from platform_challenge_sdk import submission as submission_module
from platform_challenge_sdk.contained import run_contained
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.testing import run_locally
from platform_challenge_sdk.testing_values import MemoryValues


async def test_a_job_runs_with_values_in_memory() -> None:
    challenge = Challenge()

    @challenge.on_job()
    async def job(ctx: Context, payload: dict[str, Any]) -> float:
        assert await ctx.values.get("absent", 5) == 5
        assert await ctx.values.set("a/1", {"x": [1]}) == 1
        assert await ctx.values.get_versioned("a/1") == ({"x": [1]}, 1)
        assert await ctx.values.increment("a/2", 2.5) == 2.5
        assert await ctx.values.compare_and_set("a/1", 1, "new") == 2
        with pytest.raises(ValueRefused, match="version"):
            await ctx.values.compare_and_set("a/1", 1, "newer")
        assert await ctx.values.list("a/") == ["a/1", "a/2"]
        await ctx.values.delete("a/2")
        ctx.log.warning(" ".join((payload["say"], (ctx.submission.path / "submission").read_text())))
        return 0.5

    values = MemoryValues()
    done = await run_locally(challenge, b"file", payload={"say": "hello"}, values=values)
    assert (done.result, done.error, done.logs) == ({"score": 0.5}, None, ["warning: hello file"])
    assert values.entries == {"a/1": ("new", 2)}


async def test_sync_values_in_an_async_handler_are_refused_rather_than_waited_for() -> None:
    challenge = Challenge()

    @challenge.on_job()
    async def job(ctx: Context, payload: dict[str, Any]) -> Any:
        return ctx.values.sync.get("k")

    done = await run_locally(challenge, None)
    assert done.error is not None
    assert "would block the event loop" in done.error["message"]


@pytest.mark.slow  # starts Python with the SDK in it
@pytest.mark.parametrize(
    ("answer", "code", "key"), [("print(41 + 1)", 0, "result"), ("import os; os.abort()", 1, "error")]
)
def test_the_command_prints_the_result_and_says_what_is_not_contained(
    tmp_path: Path, answer: str, code: int, key: str
) -> None:
    (tmp_path / "platform.toml").write_text('name = "c"\nversion = "1"\n')
    (tmp_path / "challenge.py").write_text(
        "from platform_challenge_sdk import challenge, require_ok, run\n"
        "@challenge.on_job()\nasync def job(ctx, payload):\n"
        "    return float(require_ok(await ctx.submission.run(['python3', 'main.py'])).text)\n"
        "if __name__ == '__main__': run()\n"
    )
    submission = tmp_path / "submission"
    submission.mkdir()
    (submission / "main.py").write_text(answer)
    done = subprocess.run(
        [sys.executable, "-m", "platform_challenge_sdk.testing", str(tmp_path), str(submission)],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == code, done.stderr
    told = json.loads(done.stdout)
    assert told[key] == (
        {"score": 42.0}
        if key == "result"
        else {"code": "submission_failed", "message": "the submission was killed by SIGABRT"}
    )
    assert "without a VM" in done.stderr


async def test_a_job_that_is_contained_by_less_says_so_once_in_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the handler does with the outcome, the validator and the miner see what fell away."""
    challenge, kind = Challenge(), Containment("landlock", own_uid=True, landlock=7)
    monkeypatch.setattr(submission_module, "containment", lambda: kind)
    monkeypatch.setattr(
        submission_module, "run_contained", lambda order, cancelled, kind: run_contained(order, cancelled)
    )

    @challenge.on_job()
    async def job(ctx: Context, _payload: dict[str, Any]) -> float:
        for _ in range(2):
            assert (await ctx.submission.run(["true"])).ok
        return 0.5

    done = await run_locally(challenge, b"file")
    assert done.logs == [f"warning: the submission is contained by {kind}"]
    assert "lost: network, paths, shared_memory, names, disk" in done.logs[0]
