"""Why the egress proxy refuses: one stable word each, in answers, logs and metrics."""

from __future__ import annotations

from enum import StrEnum

from platform_validator.errors import ValidatorError


class Reason(StrEnum):
    """The words. `UNAUTHENTICATED` is the only one that is nobody's in particular."""

    UNAUTHENTICATED = "unauthenticated"
    BAD_REQUEST = "bad_request"
    BAD_TARGET = "bad_target"
    RAW_ADDRESS = "raw_address"
    HOST_NOT_ALLOWED = "host_not_allowed"
    PORT_NOT_ALLOWED = "port_not_allowed"
    HOST_MISMATCH = "host_mismatch"
    NAME_UNKNOWN = "name_unknown"
    NAME_UNANSWERED = "name_unanswered"
    PRIVATE_ADDRESS = "private_address"
    OWN_ADDRESS = "own_address"
    UNREACHABLE = "unreachable"
    NOT_TLS = "not_tls"
    BAD_HELLO = "bad_hello"
    NO_SNI = "no_sni"
    SNI_MISMATCH = "sni_mismatch"
    ENCRYPTED_HELLO = "encrypted_hello"
    BAD_ANSWER = "bad_answer"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    BYTES_SPENT = "bytes_spent"
    SLOW = "slow"


OF_THE_OTHER_SIDE = frozenset(
    {Reason.NAME_UNKNOWN, Reason.NAME_UNANSWERED, Reason.UNREACHABLE, Reason.BAD_ANSWER}
)
"""What is no breach of the policy: the name, or who has it, did not answer."""


class Refused(ValidatorError):
    """A request of a guest is refused, or could not be done. `reason` is its word, the message for people."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
