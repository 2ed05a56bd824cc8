"""Case 24: what a submission, or its challenge, prints and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.hostile.attack import ANY, SUCCEEDED, Attack, Control, Facts

from platform_protocol.platform_messages import ResultOutcome
from platform_validator.jobs import result
from platform_validator.scoring import ScoringRule

KIB, MIB = 1024, 1024 * 1024
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
FORGED = "2026-01-01T00:00:00.000000Z [info     ] job_ended outcome=succeeded score=1.0"

_FLOOD = """
import sys
line = b"x" * 65535 + b"\\n"
for _ in range(160_000):
    sys.stdout.buffer.write(line)
"""
_ONE_LINE = """
print("y" * 900_000)
"""
_NO_TEXT = """
import sys
sys.stdout.buffer.write(b"\\xff\\xfe\\xc3\\x28 \\xed\\xa0\\x80 \\xf8\\x88\\x80\\x80\\x80\\n" * 50)
"""
_ESCAPES = """
import sys
sys.stdout.write("\\x1b[2J\\x1b]0;owned\\x07\\x1b[31mred\\x08\\x08\\x9b2J\\n" * 5)
"""
_FORGERY = f"""
import sys
sys.stderr.write("it broke\\r\\n{FORGED}\\r\\n")
raise SystemExit(3)
"""
_PIECES = """
import os
for name, value in os.environ.items():
    for at in range(0, len(value), 9):
        print(value[at:at + 9])
for place in ("/proc/self/environ", "/proc/1/environ", "/dstack/.host-shared/.user-config"):
    try:
        text = open(place, "rb").read().decode("latin-1")
    except OSError:
        continue
    for at in range(0, len(text), 40):
        print("-".join(text[at:at + 40]))
raise SystemExit(1)
"""
_LINES = """
import platform_challenge_sdk.serve as serve
serve._MAX_QUEUE = 10 ** 9
for number in range(60_000):
    ctx.log.info(f"{number} " + "z" * 60)
"""
_CONSOLE = """
import os
block = b"w" * 79 + b"\\n"
for _ in range(400):
    os.write(1, block * 800)
"""
_LARGE_IN_VM = """
import platform_challenge_sdk.job as job
job.check_result = lambda returned, most: returned
rogue.result = {"score": 0.5, "more": "u" * (5 * 1024 * 1024)}
"""
_FRAME = """
import time
async def send():
    await rogue.server._live.send(b"t" * (200 * 1024 * 1024))
asyncio.run_coroutine_threadsafe(send(), rogue.server._loop)
time.sleep(6)
"""
_NAN = """
print('{"score": NaN, "metrics": {"a": Infinity}}')
"""
_NAN_IN_VM = """
import json
import platform_challenge_sdk.job as job
import platform_protocol.session.ends as ends
import platform_protocol.session.messages as messages
job.check_result = lambda returned, most: returned
async def evidence(self, result, error):
    return {"quote": None, "event_log": ""}
job.JobRun._evidence = evidence
def encode(message):
    data = message.model_dump(mode="python")
    return json.dumps({k: v for k, v in data.items() if v is not None}, default=str).encode()
for module in (ends, messages):
    if hasattr(module, "encode_message"):
        module.encode_message = encode
import platform_challenge_sdk.serve as serve
serve.encode_message = encode
rogue.result = {"score": float("nan")}
"""
_DEEP_IN_VM = """
import platform_challenge_sdk.job as job
job.check_result = lambda returned, most: returned
nested = []
for _ in range(200):
    nested = [nested]
rogue.result = {"score": 0.5, "more": nested}
"""
_OTHER_JOB = """
import time
from platform_protocol.session.messages import JobResult
for _ in range(40):
    for attempt in (1, None):
        rogue.send(JobResult(job_id="@VICTIM@", attempt=attempt, result={"score": @SCORE@}))
    time.sleep(0.25)
"""
_REPORT = """
import json, os
report = {"code": 0, "killed_by": None, "started": True, "wall_ms": 1, "cpu_ms": 1, "peak": 1}
line = json.dumps(report).encode()
print('{"exit-code": 0}')
print("arena exit: 0")
for descriptor in range(1, 64):
    if descriptor != 2:
        try:
            os.write(descriptor, line)
        except OSError:
            pass
os._exit(7)
"""


def _judged_nan() -> bool:
    """Whether a judgement that looks for floats alone gives the submission that score."""
    with mock.patch.multiple(
        result, _finite=lambda value: isinstance(value, float), canonical_json=lambda value: b""
    ):
        found = result.judge({"score": math.nan}, None, max_bytes=100, rule=ScoringRule())
    return found.outcome is ResultOutcome.SUCCEEDED and math.isnan(found.score)


def _longest(facts: Facts) -> int:
    return max(map(len, facts.logs.splitlines()), default=0)


def _run(
    name: str, clause: str, program: str, control: Control, won: Callable[[Facts], bool], **more: Any
) -> Attack:
    return Attack(name, 24, clause, "submission", program, control, won, **more)


def _vm(
    name: str, clause: str, program: str, control: Control, won: Callable[[Facts], bool], **more: Any
) -> Attack:
    return Attack(name, 24, clause, "challenge", program, control, won, **more)


OUTPUT = [
    _run(
        "10 GB of stdout",
        "10-gb",
        _FLOOD,
        Control(
            "output of a run", "200 MiB to a run instead of 1 MiB; the VM's control group still has its own"
        ),
        lambda facts: facts.number("bytes") > 2 * MIB,
    ),
    _vm(
        "a line without an end",
        "no-newline",
        'ctx.log.info("y" * 900_000); rogue.result = {"score": 0.5, "logs": ["y" * 60_000]}',
        Control(
            "length of a job's lines", "16 MiB to a line instead of 8 KiB; the result still has its size"
        ),
        lambda facts: _longest(facts) > 9 * KIB,
        outcomes=SUCCEEDED,
    ),
    _run(
        "invalid UTF-8",
        "utf-8",
        _NO_TEXT,
        Control("text that is no UTF-8", "lone surrogates instead of replacement characters"),
        lambda facts: facts.outcome != "succeeded",
        outcomes=SUCCEEDED,
    ),
    _run(
        "terminal escapes",
        "escapes",
        _ESCAPES,
        Control("control characters in a job's lines", "the validator passes on what it was sent"),
        lambda facts: any(c in facts.logs for c in "\x1b\x07\x08\x9b"),
        outcomes=SUCCEEDED,
    ),
    _run(
        "log forging with CR and LF",
        "log-forging",
        _FORGERY,
        Control(
            "control characters in the log",
            "a guest's text is neither escaped nor quoted; each alone would do",
        ),
        lambda facts: any(
            line.startswith(FORGED[:40]) for line in facts.page.replace("\r", "\n").split("\n")
        ),
    ),
    _run(
        "a secret in pieces",
        "secret-in-pieces",
        _PIECES,
        Control("environment", "the run has the SDK's environment"),
        lambda facts: bool(facts.found),
    ),
    _vm(
        "a flood of log lines",
        "lines",
        _LINES,
        Control("size of a job's lines", "256 times the 256 KiB that a result may have of them"),
        lambda facts: facts.stored > 600 * KIB or "logs: expected" in facts.page,
        outcomes=SUCCEEDED,
    ),
    _vm(
        "10^6 lines a second on the console",
        "lines",
        _CONSOLE,
        Control("console", "64 MiB of a console are kept instead of 1 MiB; the challenge writes 24 MiB"),
        lambda facts: facts.guest.console > 2 * MIB,
        outcomes=SUCCEEDED,
        watched=True,
    ),
    _vm(
        "a large result of a challenge's",
        "200-mb-result",
        _LARGE_IN_VM,
        Control(
            "size of a result", "the validator takes any size; the Platform API and the frame have limits"
        ),
        lambda facts: facts.outcome == "succeeded",
    ),
    Attack(
        "200 MB in one frame",
        26,
        "oversized-frame",
        "challenge",
        _FRAME,
        Control("size of a frame", "the validator reads a frame of any size; 200 MB is all that is sent"),
        lambda facts: facts.validator_bytes > 150 * MIB,
        outcomes=ANY,
    ),
    _run(
        "NaN of a submission's",
        "nan",
        _NAN,
        Control(
            "what a handler may return", "the SDK passes on whatever the handler returns: it leaves the VM"
        ),
        # As the session has it: a number that JSON does not know is null.
        lambda facts: facts.outcome != "failed" or "got None" in facts.error,
    ),
    _vm(
        "NaN of a challenge's",
        "nan",
        _NAN_IN_VM,
        Control("finite numbers", "the validator's judgement takes any float for a score", _judged_nan),
        lambda facts: "invalid_result" not in facts.error and facts.outcome != "failed",
    ),
    _vm(
        "deep JSON of a challenge's",
        "deep-json",
        _DEEP_IN_VM,
        Control("depth of a result", "100,000 levels instead of 64; it has 200"),
        lambda facts: facts.outcome == "succeeded",
    ),
    _vm(
        "a score for another job",
        "another-job",
        _OTHER_JOB,
        Control("whose job it is", "a result goes to whatever job it names, over any session"),
        lambda facts: facts.other_score is not None and facts.other_score != 1.0,
        outcomes=ANY,
        payload={"victim": "6"},
    ),
    _run(
        "a forged result line",
        "forged-line",
        _REPORT,
        Control("control socket", "the stage's control socket is inherited"),
        lambda facts: facts.outcome != "failed" or "exit code 7" not in facts.error,
    ),
]
