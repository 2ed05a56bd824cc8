"""Jobs of challenges as they are deployed, which speak version 1: each quirk, and what it costs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from deployed_challenge import DeployedChallenge, HangUp
from old_line import PACE, line_to
from session_pair import JOB
from structlog.testing import capture_logs
from waiting import until

from platform_protocol.ids import JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_protocol.session.v1 import MAX_MESSAGE
from platform_validator.cvm.errors import SessionLost, SessionRefused
from platform_validator.jobs.ending import blame
from platform_validator.store.records import JobOutcome, Stage


async def test_a_submission_goes_into_the_payload_under_the_miners_name(tmp_path: Path) -> None:
    """Name, hash and base64 of its bytes, beside what the payload has; the order has three members."""
    path = tmp_path / "3f1c-claim-id"
    path.write_bytes(b"bytes\x00\xff")
    peer = DeployedChallenge()
    async with line_to(peer) as line:
        await line.ready()
        result = await line.run(path)
        await line.session.acknowledge(result)
    submission = {
        "filename": "agent.tar.gz",
        "sha256": hashlib.sha256(b"bytes\x00\xff").hexdigest(),
        "data": base64.b64encode(b"bytes\x00\xff").decode(),
    }
    payload = {"x": 1, "submission": submission}
    assert peer.heard[1:] == [{"type": "job_execute", "job_id": JOB, "job_name": "name", "payload": payload}]
    assert (result.result, result.error, result.evidence, result.session) == ({"score": 0.25}, None, None, 1)


@pytest.mark.parametrize("name", ["never registered", None])
async def test_a_job_name_that_is_unknown_goes_to_the_default_handler(name: str | None) -> None:
    """So their result is of another handler than was meant, and is a result all the same."""
    peer = DeployedChallenge(handlers={"": lambda _: {"score": 0.5}, "name": lambda _: {"score": 1.0}})
    async with line_to(peer) as line:
        await line.ready()
        assert (await line.run(name="name")).result == {"score": 1.0}
        assert (await line.run(name=name)).result == {"score": 0.5}
    assert peer.heard[2]["job_name"] == name


@pytest.mark.parametrize("error", ["", {}, "broken", {"code": 1}], ids=repr)
async def test_an_error_is_a_failure_even_an_empty_one(error: Any) -> None:
    """Their `str(error)` is empty for many exceptions; a result beside it does not count."""
    peer = DeployedChallenge(reports=lambda _job, _outcome: {"error": error, "result": {"score": 1.0}})
    async with line_to(peer) as line:
        await line.ready()
        result = await line.run()
    assert result.result is None
    assert result.error is not None
    assert result.error.message == (error if isinstance(error, str) else json.dumps(error))


@pytest.mark.parametrize("outcome", [None, 0.5, [1], "text"], ids=repr)
async def test_a_result_that_is_no_object_is_a_failure(outcome: Any) -> None:
    async with line_to(DeployedChallenge(handlers={"": lambda _: outcome})) as line:
        await line.ready()
        result = await line.run()
    assert result.error is not None
    assert result.error.code == "no_result"


async def test_a_result_is_known_by_its_job_and_not_by_its_message_id() -> None:
    """One of another job is nobody's."""
    peer = DeployedChallenge(
        asks=[{"type": "job_result", "job_id": "another", "result": {}, "message_id": "1"}]
    )
    async with line_to(peer) as line:
        await line.ready()
        assert (await line.run()).result == {"score": 0.25}


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({"message_id": "m", "payload": {"query_id": "q", "query": {}}}, ("m", "q")),
        ({"message_id": "m", "query_id": "q"}, ("m", "q")),
        ({"query_id": "q"}, ("q", "q")),
        ({"payload": {"query_id": "q"}}, ("q", "q")),
        ({"message_id": "m"}, ("m", None)),
        ({"payload": 1}, (None, None)),
    ],
    ids=["theirs", "both", "query id", "in the payload", "message id", "none"],
)
async def test_an_orm_query_is_answered_at_once_that_there_is_none(
    query: dict[str, Any], ids: tuple[str | None, str | None]
) -> None:
    """Under the id that it waits for, wherever it put it; otherwise it would wait for half a minute."""
    peer = DeployedChallenge(asks=[{"type": "orm_query"} | query])
    async with line_to(peer) as line:
        await line.ready()
        await line.run()
    message_id, query_id = ids
    text = "this validator offers no ORM"
    answer = {"type": "error", "error": text, "message": text, "message_id": message_id, "query_id": query_id}
    assert [one for one in peer.heard if one["type"] == "error"] == [answer]


async def test_a_handler_that_blocks_them_for_long_costs_nothing() -> None:
    """It answers no ping and no health meanwhile: we send none; three of ours would be over many times."""

    def block(_payload: dict[str, Any]) -> dict[str, Any]:
        time.sleep(PACE.ping * 25)
        return {"score": 1.0}

    peer = DeployedChallenge(handlers={"": block})
    async with line_to(peer) as line:
        await line.ready()
        async with asyncio.timeout(50), asyncio.TaskGroup() as group:
            job = group.create_task(line.run())
            await until(lambda: any(one["type"] == "job_execute" for one in peer.heard))
            # A VMM that is silent meanwhile is no reason to give it up either.
            await line.session.confirm()
        assert job.result().result == {"score": 1.0}
        assert line.session.reconnects == 0
    assert len(peer.begins) == 1
    assert {one["type"] for one in peer.heard} == {"orm_ready", "job_execute"}


async def test_there_is_one_job_at_a_time() -> None:
    """A second one is refused here, before they would begin it beside the first."""
    peer = DeployedChallenge(reports=lambda job, _outcome: {"job_id": f"not {job}"})
    async with line_to(peer) as line:
        await line.ready()
        first = asyncio.ensure_future(line.run())
        await until(lambda: len(peer.heard) >= 2)
        with pytest.raises(SessionRefused, match="beside another"):
            await line.run(job=JobId("second"))
        first.cancel()
        await asyncio.wait({first})
        # Nobody waits for the first any more, but it may still run: version 1 cannot end a job.
        with pytest.raises(SessionLost, match="cannot end"):
            await line.run(job=JobId("third"))
    assert len(peer.heard) == 2


async def test_there_is_no_configure_and_no_ready_and_the_environment_stays_here() -> None:
    """Serving needs health and handshake; values of the operator have no way in, which is logged by name."""
    peer = DeployedChallenge()
    with capture_logs() as logs:
        async with line_to(peer, env={"KEY": "very secret"}) as line:
            await line.ready()
            await line.run()
    [said] = [one for one in logs if one["event"] == "session_v1"]
    assert (said["log_level"], said["environment_not_given"]) == ("warning", ["KEY"])
    assert "very secret" not in json.dumps([peer.begins, peer.accepts, peer.heard])


@pytest.mark.parametrize("size", [9 * 1024 * 1024, MAX_MESSAGE], ids=["9 MiB", "64 MiB"])
@pytest.mark.slow(reason="64 MiB are sealed, sent, opened and parsed")
async def test_a_large_result_comes_through(size: int) -> None:
    """They have no limit; ours is 64 MiB a message, which the judge of results then holds to its own."""
    head = len(
        json.dumps(
            {"type": "job_result", "job_id": JOB, "message_id": "msg_1", "result": {"score": 0.5, "pad": ""}}
        )
    )
    peer = DeployedChallenge(handlers={"": lambda _: {"score": 0.5, "pad": "x" * (size - head)}})
    async with line_to(peer) as line:
        await line.ready()
        result = await line.run()
    assert result.error is None
    assert result.result == {"score": 0.5}
    assert result.result_bytes == size - head + len('{"score":0.5,"pad":""}')
    assert result.session == 1


@pytest.mark.slow(reason="a little more than 64 MiB are sealed and sent")
async def test_a_result_over_64_mib_is_a_failure_that_says_so() -> None:
    """It is refused by its length alone, unread; the session is over, and the job is not tried again."""
    peer = DeployedChallenge(handlers={"": lambda _: {"score": 0.5, "pad": "x" * (MAX_MESSAGE + 512)}})
    async with line_to(peer) as line:
        await line.ready()
        result = await line.run()
        assert "cannot resume" in str(await asyncio.wait_for(line.session.lost(), 20))
    assert result.error is not None
    assert result.error.code == "result_too_large"
    assert peer.ended == ["connection 1009"]


# What ends them


async def test_a_result_is_lost_with_its_connection_and_the_job_given_back() -> None:
    """There is no resume: the session is over, its CVM goes, and the job is released as `sandbox_died`."""
    peer = DeployedChallenge()

    def hang_up(_payload: dict[str, Any]) -> None:
        raise HangUp

    peer.handlers = {"": hang_up}
    async with line_to(peer) as line:
        await line.ready()
        with pytest.raises(SessionLost, match="cannot resume") as lost:
            await line.run()
    ending = blame(lost.value, stage=Stage.RUNNING, started=True)
    assert (ending.outcome, ending.release) == (JobOutcome.SANDBOX_DIED, ReleaseReason.SANDBOX_DIED)
    assert len(peer.begins) == 1


async def test_a_handler_that_ends_the_process_ends_the_session() -> None:
    """`sys.exit` in a handler kills their whole server."""

    def leave(_payload: dict[str, Any]) -> None:
        raise SystemExit(1)

    peer = DeployedChallenge(handlers={"": leave})
    async with line_to(peer) as line:
        await line.ready()
        with pytest.raises(SessionLost, match="cannot resume"):
            await line.run()
    assert peer.ended == ["server"]


async def test_nothing_is_taken_over_by_a_later_process() -> None:
    """What ran when the validator died is not given to it again on our own authority."""
    peer = DeployedChallenge()
    async with line_to(peer, resume=True) as line:
        with pytest.raises(SessionLost, match="version 1, which cannot resume"):
            await line.ready()
        with pytest.raises(SessionLost):
            await line.run()
    assert peer.heard == []
