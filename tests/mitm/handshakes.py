"""Attacks on the handshake: swapped keys, changed fields, replays, downgrades, other diallers and CVMs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from tests.mitm.attack import Attack, Receive, Send
from tests.mitm.frames import CutOff
from tests.mitm.passing import Frame, Move, Moves, Passing

from platform_protocol.session.errors import FrameInvalid
from platform_protocol.session.v1 import AEAD, EnvelopeChannel, derive_key

FORGED = 0.999
"""The score that only he gives."""
_VAL, _CHAL = "val_x25519_pub", "chal_x25519_pub"


def edited(frame: Frame, **fields: Any) -> str:
    """A handshake's frame with other fields; None takes one out."""
    value = json.loads(frame) | fields
    return json.dumps({key: held for key, held in value.items() if held is not None or key not in fields})


class SwapKeys(Attack):
    """Puts his own key in place of the validator's (`up`), the guest's (`down`), or both.

    Where he then knows a version 1 key he reads; where he knows both he writes results.
    """

    def __init__(self, up: bool, down: bool, **how: Any) -> None:
        super().__init__(**how)
        self.up, self.down = up, down
        self.key = X25519PrivateKey.generate()
        self.ours = base64.b64encode(self.key.public_key().public_bytes_raw()).decode()
        self.theirs: dict[str, X25519PublicKey] = {}
        self.to_guest: EnvelopeChannel | None = None
        self.to_validator: EnvelopeChannel | None = None

    def pass_on(self, passing: Passing) -> Moves:
        up, frame = passing.up, passing.frame
        if passing.number == 0:
            return [self._swapped(passing, _VAL if up else _CHAL, swap=self.up if up else self.down)]
        if up and passing.number == 1:
            self._derive(json.loads(frame))
        elif isinstance(frame, str):
            frame = self._read(frame, up=up)
        return [Move(up, frame)]

    def _swapped(self, passing: Passing, name: str, *, swap: bool) -> Move:
        raw = base64.b64decode(json.loads(passing.frame)[name])
        self.theirs[name] = X25519PublicKey.from_public_bytes(raw)
        if not swap:
            return Move(passing.up, passing.frame)
        return Move(passing.up, edited(passing.frame, **{name: self.ours}), tampered=True)

    def _derive(self, accepted: dict[str, Any]) -> None:
        if accepted.get("aead") != AEAD:
            return
        salt = base64.b64decode(accepted["hkdf_salt"])
        if self.up:
            self.to_guest = self._channel(_CHAL, salt)
        if self.down:
            self.to_validator = self._channel(_VAL, salt)

    def _channel(self, peer: str, salt: bytes) -> EnvelopeChannel:
        return EnvelopeChannel(derive_key(self.key.exchange(self.theirs[peer]), salt), os.urandom)

    def _read(self, frame: str, *, up: bool) -> str:
        source, sink = (self.to_validator, self.to_guest) if up else (self.to_guest, self.to_validator)
        try:
            plaintext = source.open(frame) if source is not None else None
        except FrameInvalid:
            plaintext = None
        if plaintext is None:
            return frame
        self.learned.append(plaintext)
        message = json.loads(plaintext)
        if message.get("type") == "job_result":
            message["result"] = {"score": FORGED}
        return frame if sink is None else sink.seal(json.dumps(message).encode())


class Edit(Attack):
    """Changes one field of the first frame of a direction."""

    def __init__(self, up: bool, field: str, **how: Any) -> None:
        super().__init__(**how)
        self.up, self.field = up, field

    def pass_on(self, passing: Passing) -> Moves:
        if (passing.connection, passing.up, passing.number) != (0, self.up, 0):
            return super().pass_on(passing)
        held = json.loads(passing.frame).get(self.field)
        changed = edited(passing.frame, **{self.field: other_than(self.field, held)})
        return [Move(self.up, changed, tampered=json.loads(changed) != json.loads(passing.frame))]


def other_than(field: str, held: Any) -> Any:
    """Another value of the same form."""
    match field:
        case "quote":
            raw = bytearray(base64.b64decode(held or ""))
            if raw:
                raw[len(raw) // 2] ^= 1
            return base64.b64encode(bytes(raw)).decode()
        case "resume":
            return not held
        case "versions":
            return [1]
        case "version":
            return None
        case "event_log" | "vm_config":
            return f"{held} " if isinstance(held, str) else held
        case _:
            return ("1" if not str(held).startswith("1") else "2") + str(held)[1:]


class ReplayHandshakeToGuest(Attack):
    """What the validator sent, once more, over a connection of his own."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.kept: list[Frame] = []

    def pass_on(self, passing: Passing) -> Moves:
        if passing.up:
            self.kept.append(passing.frame)
        return super().pass_on(passing)

    def dials(self) -> bool:
        return True

    async def dial(self, send: Send, receive: Receive) -> None:
        first, *others = list(self.kept)
        await send(first)
        await receive()
        for frame in others:
            await send(frame)


class ReplayHandshakeToValidator(CutOff):
    """What the guest sent, once more, to the validator that dials again."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.kept: list[Frame] = []

    def pass_on(self, passing: Passing) -> Moves:
        if not passing.up:
            self.kept.append(passing.frame)
        return super().pass_on(passing)

    def answers(self, connection: int) -> bool:
        return connection == 1

    async def answer(self, send: Send, receive: Receive) -> None:
        await receive()
        await send(self.kept[0])
        await receive()
        for frame in self.kept[1:]:
            await send(frame)


class PlayOldGuest(Attack):
    """Answers the validator as a version 1 challenge would: the downgrade."""

    def answers(self, connection: int) -> bool:
        del connection
        return True

    async def answer(self, send: Send, receive: Receive) -> None:
        key = X25519PrivateKey.generate()
        begin = json.loads(await receive())
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        said = {"type": "attestation_response", "quote": "", "event_log": {}, "rtmrs": {}}
        await send(json.dumps(said | {_CHAL: public}))
        accepted = json.loads(await receive())
        if accepted["type"] != "attestation_ok":
            return
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(begin[_VAL]))
        salt = base64.b64decode(accepted["hkdf_salt"])
        channel = EnvelopeChannel(derive_key(key.exchange(peer), salt), os.urandom)
        while True:
            plaintext = channel.open(str(await receive())) or b"{}"
            self.learned.append(plaintext)
            message = json.loads(plaintext)
            if message.get("type") == "job_execute":
                forged = {"type": "job_result", "job_id": message["job_id"], "result": {"score": FORGED}}
                await send(channel.seal(json.dumps(forged).encode()))


class SecondDialler(Attack):
    """Dials the guest himself, with `known_secret` or a random one, and orders a job."""

    def __init__(self, *, knows: bool, **how: Any) -> None:
        super().__init__(**how)
        self.secret = self.known_secret if knows else os.urandom(32)

    def dials(self) -> bool:
        return True

    async def dial(self, send: Send, receive: Receive) -> None:
        key, nonce = X25519PrivateKey.generate(), os.urandom(32)
        public = key.public_key().public_bytes_raw()
        session = "00000000-0000-4000-8000-00000000dead"
        begin = {
            "type": "attestation_begin",
            "versions": [2, 1],
            "nonce": nonce.hex(),
            _VAL: base64.b64encode(public).decode(),
            "validator": "5evil",
            "session_id": session,
            "resume": False,
            "auth": auth(self.secret, nonce, public, "5evil", session),
        }
        await send(json.dumps(begin))
        answer, salt = json.loads(await receive()), os.urandom(32)
        if "version" in answer:
            return
        ok = {"type": "attestation_ok", "aead": AEAD, "hkdf_salt": base64.b64encode(salt).decode()}
        await send(json.dumps(ok))
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(answer[_CHAL]))
        channel = EnvelopeChannel(derive_key(key.exchange(peer), salt), os.urandom)
        order = {"type": "job_execute", "job_id": "his", "job_name": None, "payload": {"his": True}}
        await send(channel.seal(json.dumps(order).encode()))
        while True:
            plaintext = channel.open(str(await receive()))
            self.learned.append(plaintext or b"")
            if b"job_result" in (plaintext or b""):
                return


class OtherCvm(Attack):
    """Connects to another CVM of the same app; with `rewrites`, as its launch secret wants it."""

    def __init__(self, *, rewrites: bool, **how: Any) -> None:
        super().__init__(**how)
        self.rewrites = rewrites
        self.asked_for = ""

    def target(self, connection: int) -> int:
        del connection
        return 1

    def pass_on(self, passing: Passing) -> Moves:
        frame = passing.frame
        if passing.number == 0:
            if self.rewrites and passing.up:
                said = json.loads(frame)
                nonce, public = bytes.fromhex(said["nonce"]), base64.b64decode(said[_VAL])
                proof = auth(self.known_secret, nonce, public, said["validator"], said["session_id"])
                frame = edited(frame, auth=proof)
            elif self.rewrites and "vm" in json.loads(frame):
                frame = edited(frame, vm=json.loads(frame)["vm"].removesuffix("-other"))
            return [Move(passing.up, frame, tampered=True)]
        return super().pass_on(passing)


class TwinAtResume(CutOff):
    """Connects the validator that dials again to a CVM that was started alike, launch secret included."""

    def target(self, connection: int) -> int:
        return 2 if connection else 0

    def pass_on(self, passing: Passing) -> Moves:
        if passing.connection:
            return [Move(passing.up, passing.frame, tampered=True)]
        return super().pass_on(passing)


def auth(secret: bytes, nonce: bytes, public: bytes, validator: str, session_id: str) -> str:
    """The proof of a launch secret, from its published form."""
    message = b"platform-session-v2 begin" + nonce + public + hashlib.sha256(validator.encode()).digest()
    return hmac.new(secret, message + session_id.encode(), hashlib.sha256).hexdigest()
