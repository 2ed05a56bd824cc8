"""What whoever holds a link can do, as docs/security.md says it; what he cannot is shown elsewhere too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conformance.test_vmm_client import spec
from tests.dstack_double import DstackDouble
from tests.network.real_api import KEYS, running_real_api
from tests.security.tap import Tap
from waiting import until
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from platform_protocol.ids import ClaimId, Hotkey, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.v2 import MAX_RESPONSE, Offer
from platform_protocol.user_config import UserConfig
from platform_validator.clock import SystemClock
from platform_validator.cvm.connection import Callee, SessionPace, dial
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.platform_client.conformance import a_result
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.signer import RequestSigner

SUBMISSION = b"print('the miner, and nobody else, knows this line')\n"
SECRET = b"launch secret of one virtual machine"[:32]


async def test_without_tls_the_wire_to_the_platform_api_shows_submissions_and_results(tmp_path: Path) -> None:
    """Nothing of them is sealed: only the signature keeps others from sending in one's name."""
    async with Tap().open() as tap:
        url = f"http://127.0.0.1:{tap.port}"
        async with running_real_api(tmp_path, audiences=lambda _port: [url]) as api:
            tap.upstream = ("127.0.0.1", int(api._url.rsplit(":", 1)[1]))
            challenge = await api.add_challenge()
            job = await api.add_job(challenge, SUBMISSION)
            signer = RequestSigner(
                keypair=KEYS[0],
                base_url=url,
                instance="0" * 8 + "-0000-4000-8000-" + "0" * 12,
                clock=SystemClock(),
            )
            client = HttpPlatformClient(base_url=url, signer=signer, clock=SystemClock())
            claim = await client.claim(job, ClaimId("11111111-1111-4111-8111-111111111111"))
            assert claim.submission is not None
            await client.fetch_submission(claim.submission, tmp_path / "submission")
            await client.submit_result(job, a_result(claim, score=0.8125))
            await client.close()
    assert SUBMISSION in tap.seen
    assert b'"score":0.8125' in tap.seen
    assert KEYS[0].address.encode() in tap.seen


async def test_whoever_listens_before_the_vmm_sees_what_vms_are_made_of() -> None:
    """App-compose, name and launch secret go over that link as they are."""
    config = UserConfig(
        vm=VmName("pv-0123456789-1"),
        launch_secret=UserConfig.encode_secret(SECRET),
        validator_base_url="http://10.0.2.2:18080",
        proxy_url=None,
        max_lifetime_s=60,
        hard_lifetime_s=60,
    )
    double = DstackDouble()
    async with Tap().open() as tap, double.listening(0) as url:
        tap.upstream = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        client = DstackVmm(f"http://127.0.0.1:{tap.port}")
        await client.create(spec(name=config.vm, user_config=config.model_dump_json()))
        await client.close()
    assert UserConfig.encode_secret(SECRET).encode() in tap.seen
    assert b"pv-0123456789-1" in tap.seen
    assert b"manifest_version" in tap.seen


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_a_sealed_frame_shows_how_long_its_message_is_and_nothing_of_it(one: bytes, other: bytes) -> None:
    """Sixteen bytes more than the message: lengths, and times, are there to be read."""
    channel = SealedChannel(send_key=b"k" * 32, receive_key=b"r" * 32)
    for message in (one, other):
        frame = channel.seal(message)
        assert len(frame) == len(message) + 16
        assert len(message) < 8 or message not in frame
    again = SealedChannel(send_key=b"k" * 32, receive_key=b"r" * 32)
    assert again.seal(one) != again.seal(one)


async def test_what_answers_in_a_cvm_s_place_is_read_for_2_mib_before_it_has_shown_anything() -> None:
    """Longer answers are refused by their announced length: 1009, and nothing of them is kept."""
    codes: list[int | None] = []

    async def answer(connection: ServerConnection) -> None:
        await connection.recv()
        long = {"type": "attestation_response", "version": 2, "event_log": "x" * MAX_RESPONSE}
        try:
            await connection.send(json.dumps(long))
            await connection.wait_closed()
        except ConnectionClosed:
            pass
        codes.append(connection.close_code)

    async def judge(_offer: Offer) -> None:
        raise AssertionError("there is nothing to judge")

    async with serve(answer, "127.0.0.1", 0, max_size=None) as server, asyncio.timeout(30):
        port = next(iter(server.sockets)).getsockname()[1]
        callee = Callee(("127.0.0.1", port), VmName("pv-1"), SECRET, "s", Hotkey("5DD"))
        with pytest.raises(ConnectionClosed) as closed:
            await dial(callee, resume=False, judge=judge, pace=SessionPace())
        assert closed.value.sent is not None
        assert closed.value.sent.code == 1009
        await until(lambda: codes)
