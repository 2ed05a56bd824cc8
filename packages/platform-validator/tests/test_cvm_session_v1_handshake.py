"""Handshake and frames with challenges as they are deployed, which speak version 1: each quirk."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from deployed_challenge import DeployedChallenge, hkdf
from old_line import line_to

from platform_protocol.session.v1 import EnvelopeChannel, derive_key
from platform_validator.cvm.errors import SessionRefused


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
