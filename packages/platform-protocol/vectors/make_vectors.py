"""Makes the published vectors: `python packages/platform-protocol/vectors/make_vectors.py [DIR]`.

Everything random is replaced by counted bytes, so that the files are always the same. An sr25519 signature is
randomised: the request vector keeps the one that it has, as long as it verifies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platform_protocol.ids import Hotkey, JobId, VmName
from platform_protocol.session import v1
from platform_protocol.session.ends import ChallengeSession, ValidatorSession
from platform_protocol.session.messages import GuestState, JobResult, Ping
from platform_protocol.session.v2 import ChallengeHandshake, ValidatorHandshake
from platform_protocol.signing import Keypair, sign_request, signing_payload, verify

SECRET = bytes(range(32))
SEED = bytes([7]) * 32
VM = VmName("pv-0123456789-00000000-0000-4000-8000-000000000001")
SESSION = "00000000-0000-4000-8000-000000000002"


def counted(first: int) -> Callable[[int], bytes]:
    """Random bytes that are not: each call gives the next number, repeated."""
    numbers = itertools.count(first)
    return lambda size: bytes([next(numbers)]) * size


def session_v2() -> dict[str, Any]:
    """A whole version 2 handshake and the first sealed frames of each side."""
    validator = Keypair.from_seed(SEED).address
    ours = ValidatorHandshake(
        launch_secret=SECRET, vm=VM, validator=validator, session_id=SESSION, resume=False, random=counted(16)
    )
    theirs = ChallengeHandshake(launch_secret=SECRET, vm=VM, seen_nonces=set(), random=counted(64))
    frame_1 = ours.begin()
    begin = theirs.receive_begin(frame_1)
    frame_2 = theirs.respond(b"quote", "[]", "{}")
    offer = ours.receive(frame_2)
    frame_3, validator_channel = ours.accept()
    guest_channel = theirs.receive_verdict(frame_3)
    guest, peer = ChallengeSession(SESSION), ValidatorSession(SESSION)
    guest_hello = guest.greet(guest_channel, known=False, state=GuestState())
    peer.connected(validator_channel)  # type: ignore[arg-type]  # version 2, so the sealed channel
    peer.receive(guest_hello)
    validator_hello = peer.hello()
    guest.connected(guest_channel, validator_hello)
    result = guest.send(
        JobResult(job_id=JobId("00000000-0000-4000-8000-000000000003"), result={"score": 0.5})
    )
    ping = peer.send(Ping(n=1))
    both = b"".join(len(frame.encode()).to_bytes(4, "big") + frame.encode() for frame in (frame_1, frame_2))
    return {
        "launch_secret": SECRET.hex(),
        "validator_private_key": (bytes([17]) * 32).hex(),
        "challenge_private_key": (bytes([64]) * 32).hex(),
        "nonce": (bytes([16]) * 32).hex(),
        "frame_1": frame_1,
        "frame_2": frame_2,
        "frame_3": frame_3,
        "transcript_sha256": hashlib.sha256(both).hexdigest(),
        "report_data": offer.report_data.hex(),
        "report_data_of_the_challenge": begin.report_data.hex(),
        "sealed_challenge_to_validator": [guest_hello.hex(), (result or b"").hex()],
        "sealed_validator_to_challenge": [validator_hello.hex(), ping.hex()],
    }


def session_v1() -> dict[str, Any]:
    """Key and first envelope of version 1."""
    shared, salt, nonce = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 12
    key = v1.derive_key(shared, salt)
    envelope = v1.EnvelopeChannel(key, lambda _: nonce).seal(b'{"type":"orm_ready"}')
    return {
        "shared": shared.hex(),
        "salt": salt.hex(),
        "key": key.hex(),
        "nonce": nonce.hex(),
        "plaintext": '{"type":"orm_ready"}',
        "envelope": envelope,
    }


def request_signing(earlier: dict[str, Any] | None) -> dict[str, Any]:
    """A signed request; its signature is kept while it verifies."""
    keypair = Keypair.from_seed(SEED)
    given: dict[str, Any] = {
        "method": "POST",
        "path": "/jobs/00000000-0000-4000-8000-000000000003/claim?x=1",
        "body": b'{"claim_id":"00000000-0000-4000-8000-000000000004"}',
        "audience": "https://platform.example",
        "instance": "00000000-0000-4000-8000-000000000005",
        "timestamp_ms": 1_767_225_600_000,
        "nonce": "0123456789abcdef0123456789abcdef",
    }
    payload = signing_payload(**given)
    headers = sign_request(keypair, **given)
    kept = (earlier or {}).get("headers", {}).get("X-Signature", "")
    if kept and verify(Hotkey(keypair.address), payload, bytes.fromhex(kept)):
        headers["X-Signature"] = kept
    return {
        "seed": SEED.hex(),
        "address": keypair.address,
        **{key: value.decode() if isinstance(value, bytes) else value for key, value in given.items()},
        "payload": payload.decode(),
        "headers": headers,
    }


def main() -> None:
    """Write the three files."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    signing = folder / "request-signing.json"
    earlier = json.loads(signing.read_text()) if signing.exists() else None
    for name, vector in (
        ("request-signing", request_signing(earlier)),
        ("session-v2", session_v2()),
        ("session-v1", session_v1()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(vector, indent=1) + "\n")


if __name__ == "__main__":
    main()
