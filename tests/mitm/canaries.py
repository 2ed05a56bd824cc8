"""What must not be read on the way: one word for each kind of content."""

from __future__ import annotations

import base64

ENVIRONMENT = "canary-environment-3f1c"
PAYLOAD = "canary-payload-9ad0"
SUBMISSION = "canary-submission-51b7"
LINE = "canary-line-c2e8"
VALUE = "canary-value-77d4"
RESULT = "canary-result-0b6e"
ALL = (ENVIRONMENT, PAYLOAD, SUBMISSION, LINE, VALUE, RESULT)


def found_in(seen: bytes) -> list[str]:
    """Those that are there, in clear or in base64."""
    return [one for one in ALL if any(form in seen for form in _forms(one))]


def _forms(word: str) -> list[bytes]:
    """In clear, and what base64 makes of it at each of three places, without what its neighbours change."""
    return [word.encode(), *(base64.b64encode(bytes(at) + word.encode())[4:-4] for at in range(3))]
