"""What the two ends of a session ask of each other, by ids: values for the guest, weights from it."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from typing import Any

from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import ValuesRequest, ValuesResult, WeightsRequest, WeightsResponse
from platform_validator.cvm.errors import SessionRefused
from platform_validator.cvm.session_link import SessionLink
from platform_validator.cvm.sessions import ValuesHandler

_ANSWERS = 64


class SessionRequests:
    """Requests and answers of one session; each counts once, however often it is sent.

    Args:
        link: The connection of the moment.
        challenge_id: Whose values the session may touch.
        values: Answers values requests.
    """

    def __init__(self, link: SessionLink, challenge_id: ChallengeId, values: ValuesHandler) -> None:
        self._link = link
        self._challenge_id = challenge_id
        self._values = values
        self._answers: OrderedDict[str, ValuesResult] = OrderedDict()
        self._asked: dict[str, tuple[WeightsRequest, asyncio.Future[dict[str, float]]]] = {}

    async def resend(self) -> None:
        """Send what may have been lost on the way with an earlier connection."""
        for answer in list(self._answers.values()):
            await self._link.send(answer)
        for request, _ in list(self._asked.values()):
            await self._link.send(request)

    async def answer(self, request: ValuesRequest) -> None:
        """Answer the guest's request, durably, and acknowledge it."""
        answer = await self._values.answer(self._challenge_id, self._link.session_id, request)
        self._answers[request.request_id] = answer
        if len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)
        await self._link.send(answer)
        await self._link.acknowledge(request.seq)

    async def ask_weights(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Ask the challenge for weights over results, and wait for them.

        Raises:
            SessionRefused: It has none, and says why.
        """
        request = WeightsRequest(request_id=str(uuid.uuid4()), results=results)
        answer: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._asked[request.request_id] = request, answer
        try:
            await self._link.send(request)
            return await answer
        finally:
            del self._asked[request.request_id]

    def weighed(self, message: WeightsResponse) -> None:
        """The challenge's answer; one that nobody waits for is dropped."""
        _, answer = self._asked.get(message.request_id, (None, None))
        if answer is None or answer.done():
            return
        if message.error is not None or message.weights is None:
            said = message.error.message if message.error is not None else "no weights"
            answer.set_exception(SessionRefused(f"the challenge gives no weights: {said}"[:1000]))
        else:
            answer.set_result(message.weights)
