"""The session: authentic, fresh, exactly once over any number of breaks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from platform_protocol.ids import Hotkey, JobId, VmName
from platform_protocol.session.channel import MAX_FRAME, MAX_FRAMES, SealedChannel
from platform_protocol.session.ends import ChallengeSession, ValidatorSession
from platform_protocol.session.errors import (
    AttestationRejected,
    AuthRefused,
    FrameInvalid,
    HandshakeInvalid,
    MessageInvalid,
)
from platform_protocol.session.frame_limit import take_messages_of
from platform_protocol.session.messages import (
    GuestState,
    JobResult,
    Log,
    Ping,
    SubmissionChunk,
    encode_message,
    read_guest_message,
    read_validator_message,
)
from platform_protocol.session.v1 import EnvelopeChannel
from platform_protocol.session.v2 import ChallengeHandshake, ValidatorHandshake

SECRET = b"L" * 32
VM = VmName("pv-1")


def _validator(secret: bytes = SECRET, vm: VmName = VM, *, allow_v1: bool = False) -> ValidatorHandshake:
    return ValidatorHandshake(
        launch_secret=secret, vm=vm, validator=Hotkey("5abc"), session_id="s", resume=False, allow_v1=allow_v1
    )


def _challenge(seen: set[bytes] | None = None) -> ChallengeHandshake:
    return ChallengeHandshake(launch_secret=SECRET, vm=VM, seen_nonces=set() if seen is None else seen)


def _channels() -> tuple[SealedChannel, SealedChannel]:
    """(validator's, challenge's)."""
    ours, theirs = _validator(), _challenge()
    theirs.receive_begin(ours.begin())
    ours.receive(theirs.respond(None, "", ""))
    verdict, channel = ours.accept()
    assert isinstance(channel, SealedChannel)
    return channel, theirs.receive_verdict(verdict)


def test_a_dialler_without_the_launch_secret_is_refused() -> None:
    with pytest.raises(AuthRefused, match="launch secret"):
        _challenge().receive_begin(_validator(b"x" * 32).begin())


def test_a_nonce_is_taken_once() -> None:
    seen: set[bytes] = set()
    frame = _validator().begin()
    _challenge(seen).receive_begin(frame)
    with pytest.raises(AuthRefused, match="nonce"):
        _challenge(seen).receive_begin(frame)


def test_a_nonce_without_the_secret_is_not_remembered() -> None:
    seen: set[bytes] = set()
    with pytest.raises(AuthRefused):
        _challenge(seen).receive_begin(_validator(b"x" * 32).begin())
    assert seen == set()


@pytest.mark.parametrize("field", ["nonce", "val_x25519_pub", "validator", "session_id", "auth"])
def test_every_field_of_the_begin_is_authenticated(field: str) -> None:
    frame = json.loads(_validator().begin())
    other = json.loads(_validator().begin())
    frame[field] = "6abc" if field == "validator" else "t" if field == "session_id" else other[field]
    with pytest.raises(AuthRefused):
        _challenge().receive_begin(json.dumps(frame))


def test_the_answer_of_another_vm_is_refused() -> None:
    ours, theirs = _validator(vm=VmName("pv-2")), _challenge()
    frame = ours.begin()
    theirs.receive_begin(frame)
    with pytest.raises(HandshakeInvalid, match="pv-2"):
        ours.receive(theirs.respond(None, "", ""))


def test_version_1_is_refused_unless_policy_allows_it() -> None:
    ours, theirs = _validator(), _challenge()
    theirs.receive_begin(ours.begin())
    answer = json.loads(theirs.respond(b"q", "[]", ""))
    del answer["version"]
    with pytest.raises(HandshakeInvalid, match="allow_session_v1"):
        ours.receive(json.dumps(answer))


def test_version_1_by_policy_gives_an_envelope_channel() -> None:
    ours, theirs = _validator(allow_v1=True), _challenge()
    begin = json.loads(ours.begin())
    assert begin["versions"] == [2, 1]
    assert begin["val_quote"].startswith("Tk9UIEEgUVVPVEUg")
    theirs.receive_begin(json.dumps(begin))
    answer = json.loads(theirs.respond(b"q", "[]", ""))
    del answer["version"]
    assert ours.receive(json.dumps(answer)).version == 1
    _, channel = ours.accept()
    assert isinstance(channel, EnvelopeChannel)
    assert channel.open("just text") is None


def test_a_rejection_is_told() -> None:
    ours, theirs = _validator(), _challenge()
    theirs.receive_begin(ours.begin())
    theirs.respond(None, "", "")
    with pytest.raises(AttestationRejected, match="old TCB"):
        theirs.receive_verdict(ours.reject("old TCB"))


@pytest.mark.parametrize("frame", ["", "[]", "{", "nul", '{"type":"attestation_begin"}', "[" * 10_000])
def test_malformed_handshakes_are_refused(frame: str) -> None:
    with pytest.raises(HandshakeInvalid):
        _challenge().receive_begin(frame)
    with pytest.raises(HandshakeInvalid):
        _validator().receive(frame)


@given(st.binary(max_size=200), st.integers(min_value=0), st.integers(min_value=1, max_value=255))
@settings(deadline=None, max_examples=50)
def test_a_changed_frame_does_not_open(plaintext: bytes, where: int, flip: int) -> None:
    ours, theirs = _channels()
    frame = bytearray(ours.seal(plaintext))
    frame[where % len(frame)] ^= flip
    with pytest.raises(FrameInvalid):
        theirs.open(bytes(frame))


@pytest.mark.parametrize("size", [0, 15, MAX_FRAME + 1])
def test_a_frame_of_no_possible_size_is_refused_before_it_is_decrypted(size: int) -> None:
    ours, theirs = _channels()
    with pytest.raises(FrameInvalid, match="expected a frame of 16 to"):
        theirs.open(bytes(size))
    assert theirs.open(ours.seal(b"next")) == b"next"


def test_a_key_serves_no_more_frames_than_its_limit() -> None:
    """In either direction: the last one passes, and nothing after it."""
    ours, theirs = _channels()
    ours._sent = theirs._received = MAX_FRAMES - 1
    assert theirs.open(ours.seal(b"the last")) == b"the last"
    assert (ours.frames, theirs.frames) == (MAX_FRAMES, MAX_FRAMES)
    with pytest.raises(FrameInvalid, match="connect anew"):
        ours.seal(b"one more")
    with pytest.raises(FrameInvalid, match="connect anew"):
        theirs.open(bytes(16))


def test_repeated_reordered_reflected_and_foreign_frames_do_not_open() -> None:
    ours, theirs = _channels()
    first, second = ours.seal(b"1"), ours.seal(b"2")
    with pytest.raises(FrameInvalid):
        theirs.open(second)
    assert theirs.open(first) == b"1"
    with pytest.raises(FrameInvalid):
        theirs.open(first)
    with pytest.raises(FrameInvalid):
        ours.open(second)
    with pytest.raises(FrameInvalid):
        _channels()[1].open(first)


def _connect(peer: ValidatorSession, guest: ChallengeSession) -> list[bytes]:
    """A fresh connection; returns what the guest sends again."""
    ours, theirs = _channels()
    hello = guest.greet(theirs, known=True, state=GuestState())
    peer.connected(ours)
    peer.receive(hello)
    guest.connected(theirs, peer.hello())
    return guest.unacknowledged()


@given(st.lists(st.sampled_from(["send", "lost", "break", "done", "log"]), max_size=60))
@settings(deadline=None, max_examples=60)
def test_every_numbered_message_arrives_exactly_once_in_order(steps: list[str]) -> None:
    """Whatever is sent, lost or broken in between: after a last resume all have arrived, once, in order."""
    peer, guest = ValidatorSession("s"), ChallengeSession("s")
    arrived: list[str] = []
    sent = 0

    def take(frames: list[bytes]) -> None:
        for frame in frames:
            message = peer.receive(frame)
            if isinstance(message, JobResult):
                arrived.append(message.job_id)

    take(_connect(peer, guest))
    for step in steps:
        if step in ("send", "lost"):
            frame = guest.send(JobResult(job_id=JobId(str(sent)), result={}))
            sent += 1
            if step == "lost":
                peer.disconnected()
                guest.disconnected()
                take(_connect(peer, guest))
            elif frame is not None:
                take([frame])
        elif step == "log":
            frame = guest.send(Log(message="x"))
            take([frame] if frame else [])
        elif step == "done" and arrived:
            frame = peer.done(len(arrived))
            if frame is not None:
                guest.receive(frame)
        elif step == "break":
            peer.disconnected()
            guest.disconnected()
            take(_connect(peer, guest))
    assert arrived == [str(number) for number in range(sent)]


def test_an_acknowledgement_waits_for_everything_before_it() -> None:
    peer, guest = ValidatorSession("s"), ChallengeSession("s")
    _connect(peer, guest)
    for number in range(2):
        frame = guest.send(JobResult(job_id=JobId(str(number)), result={}))
        assert frame is not None
        peer.receive(frame)
    assert peer.done(2) is None
    both = peer.done(1)
    assert both is not None
    guest.receive(both)
    assert guest.pending == 0


def test_a_validator_that_was_restarted_gets_what_it_never_acknowledged() -> None:
    guest = ChallengeSession("s")
    first = ValidatorSession("s")
    _connect(first, guest)
    frame = guest.send(JobResult(job_id=JobId("j"), result={"score": 1}))
    assert frame is not None
    first.receive(frame)
    second = ValidatorSession("s")
    [again] = _connect(second, guest)
    message = second.receive(again)
    assert isinstance(message, JobResult)
    assert message.job_id == "j"


def test_an_invalid_hello_leaves_the_live_connection_alone() -> None:
    peer, guest = ValidatorSession("s"), ChallengeSession("s")
    _connect(peer, guest)
    ours, theirs = _channels()
    guest.greet(theirs, known=True, state=GuestState())
    with pytest.raises(MessageInvalid):
        guest.connected(theirs, ours.seal(encode_message(Ping(n=1))))
    frame = guest.send(Log(message="still here"))
    assert frame is not None
    assert peer.receive(frame) == Log(message="still here")


def test_nothing_is_sent_before_the_peers_hello() -> None:
    peer = ValidatorSession("s")
    peer.connected(_channels()[0])
    with pytest.raises(MessageInvalid, match="hello"):
        peer.send(Ping(n=1))


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    ours, theirs = _channels()
    guest = ChallengeSession("s")
    guest.greet(theirs, known=True, state=GuestState())
    with pytest.raises(MessageInvalid, match="acknowledged"):
        guest.connected(theirs, ours.seal(b'{"type":"hello","received":5}'))


def test_failure_is_the_presence_of_error_even_an_empty_one() -> None:
    message = read_guest_message(b'{"type":"job_result","seq":1,"job_id":"j","error":{}}')
    assert isinstance(message, JobResult)
    assert message.error is not None


def test_bytes_travel_as_standard_base64() -> None:
    data = bytes(range(256))
    encoded = encode_message(SubmissionChunk(job_id=JobId("j"), offset=0, last=True, data=data))
    assert b"+/" in encoded or b"/" in encoded
    back = read_validator_message(encoded)
    assert isinstance(back, SubmissionChunk)
    assert back.data == data


@pytest.mark.parametrize(
    "frame", [b"", b"[]", b"{}", b'{"type":"x"}', b'{"type":"ping"}', b"\xff", b"[" * 5000]
)
def test_malformed_messages_are_refused(frame: bytes) -> None:
    with pytest.raises(MessageInvalid):
        read_validator_message(frame)


@pytest.mark.parametrize("name", ["max_message_size", "max_size"])
def test_the_limit_of_messages_is_raised_under_the_name_of_each_version_of_the_library(name: str) -> None:
    """Without either it is an error, for a limit that stays small would cut off every large frame."""
    protocol = SimpleNamespace(**{name: 1})
    take_messages_of(SimpleNamespace(protocol=protocol), 2)
    assert vars(protocol) == {name: 2}
    with pytest.raises(AttributeError):
        take_messages_of(SimpleNamespace(protocol=SimpleNamespace()), 2)
