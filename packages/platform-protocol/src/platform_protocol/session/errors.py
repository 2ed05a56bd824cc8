"""Every way in which a session ends that is not a close."""

from __future__ import annotations

from platform_protocol.errors import ProtocolError


class SessionError(ProtocolError):
    """The session cannot go on over this connection."""


class HandshakeInvalid(SessionError):
    """A handshake frame that is not what the protocol says."""


class AuthRefused(SessionError):
    """The dialler does not know the launch secret, or used a nonce twice: close with 4403."""


class AttestationRejected(SessionError):
    """The validator refused the attestation; the message has its reason."""


class FrameInvalid(SessionError):
    """A sealed frame that does not open: changed, repeated, reordered, cut or not for us."""


class MessageInvalid(SessionError):
    """A frame that opened and is no message of the protocol, or not one for this moment."""
