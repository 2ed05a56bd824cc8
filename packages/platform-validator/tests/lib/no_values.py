"""A challenge that keeps no values."""

from __future__ import annotations

from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import ValuesRequest, ValuesResult


class NoValues:
    """Answers every request with nothing."""

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        """See the port."""
        return ValuesResult(request_id=request.request_id)
