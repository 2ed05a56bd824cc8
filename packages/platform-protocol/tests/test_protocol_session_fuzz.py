"""Both ends under a wire that drops, repeats, swaps, changes, reflects frames; resumes at any time."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from platform_protocol.ids import JobId
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ChallengeSession, ValidatorSession
from platform_protocol.session.errors import FrameInvalid
from platform_protocol.session.messages import GuestState, JobResult, Ping

_STEPS = ("result", "ping", "to guest", "to validator", "resume")
_LIES = ("drop", "repeat", "swap", "flip", "cut", "reflect")


class Wire:
    """Both ends and what is between them; `sealed` is what was sent over this connection, in order."""

    def __init__(self) -> None:
        self.validator, self.guest = ValidatorSession("s"), ChallengeSession("s")
        self.keys = 0
        self.sent: list[str] = []
        self.got: list[str] = []
        self.pings = 0
        self.connect()

    def connect(self) -> None:
        """A new connection with new keys; the wire lets its hellos pass."""
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.sealed: dict[bool, deque[bytes]] = {True: deque(), False: deque()}
        self.keys += 1
        one, two = self.keys.to_bytes(32, "big"), self.keys.to_bytes(32, "little")[:31] + b"!"
        theirs = SealedChannel(send_key=two, receive_key=one)
        self.validator.connected(SealedChannel(send_key=one, receive_key=two))
        hello = self.guest.greet(theirs, known=True, state=GuestState(configured=True))
        self.validator.receive(hello)
        self.guest.connected(theirs, self.validator.hello())
        for frame in self.guest.unacknowledged():
            self.put(frame, up=False)

    def put(self, frame: bytes, *, up: bool) -> None:
        (self.up if up else self.down).append(frame)
        self.sealed[up].append(frame)

    def step(self, step: str) -> None:
        """What an honest world does."""
        if step == "result":
            self.sent.append(f"job-{len(self.sent)}")
            frame = self.guest.send(JobResult(job_id=JobId(self.sent[-1]), result={}))
            assert frame is not None
            self.put(frame, up=False)
        elif step == "ping":
            self.put(self.validator.send(Ping(n=self.pings)), up=True)
        elif step == "resume":
            self.connect()
        else:
            self.deliver(up=step == "to guest")

    def deliver(self, *, up: bool) -> None:
        """The next frame: taken if it is the peer's next, else refused, which ends the connection."""
        queue, sealed = (self.up, self.sealed[True]) if up else (self.down, self.sealed[False])
        if not queue:
            return
        frame = queue.popleft()
        end = self.guest if up else self.validator
        if not sealed or frame != sealed.popleft():
            with pytest.raises(FrameInvalid):
                end.receive(frame)
            self.connect()
            return
        message = end.receive(frame)
        if isinstance(message, JobResult):
            self.got.append(message.job_id)
            acknowledged = self.validator.done(message.seq)
            if acknowledged is not None:
                self.put(acknowledged, up=True)

    def lie(self, lie: str, *, up: bool) -> None:
        """What the wire does to the next frame of a direction."""
        queue, other = (self.up, self.down) if up else (self.down, self.up)
        if not queue:
            return
        if lie == "drop":
            queue.popleft()
        elif lie == "repeat":
            queue.insert(1, queue[0])
        elif lie == "swap":
            queue.rotate(1)
        elif lie == "flip":
            queue[0] = queue[0][:-1] + bytes([queue[0][-1] ^ 1])
        elif lie == "cut":
            queue[0] = queue[0][:-1]
        else:
            other.appendleft(queue[0])


@given(st.lists(st.one_of(st.sampled_from(_STEPS), st.tuples(st.sampled_from(_LIES), st.booleans()))))
@settings(deadline=None, max_examples=200)
def test_whatever_the_wire_does_only_what_was_sent_is_taken_once_and_in_order(
    steps: list[str | tuple[str, bool]],
) -> None:
    """A frame that is not the peer's next is refused; after an honest resume nothing is missing."""
    wire = Wire()
    for step in steps:
        if isinstance(step, str):
            wire.step(step)
        else:
            wire.lie(step[0], up=step[1])
        assert wire.got == wire.sent[: len(wire.got)]
    wire.connect()
    while wire.down:
        wire.deliver(up=False)
    while wire.up:
        wire.deliver(up=True)
    assert (wire.got, wire.guest.pending) == (wire.sent, 0)
