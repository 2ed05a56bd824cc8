"""Sealed frames of version 2: ChaCha20-Poly1305, a counter for each direction, keys from the transcript."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from platform_protocol.session.errors import FrameInvalid

LABEL = b"platform-session-v2"
MAX_FRAME = 64 * 1024 * 1024
MAX_FRAMES = 2**32
"""Frames in one direction under one key; a validator makes a new connection, and with it new keys, before."""
_TAG_BYTES = 16


class SealedChannel:
    """One connection's keys and counters. Not reusable after a FrameInvalid: close the connection."""

    def __init__(self, *, send_key: bytes, receive_key: bytes) -> None:
        self._send = ChaCha20Poly1305(send_key)
        self._receive = ChaCha20Poly1305(receive_key)
        self._sent = 0
        self._received = 0

    def seal(self, plaintext: bytes) -> bytes:
        """The next frame to send.

        Raises:
            FrameInvalid: It would be over 64 MiB, or the key's frames are used up.
        """
        _check_count(self._sent)
        if len(plaintext) > MAX_FRAME - _TAG_BYTES:
            raise FrameInvalid(f"expected a message of at most {MAX_FRAME} bytes, got {len(plaintext)}")
        frame = self._send.encrypt(_nonce(self._sent), plaintext, LABEL)
        self._sent += 1
        return frame

    def open(self, frame: bytes) -> bytes:
        """The plaintext of the next frame received.

        Raises:
            FrameInvalid: It is not the peer's next frame, or over 64 MiB, or the key's frames are used up.
        """
        _check_count(self._received)
        if not _TAG_BYTES <= len(frame) <= MAX_FRAME:
            raise FrameInvalid(f"expected a frame of {_TAG_BYTES} to {MAX_FRAME} bytes, got {len(frame)}")
        try:
            plaintext = self._receive.decrypt(_nonce(self._received), frame, LABEL)
        except InvalidTag as error:
            raise FrameInvalid(f"frame {self._received} does not open") from error
        self._received += 1
        return plaintext

    @property
    def frames(self) -> int:
        """How many were sealed or opened, in the direction that had more."""
        return max(self._sent, self._received)

    def __repr__(self) -> str:
        return f"SealedChannel(sent={self._sent}, received={self._received})"


def derive_keys(*, frame_1: str, frame_2: str, shared: bytes, launch_secret: bytes) -> tuple[bytes, bytes]:
    """(v2s, s2v), 32 bytes each: HKDF-SHA256, salt T, input `shared ‖ L`.

    T is the SHA-256 of both handshake frames as sent, each with its length as u32be before it.
    """
    transcript = hashlib.sha256()
    for frame in (frame_1.encode(), frame_2.encode()):
        transcript.update(len(frame).to_bytes(4, "big") + frame)
    salt = transcript.digest()
    keys = [
        HKDF(algorithm=SHA256(), length=32, salt=salt, info=LABEL + direction).derive(shared + launch_secret)
        for direction in (b" v2s", b" s2v")
    ]
    return keys[0], keys[1]


def _check_count(counter: int) -> None:
    if counter >= MAX_FRAMES:
        raise FrameInvalid(f"expected at most {MAX_FRAMES} frames under one key: connect anew")


def _nonce(counter: int) -> bytes:
    return bytes(4) + counter.to_bytes(8, "big")
