"""The session with challenges as they are deployed, which speak version 1: each quirk, and what it costs.

The other end is `deployed_challenge`, which shares no code with ours. docs/attestation.md has a table of
these tests, which one of them compares.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from deployed_challenge import DeployedChallenge, HangUp, hkdf
from session_pair import CHALLENGE, JOB, SECRET, VM, Values
from structlog.testing import capture_logs

from platform_protocol.ids import Hotkey, JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_protocol.session.v1 import MAX_MESSAGE, EnvelopeChannel, derive_key
from platform_protocol.session.v2 import Offer
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import SessionLost, SessionRefused
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.session import CvmSession
from platform_validator.jobs.ending import blame
from platform_validator.store.records import JobOutcome, Stage

PACE = SessionPace(dial=20, handshake=20, send=20, ping=0.02, resume_for=2, retry=0.01, retry_most=0.05)
ROOT = Path(__file__).resolve().parents[3]


class Line:
    """A session with one of them; `judged` are its offers."""

    def __init__(self, session: CvmSession, judged: list[Offer]) -> None:
        self.session, self.judged = session, judged

    async def ready(self) -> None:
        async with asyncio.timeout(20):
            await self.session.ready()

    async def run(
        self,
        submission: Path | None = None,
        *,
        name: str | None = "name",
        payload: dict[str, Any] | None = None,
        job: JobId = JOB,
        within: float = 50,
    ) -> GuestResult:
        """One job."""
        digest = None if submission is None else hashlib.sha256(submission.read_bytes()).hexdigest()
        filename = None if submission is None else "agent.tar.gz"
        async with asyncio.timeout(within):
            return await self.session.execute(
                JobOrder(job, 1, CHALLENGE, name, payload or {"x": 1}, digest, filename),
                submission,
                on_started=lambda _already: None,
                on_progress=lambda percent, message: None,
                on_log=lambda level, message: None,
            )


@asynccontextmanager
async def line_to(
    peer: DeployedChallenge, *, allow_v1: bool = True, env: dict[str, str] | None = None, resume: bool = False
) -> AsyncIterator[Line]:
    """A served challenge, and a session that calls it."""
    judged: list[Offer] = []

    async def accept(offer: Offer) -> None:
        judged.append(offer)

    with peer.served():
        session = CvmSession(
            Callee(("127.0.0.1", peer.port), VM, SECRET, "s", Hotkey("5DD"), allow_v1=allow_v1),
            challenge_id=CHALLENGE,
            env=env or {},
            judge=accept,
            values=Values(),
            pace=PACE,
            resume=resume,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            try:
                yield Line(session, judged)
            finally:
                session.close()


# The handshake


async def test_the_first_frame_carries_both_versions_and_says_that_it_is_no_quote() -> None:
    """1024 bytes that begin so, the hash of the raw nonce at 568, nothing else; an empty event log."""
    peer = DeployedChallenge()
    async with line_to(peer) as line:
        await line.ready()
    [begin] = peer.begins
    nonce = bytes.fromhex(begin["nonce"])
    stand_in = b"NOT A QUOTE platform-validator".ljust(568, b"\0") + hashlib.sha256(nonce).digest()
    assert base64.b64decode(begin["val_quote"]) == stand_in.ljust(1024, b"\0")
    assert (begin["type"], len(nonce), len(base64.b64decode(begin["val_x25519_pub"]))) == (
        "attestation_begin",
        32,
        32,
    )
    assert (begin["val_event_log"], begin["val_rtmrs"]) == ("[]", [])
    assert begin["versions"] == [2, 1]
    assert {"validator", "session_id", "resume", "auth"} <= begin.keys()


async def test_the_last_frame_is_exactly_theirs_and_nothing_waits_for_an_acknowledgement() -> None:
    """Type, cipher, a salt of 32 bytes; `orm_ready` comes at once after it, once."""
    peer = DeployedChallenge()
    async with line_to(peer) as line:
        await line.ready()
        await line.run()
    [accepted] = peer.accepts
    salt = base64.b64decode(accepted.pop("hkdf_salt"))
    assert (accepted, len(salt)) == ({"type": "attestation_ok", "aead": "chacha20poly1305"}, 32)
    assert [message["type"] for message in peer.heard] == ["orm_ready", "job_execute"]
    assert peer.heard[0] == {"type": "orm_ready"}


@pytest.mark.parametrize(
    "event_log",
    [
        {"dev_mode": True, "environment_mode": "dev", "compose-hash": "dev"},
        '{"dev_mode": true, "environment_mode": "dev"}',
        '[{"imr":0,"event_type":1,"digest":"","event":"","event_payload":""}]',
        [],
        None,
    ],
    ids=["object", "object in text", "dstack's list in text", "list", "null"],
)
async def test_the_event_log_may_be_an_object_or_a_list(event_log: Any) -> None:
    """The judge gets text, whichever it was."""
    async with line_to(DeployedChallenge(event_log=event_log)) as line:
        await line.ready()
        [offer] = line.judged
        shown = event_log if isinstance(event_log, str) else json.dumps(event_log)
        assert (offer.version, offer.event_log, offer.vm) == (1, shown, None)


@pytest.mark.parametrize("rtmrs", [{}, {"rtmr0": "00" * 48}, None], ids=["empty", "some", "null"])
async def test_the_registers_beside_the_quote_may_be_empty(rtmrs: Any) -> None:
    """They are not read: what counts is in the quote."""
    async with line_to(DeployedChallenge(rtmrs=rtmrs)) as line:
        await line.ready()
        assert (await line.run()).result == {"score": 0.25}


@pytest.mark.parametrize("hash_at", [568, 584])
async def test_a_development_quote_is_handed_to_the_judge_wherever_it_has_the_hash(hash_at: int) -> None:
    """Its bytes as they came; what it must bind is the nonce's hash, padded with zeros."""
    peer = DeployedChallenge(hash_at=hash_at)
    async with line_to(peer) as line:
        await line.ready()
        [offer] = line.judged
    digest = hashlib.sha256(bytes.fromhex(peer.begins[0]["nonce"])).digest()
    assert offer.quote is not None
    assert offer.quote[hash_at : hash_at + 32] == digest
    assert offer.report_data == digest + bytes(32)


async def test_a_challenge_that_rejects_is_believed() -> None:
    """With its reason, and without another dial: it would say the same."""
    peer = DeployedChallenge(rejects="no validator of mine")
    async with line_to(peer) as line:
        with pytest.raises(SessionRefused, match="no validator of mine"):
            await line.ready()
    assert len(peer.begins) == 1


async def test_a_version_1_challenge_is_refused_where_it_is_not_allowed() -> None:
    """The reason names the setting; the first frame has nothing of version 1."""
    peer = DeployedChallenge()
    async with line_to(peer, allow_v1=False) as line:
        with pytest.raises(SessionRefused, match="allow_session_v1"):
            await line.ready()
    [begin] = peer.begins
    assert begin["versions"] == [2]
    assert not {key for key in begin if key.startswith("val_")} - {"val_x25519_pub"}
    assert peer.accepts == []


# Frames


def test_the_key_and_the_envelope_are_those_of_the_vector() -> None:
    """Derived by hand here, and by the product: the figures of a deployed implementation, both ways."""
    key = hkdf(b"\x01" * 32, b"\x02" * 32)
    assert key.hex() == "da171ea3572314c3cac2acbaa16b50876b9f12057c8c5256e740f8e667f655d4"
    assert derive_key(b"\x01" * 32, b"\x02" * 32) == key
    sealed = ChaCha20Poly1305(key).encrypt(b"\x03" * 12, b'{"type":"orm_ready"}', None)
    expected = {
        "enc": "chacha20poly1305",
        "nonce": "AwMDAwMDAwMDAwMD",
        "ciphertext": "lxB12PPI7+yY/SiyKBiy3kASWa1fd5TTsiY0GeHmP0PYZunO",
    }
    assert base64.b64encode(sealed).decode() == expected["ciphertext"]
    channel = EnvelopeChannel(key, lambda size: b"\x03" * size)
    assert json.loads(channel.seal(b'{"type":"orm_ready"}')) == expected
    assert channel.open(json.dumps(expected)) == b'{"type":"orm_ready"}'


async def test_frames_that_are_no_envelope_are_passed_over_at_both_ends() -> None:
    """Text, JSON of other kinds, another cipher, and binary frames."""
    stray: list[str | bytes] = [
        "not JSON",
        "[]",
        "{}",
        '{"enc":"aes","nonce":"","ciphertext":""}',
        b"\x00\x01",
    ]
    async with line_to(DeployedChallenge(says=stray)) as line:
        await line.ready()
        assert (await line.run()).result == {"score": 0.25}


async def test_messages_of_kinds_that_we_do_not_know_are_counted_and_ignored() -> None:
    peer = DeployedChallenge(asks=[{"type": "orm_permissions"}, {"type": 7}, {"none": 1}])
    async with line_to(peer) as line:
        await line.ready()
        old = line.session._old
        assert old is not None
        assert (await line.run()).error is None
        assert old.ignored == 3


async def test_an_envelope_that_does_not_open_ends_the_session() -> None:
    """It is not from whom we shook hands with."""
    forged = {"enc": "chacha20poly1305", "nonce": "AwMDAwMDAwMDAwMD", "ciphertext": "AAAA" * 8}
    async with line_to(DeployedChallenge(says=[json.dumps(forged)])) as line:
        assert "cannot resume" in str(await asyncio.wait_for(line.session.lost(), 20))


# Jobs


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
            while not any(one["type"] == "job_execute" for one in peer.heard):
                await asyncio.sleep(0.001)
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
        while len(peer.heard) < 2:
            await asyncio.sleep(0.001)
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


def test_the_page_names_a_test_for_each_quirk() -> None:
    """Every test of this file but this one, and no test that is nowhere."""
    page = (ROOT / "docs" / "attestation.md").read_text()
    section = page[page.index("## Version 1 of the session") :]
    section = section[: section.index("\n## ")]
    named = re.findall(r"`(test_\w+)`", section)
    here = re.findall(r"^(?:async )?def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    assert set(here) - set(named) == {"test_the_page_names_a_test_for_each_quirk"}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in tests] == []
