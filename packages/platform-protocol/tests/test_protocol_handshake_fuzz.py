"""Handshakes of both ends as a state machine: whatever an attacker delivers to whom, in whatever order.

He sees every frame, delivers any of them (also of earlier connections, and of another CVM of the same app) to
any end, changed as he likes, and makes frames of his own. In one machine he does not know the launch secret,
as on a wire; in another no quote is asked for besides, as below Tee; in a third he knows the secret, as the
host at Tee. He knows the other CVM's secret always, and has never the hardware that signs quotes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session.channel import SealedChannel, derive_keys
from platform_protocol.session.ends import ChallengeSession, ValidatorSession
from platform_protocol.session.errors import SessionError
from platform_protocol.session.messages import GuestState
from platform_protocol.session.v2 import ChallengeHandshake, ValidatorHandshake

HARDWARE = b"what signs quotes, and nobody has"
VALIDATOR = Hotkey("5abc")
SESSION = "00000000-0000-4000-8000-000000000001"
OURS, OTHERS = VmName("pv-0123456789-1"), VmName("pv-0123456789-2")
SECRETS = {OURS: b"L" * 32, OTHERS: b"M" * 32}
FIELDS = (
    "type",
    "version",
    "versions",
    "nonce",
    "val_x25519_pub",
    "validator",
    "session_id",
    "resume",
    "auth",
    "chal_x25519_pub",
    "vm",
    "quote",
    "event_log",
    "vm_config",
    "val_quote",
    "hkdf_salt",
)
ODD: tuple[Any, ...] = (None, "", 0, 1, 2, True, [], {}, "00", "AAAA", "\ud800", "é", "x" * 70_000)
OWN_TEXTS = (
    '{"type":"attestation_ok","version":2}',
    '{"type":"attestation_ok","version":1}',
    '{"type":"attestation_ok","aead":"chacha20poly1305","hkdf_salt":"' + "A" * 43 + '="}',
    '{"type":"attestation_reject","reason":"no"}',
    "",
    "[]",
    "{",
    "[" * 5000,
    '{"type":1}',
)


def quote_of(report_data: bytes) -> bytes:
    """What the hardware signs."""
    return hmac.digest(HARDWARE, report_data, "sha256")


def channel_of(
    frame_1: str, frame_2: str, own: X25519PrivateKey, peer: bytes, secret: bytes, *, guest: bool
) -> SealedChannel:
    """The channel of whoever has a private key, saw both frames and believes that this is the secret."""
    shared = own.exchange(X25519PublicKey.from_public_bytes(peer))
    to_guest, to_validator = derive_keys(
        frame_1=frame_1, frame_2=frame_2, shared=shared, launch_secret=secret
    )
    if guest:
        return SealedChannel(send_key=to_validator, receive_key=to_guest)
    return SealedChannel(send_key=to_guest, receive_key=to_validator)


@dataclass
class V:
    """The validator's end of one connection."""

    resume: bool
    handshake: ValidatorHandshake = field(init=False)
    session: ValidatorSession = field(default_factory=lambda: ValidatorSession(SESSION))
    state: str = "begun"
    frames: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handshake = ValidatorHandshake(
            launch_secret=SECRETS[OURS],
            vm=OURS,
            validator=VALIDATOR,
            session_id=SESSION,
            resume=self.resume,
        )
        self.frames.append(self.handshake.begin())


@dataclass
class S:
    """A CVM's end of one connection."""

    vm: VmName
    seen: set[bytes]
    handshake: ChallengeHandshake = field(init=False)
    session: ChallengeSession = field(default_factory=lambda: ChallengeSession(SESSION))
    channel: SealedChannel | None = None
    state: str = "waits"
    frames: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handshake = ChallengeHandshake(launch_secret=SECRETS[self.vm], vm=self.vm, seen_nonces=self.seen)


class Handshakes(RuleBasedStateMachine):
    """An attacker on the wire: he does not know the launch secret."""

    knows_secret = False
    asks_for_quotes = True

    def __init__(self) -> None:
        super().__init__()
        self.validators: list[V] = []
        self.guests: list[S] = []
        self.texts: list[str] = list(OWN_TEXTS)
        self.binaries: list[bytes] = [b"", b"\x00" * 64]
        self.seen: dict[VmName, set[bytes]] = {OURS: set(), OTHERS: set()}
        self.own_begins = 0
        self.nonces: dict[VmName, list[str]] = {OURS: [], OTHERS: []}

    # What honest ends do by themselves

    @rule(resume=st.booleans())
    def dial(self, resume: bool) -> None:
        self.validators.append(V(resume))
        self.texts.append(self.validators[-1].frames[0])

    @rule(vm=st.sampled_from([OURS, OURS, OTHERS]))
    def listen(self, vm: VmName) -> None:
        self.guests.append(S(vm, self.seen[vm]))

    @rule(resume=st.booleans())
    def an_honest_handshake_succeeds_after_all_that(self, resume: bool) -> None:
        v, s = V(resume), S(OURS, self.seen[OURS])
        self.validators.append(v)
        self.guests.append(s)
        self.texts.append(v.frames[0])
        self._to_guest(s, v.frames[0])
        self._to_validator(v, s.frames[1])
        self._to_guest(s, v.frames[2])
        self._to_validator(v, self.binaries[-1])
        self._to_guest(s, self.binaries[-1])
        assert (v.state, s.state) == ("up", "up")

    # What the attacker does

    @precondition(lambda self: self.guests)
    @rule(data=st.data())
    def deliver_to_a_guest(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.guests))
        self._to_guest(guest, self._drawn(data, binary=guest.state == "greets"))

    @precondition(lambda self: self.validators)
    @rule(data=st.data())
    def deliver_to_a_validator(self, data: st.DataObject) -> None:
        validator = data.draw(st.sampled_from(self.validators))
        self._to_validator(validator, self._drawn(data, binary=validator.state == "accepted"))

    @precondition(lambda self: self.validators)
    @rule(data=st.data())
    def dial_as_the_validator(self, data: st.DataObject) -> None:
        """With a key and a nonce of his own, and a proof made with what he knows."""
        begin = json.loads(data.draw(st.sampled_from(self.validators)).frames[0])
        begin["nonce"] = data.draw(st.binary(min_size=32, max_size=32)).hex()
        secret = SECRETS[OURS] if self.knows_secret else SECRETS[OTHERS]
        self.texts.append(self._begin_with(json.dumps(begin), X25519PrivateKey.generate(), secret))

    @precondition(lambda self: any(len(guest.frames) > 1 for guest in self.guests))
    @rule(data=st.data(), downgraded=st.booleans())
    def answer_as_the_guest(self, data: st.DataObject, downgraded: bool) -> None:
        """With a key of his own and a quote that the hardware made for somebody; also as version 1 does."""
        answered = [guest for guest in self.guests if len(guest.frames) > 1]
        seen = data.draw(st.sampled_from(answered)).frames[1]
        answer = json.loads(self._answer_with(seen, X25519PrivateKey.generate()))
        if downgraded:
            del answer["version"]
        self.texts.append(json.dumps(answer))

    @rule(data=st.data(), resume=st.booleans())
    def stand_in_the_middle(self, data: st.DataObject, resume: bool) -> None:
        """Relay one handshake, with a change to one frame, or with keys of his own towards either end."""
        vm = data.draw(st.sampled_from([OURS, OURS, OTHERS]))
        v, s = V(resume), S(vm, self.seen[vm])
        self.validators.append(v)
        self.guests.append(s)
        changed = data.draw(st.integers(0, 6))
        own_v, own_s = (
            X25519PrivateKey.generate() if data.draw(st.booleans()) and changed > 4 else None
            for _ in range(2)
        )
        guess = data.draw(st.sampled_from([b"", SECRETS[OTHERS]]))
        guess = SECRETS[OURS] if self.knows_secret else guess
        begin = v.frames[0] if changed != 0 else self._changed(data, v.frames[0])
        begin = begin if own_v is None else self._begin_with(begin, own_v, guess)
        self._to_guest(s, begin)
        if s.state != "answered":
            return
        answer = s.frames[1] if changed != 1 else self._changed(data, s.frames[1])
        answer = answer if own_s is None else self._answer_with(answer, own_s)
        self._to_validator(v, answer)
        accepted = v.frames[2] if len(v.frames) == 3 else OWN_TEXTS[0]
        self._to_guest(s, accepted if changed != 2 else self._changed(data, accepted))
        if s.state == "greets" and v.state == "accepted":
            hello = self.binaries[-1]
            if own_s is not None:
                v_public = base64.b64decode(json.loads(v.frames[0])["val_x25519_pub"])
                channel = channel_of(v.frames[0], answer, own_s, v_public, guess, guest=True)
                hello = ChallengeSession(SESSION).greet(channel, known=False, state=GuestState())
            self._to_validator(v, hello if changed != 3 else hello[:-1])
        if s.state == "greets":
            hello = self.binaries[-1]
            if own_v is not None:
                s_public = base64.b64decode(json.loads(s.frames[1])["chal_x25519_pub"])
                channel = channel_of(begin, s.frames[1], own_v, s_public, guess, guest=False)
                hello = channel.seal(b'{"type":"hello","received":0}')
            self._to_guest(s, hello if changed != 4 else hello[:-1])

    def _begin_with(self, begin: str, own: X25519PrivateKey, secret: bytes) -> str:
        frame, public = json.loads(begin), own.public_key().public_bytes_raw()
        signed = b"platform-session-v2 begin" + bytes.fromhex(frame["nonce"]) + public
        signed += hashlib.sha256(VALIDATOR.encode()).digest() + SESSION.encode()
        frame["auth"] = hmac.new(secret, signed, hashlib.sha256).hexdigest()
        self.own_begins += 1
        return json.dumps(frame | {"val_x25519_pub": base64.b64encode(public).decode()})

    def _answer_with(self, answer: str, own: X25519PrivateKey) -> str:
        public = base64.b64encode(own.public_key().public_bytes_raw()).decode()
        return json.dumps(json.loads(answer) | {"chal_x25519_pub": public, "vm": OURS})

    def _changed(self, data: st.DataObject, text: str) -> str:
        if data.draw(st.integers(0, 4)) == 0:
            frame = json.loads(text)
            frame.pop("version", None)
            return json.dumps(frame)
        return self._edited(data, text) if data.draw(st.booleans()) else text + " "

    def _drawn(self, data: st.DataObject, *, binary: bool) -> str | bytes:
        """A frame of the kind that is waited for, mostly; as it was, or changed."""
        if data.draw(st.integers(0, 9)) == 0:
            binary = not binary
        if binary:
            frame = bytearray(data.draw(st.sampled_from(self.binaries[-6:])))
            if frame and data.draw(st.booleans()):
                frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1
            return bytes(frame)
        text = data.draw(st.sampled_from([*self.texts[-8:], *self.texts]))
        change = data.draw(
            st.sampled_from(["none", "none", "none", "field", "field", "cut", "flip", "space"])
        )
        if change == "cut":
            return text[: data.draw(st.integers(0, len(text)))]
        if change == "space":
            return text + " "
        if change == "flip" and text:
            at = data.draw(st.integers(0, len(text) - 1))
            return text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        return self._edited(data, text) if change == "field" else text

    def _edited(self, data: st.DataObject, text: str) -> str:
        """One field taken out, made odd, or taken from another frame."""
        try:
            frame = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if not isinstance(frame, dict):
            return text
        name = data.draw(st.sampled_from(FIELDS))
        others = [json.loads(one) for one in self.texts if one.startswith('{"type":"attestation')]
        values = [one[name] for one in others if name in one]
        how = data.draw(st.sampled_from(["out", "odd", "another's"]))
        if how == "out":
            frame.pop(name, None)
        elif how == "odd" or not values:
            frame[name] = data.draw(st.sampled_from(ODD))
        else:
            frame[name] = data.draw(st.sampled_from(values))
        return json.dumps(frame)

    # The ends, as serve.py and connection.py drive them

    def _to_guest(self, guest: S, frame: str | bytes) -> None:
        try:
            if guest.state == "waits" and isinstance(frame, str):
                begin = guest.handshake.receive_begin(frame)
                guest.frames = [frame, guest.handshake.respond(quote_of(begin.report_data), "[]", "{}")]
                self.texts.append(guest.frames[1])
                guest.state = "answered"
                self.nonces[guest.vm].append(json.loads(frame)["nonce"].lower())
            elif guest.state == "answered" and isinstance(frame, str):
                guest.channel = guest.handshake.receive_verdict(frame)
                self.binaries.append(guest.session.greet(guest.channel, known=False, state=GuestState()))
                guest.state = "greets"
            elif guest.state == "greets" and isinstance(frame, bytes) and guest.channel is not None:
                guest.session.connected(guest.channel, frame)
                guest.state = "up"
                if guest.vm == OURS and not self.knows_secret:
                    assert self._peers(guest.frames), "a session with somebody who is not our validator"
            else:
                guest.state = "closed"
        except SessionError:
            guest.state = "closed"

    def _to_validator(self, validator: V, frame: str | bytes) -> None:
        try:
            if validator.state == "begun" and isinstance(frame, str):
                offer = validator.handshake.receive(frame)
                if self.asks_for_quotes and offer.quote != quote_of(offer.report_data):
                    self.texts.append(validator.handshake.reject("report_data"))
                    validator.state = "closed"
                    return
                accepted, channel = validator.handshake.accept()
                assert isinstance(channel, SealedChannel), "a downgrade"
                validator.frames += [frame, accepted]
                self.texts.append(accepted)
                validator.session.connected(channel)
                validator.state = "accepted"
            elif validator.state == "accepted" and isinstance(frame, bytes):
                validator.session.receive(frame)
                self.binaries.append(validator.session.hello())
                validator.state = "up"
                [_, answer, _] = validator.frames
                same = [guest for guest in self.guests if guest.frames == [validator.frames[0], answer]]
                assert [guest.vm for guest in same] == [OURS], "a session with what is not our guest"
            else:
                validator.state = "closed"
        except SessionError:
            validator.state = "closed"

    def _peers(self, frames: list[str]) -> list[V]:
        """Validators that saw exactly these frames."""
        return [one for one in self.validators if one.frames[:2] == frames]

    @invariant()
    def what_is_remembered_grows_with_authentic_dials_alone(self) -> None:
        own = self.own_begins if self.knows_secret else 0
        assert len(self.seen[OURS]) <= len(self.validators) + own
        assert len(self.seen[OTHERS]) <= self.own_begins
        for nonces in self.nonces.values():
            assert len(set(nonces)) == len(nonces), "a nonce was taken twice"


class HandshakesBelowTee(Handshakes):
    """The attacker on the wire, where no quote is asked for: the launch secret alone authenticates."""

    asks_for_quotes = False


class HandshakesAtTheHost(Handshakes):
    """An attacker who made the VM, and so knows its launch secret: the quote is what counts."""

    knows_secret = True


FUZZ = settings(
    deadline=None, max_examples=50, stateful_step_count=40, phases=[Phase.explicit, Phase.generate]
)
"""A failure prints its steps as they were: to shrink them takes minutes."""


@pytest.mark.slow(reason="fifty runs of forty steps, with real keys")
def test_no_order_of_handshake_frames_makes_a_session_but_the_exact_transcript() -> None:
    """At either end, for whoever does not know the launch secret; an honest one succeeds all the same."""
    run_state_machine_as_test(Handshakes, settings=FUZZ)


@pytest.mark.slow(reason="fifty runs of forty steps, with real keys")
def test_without_quotes_the_launch_secret_alone_keeps_everyone_out() -> None:
    """As below Tee: it is in the proof of the first frame, and in the keys."""
    run_state_machine_as_test(HandshakesBelowTee, settings=FUZZ)


@pytest.mark.slow(reason="fifty runs of forty steps, with real keys")
def test_who_knows_the_launch_secret_still_makes_no_session_with_the_validator() -> None:
    """For the quote binds both keys, and he cannot have one that binds his."""
    run_state_machine_as_test(HandshakesAtTheHost, settings=FUZZ)
