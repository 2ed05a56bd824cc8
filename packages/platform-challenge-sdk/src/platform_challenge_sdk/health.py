"""What `/sdk/health` says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

MAX_BODY = 4096
_MAX_CONTAINMENT = 512


@dataclass(slots=True)
class Health:
    """`ready`: the challenge is imported and sessions are accepted. `containment`: what holds submissions."""

    status: Literal["starting", "ready", "failed"] = "starting"
    error: str | None = None
    containment: str | None = None

    def body(self) -> str:
        """JSON of at most 4 KiB; of a longer error the end is kept, where a traceback says what happened."""
        if self.error is None:
            told = {} if self.containment is None else {"containment": self.containment[:_MAX_CONTAINMENT]}
            return json.dumps({"status": self.status} | told)
        error = self.error[-MAX_BODY:]
        while len(body := json.dumps({"status": self.status, "error": error})) > MAX_BODY:
            # One character is at most twelve in JSON, so this never cuts more than it must.
            error = error[max(1, (len(body) - MAX_BODY) // 12) :]
        return body
