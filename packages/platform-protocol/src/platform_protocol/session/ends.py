"""The two ends of a version 2 session above the sealed frames: hello, numbers, acknowledgements, resume.

An end outlives its connections: `connected` gives it a new channel, everything that the peer had not
acknowledged is sent again, and what was received before is dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.errors import MessageInvalid
from platform_protocol.session.messages import (
    Ack,
    GuestHello,
    GuestMessage,
    GuestState,
    JobProgress,
    Log,
    Pong,
    SequencedMessage,
    ValidatorHello,
    ValidatorMessage,
    encode_message,
    read_guest_message,
    read_validator_message,
)


@dataclass(slots=True)
class ValidatorSession:
    """V's end of one session (`session_id`).

    A message's number is *done* when its effect is durable; what is acknowledged is the longest run of
    done numbers, so that nothing is acknowledged over the head of an unfinished one.
    """

    session_id: str
    _channel: SealedChannel | None = None
    _greeted: bool = False
    _seen: int = 0
    _acked: int = 0
    _done: set[int] = field(default_factory=set)

    def connected(self, channel: SealedChannel) -> None:
        """A new connection's channel. S speaks first."""
        self._channel = channel
        self._greeted = False

    def disconnected(self) -> None:
        """The connection is gone."""
        self._channel = None
        self._greeted = False

    @property
    def greeted(self) -> bool:
        """Whether S's hello came over this connection: before it nothing may be sent."""
        return self._greeted

    def receive(self, frame: bytes) -> GuestMessage | None:
        """The message in a frame; None for one that was received before. The first is a GuestHello.

        Raises:
            FrameInvalid: It does not open: close the connection.
            MessageInvalid: No message, no hello first, a second hello, or a number out of order.
        """
        return self.accept(read_guest_message(self.open(frame)))

    def open(self, frame: bytes) -> bytes:
        """The plaintext of a frame, for a reader of one's own.

        Raises:
            FrameInvalid: It does not open: close the connection.
            MessageInvalid: Not connected.
        """
        return self._open().open(frame)

    def accept(self, message: GuestMessage) -> GuestMessage | None:
        """Take what was read from the newest frame, in their order; as `receive`.

        Raises:
            MessageInvalid: No hello first, a second hello, or a number out of order.
        """
        if isinstance(message, GuestHello) == self._greeted:
            raise MessageInvalid("expected one hello, first")
        if isinstance(message, GuestHello):
            self._greeted = True
            self._seen = max(self._seen, message.received)
            self._acked = max(self._acked, message.received)
            return message
        if isinstance(message, (JobProgress, Log, Pong)):
            return message
        if message.seq <= self._seen:
            return None
        if message.seq != self._seen + 1:
            raise MessageInvalid(f"expected message {self._seen + 1}, got {message.seq}")
        self._seen = message.seq
        return message

    def hello(self) -> bytes:
        """V's hello: what is durable here. Sent once, after S's."""
        return self._seal(ValidatorHello(received=self._acked))

    def send(self, message: ValidatorMessage) -> bytes:
        """A frame. V's messages carry no number and may be repeated.

        Raises:
            MessageInvalid: Not connected, or S has not said hello.
        """
        return self._seal(message)

    def done(self, seq: int) -> bytes | None:
        """The effect of message `seq` is durable: the frame that acknowledges as far as can be, or None."""
        if seq > self._acked:
            self._done.add(seq)
        reached = self._acked
        while reached + 1 in self._done:
            reached += 1
            self._done.discard(reached)
        if reached == self._acked:
            return None
        self._acked = reached
        return self._seal(Ack(seq=reached)) if self._channel is not None and self._greeted else None

    def _open(self) -> SealedChannel:
        if self._channel is None:
            raise MessageInvalid("the session has no connection")
        return self._channel

    def _seal(self, message: ValidatorMessage) -> bytes:
        if not self._greeted:
            raise MessageInvalid("nothing is sent before the peer's hello")
        return self._open().seal(encode_message(message))

    def __repr__(self) -> str:
        state = "up" if self._greeted else "greeting" if self._channel else "down"
        return f"ValidatorSession({self.session_id}, {state}, seen={self._seen}, acked={self._acked})"


@dataclass(slots=True)
class ChallengeSession:
    """S's end of one session. Numbered messages are kept until V has acknowledged them."""

    session_id: str
    _channel: SealedChannel | None = None
    _next: int = 1
    _acked: int = 0
    _kept: OrderedDict[int, SequencedMessage] = field(default_factory=OrderedDict)

    def greet(self, channel: SealedChannel, *, known: bool, state: GuestState) -> bytes:
        """S's hello on a new connection, the first frame to send. The live connection stays as it is."""
        return channel.seal(encode_message(GuestHello(known=known, received=self._acked, state=state)))

    def connected(self, channel: SealedChannel, frame: bytes) -> None:
        """V's hello came over a new connection: it is the live one now. Send `unacknowledged()` at once.

        Raises:
            FrameInvalid: It does not open: the old connection stays.
            MessageInvalid: It is no hello, or acknowledges what was not sent: the old connection stays.
        """
        message = read_validator_message(channel.open(frame))
        if not isinstance(message, ValidatorHello):
            raise MessageInvalid("expected hello first")
        self._acknowledged(message.received)
        self._channel = channel

    def disconnected(self) -> None:
        """The connection is gone."""
        self._channel = None

    @property
    def pending(self) -> int:
        """How many numbered messages V has not acknowledged."""
        return len(self._kept)

    def receive(self, frame: bytes) -> ValidatorMessage:
        """The message in a frame.

        Raises:
            FrameInvalid: It does not open: close the connection.
            MessageInvalid: No message, a second hello, or an ack of what was not sent.
        """
        if self._channel is None:
            raise MessageInvalid("the session has no connection")
        message = read_validator_message(self._channel.open(frame))
        if isinstance(message, ValidatorHello):
            raise MessageInvalid("expected one hello, first")
        if isinstance(message, Ack):
            self._acknowledged(message.seq)
        return message

    def send(self, message: GuestMessage) -> bytes | None:
        """A frame, or None while there is no connection: numbered messages are then kept, others lost."""
        if isinstance(message, SequencedMessage):
            message = message.model_copy(update={"seq": self._next})
            self._kept[self._next] = message
            self._next += 1
        return self._channel.seal(encode_message(message)) if self._channel is not None else None

    def unacknowledged(self) -> list[bytes]:
        """Frames of everything that V has not acknowledged, in order."""
        if self._channel is None:
            return []
        return [self._channel.seal(encode_message(message)) for message in self._kept.values()]

    def _acknowledged(self, seq: int) -> None:
        if seq >= self._next:
            raise MessageInvalid(f"message {seq} was acknowledged, the last one sent is {self._next - 1}")
        self._acked = max(self._acked, seq)
        while self._kept and next(iter(self._kept)) <= seq:
            self._kept.popitem(last=False)

    def __repr__(self) -> str:
        state = "down" if self._channel is None else "up"
        return f"ChallengeSession({self.session_id}, {state}, next={self._next}, acked={self._acked})"
