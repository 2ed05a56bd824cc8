"""What challenge authors import; runs inside the CVM.

from platform_challenge_sdk import Context, challenge, run

@challenge.on_job()
async def evaluate(ctx: Context, payload: dict) -> dict:
    outcome = await ctx.submission.run(["python3", "main.py"], timeout=10)
    return {"score": 1.0 if outcome.ok else 0.0}
"""

from platform_challenge_sdk.challenge import Challenge, challenge
from platform_challenge_sdk.contained import Outcome, Usage
from platform_challenge_sdk.context import Context, Job
from platform_challenge_sdk.errors import (
    ContainmentUnavailable,
    SdkError,
    SubmissionFailed,
    SubmissionTimedOut,
    ValueRefused,
)
from platform_challenge_sdk.standalone import run
from platform_challenge_sdk.submission import Submission, require_ok

__all__ = [
    "Challenge",
    "ContainmentUnavailable",
    "Context",
    "Job",
    "Outcome",
    "SdkError",
    "Submission",
    "SubmissionFailed",
    "SubmissionTimedOut",
    "Usage",
    "ValueRefused",
    "challenge",
    "require_ok",
    "run",
]
