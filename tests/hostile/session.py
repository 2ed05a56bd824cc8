"""Case 26: a challenge that speaks the session badly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.archives import found_on_the_host
from tests.hostile.attack import ANY, SUCCEEDED, Attack, Control, Facts

_RESULT = "from platform_protocol.session.messages import JobResult\nimport time\n"

_EARLY = (
    _RESULT
    + """
for _ in range(12):
    for attempt in (1, 2, None):
        rogue.send(JobResult(job_id="@VICTIM@", attempt=attempt, result={"score": @SCORE@}))
    time.sleep(0.25)
"""
)
_TWICE = (
    _RESULT
    + """
job = ctx.job
rogue.send(JobResult(job_id=job.id, attempt=job.attempt, result={"score": 0.5}, evidence={}))
rogue.send(JobResult(job_id=job.id, attempt=job.attempt, result={"score": @SCORE@}, evidence={}))
time.sleep(1)
rogue.send(JobResult(job_id=job.id, attempt=job.attempt, result={"score": @SCORE@}, evidence={}))
time.sleep(10)
"""
)
_LATE = (
    _RESULT
    + """
from platform_challenge_sdk.held_jobs import HeldJobs
HeldJobs.cancel = lambda self, message: None
time.sleep(9)
rogue.result = {"score": @SCORE@}
"""
)
_OTHER_ATTEMPT = (
    _RESULT
    + """
job = ctx.job
rogue.send(JobResult(job_id=job.id, attempt=job.attempt + 1, result={"score": @SCORE@}, evidence={}))
rogue.send(JobResult(job_id="@VICTIM@", attempt=job.attempt, result={"score": @SCORE@}, evidence={}))
time.sleep(2)
rogue.result = {"score": 0.5}
"""
)
_BUNDLE = """
import http.client, json
from platform_protocol.tokens import bundle_authorization
config = rogue.server.config
for name in (config.vm, config.vm[:-1] + "0", "pv-0000000000-1"):
    connection = http.client.HTTPConnection("10.0.2.2", @GUEST_PORT@, timeout=5)
    headers = {"Authorization": bundle_authorization(config.secret, name, "@BUNDLE@")}
    connection.request("GET", "/bundles/" + "@BUNDLE@", headers=headers)
    answer = connection.getresponse()
    text = answer.read()
    tell("bundle", answer.status, len(text), "VAULT_SECRET" if b"VAULT_SECRET" in text else "")
"""
_LORIS = """
import socket, time
held = []
until = time.monotonic() + 12
while time.monotonic() < until and len(held) < 2000:
    try:
        one = socket.create_connection(("10.0.2.2", @GUEST_PORT@), timeout=0.5)
        one.sendall(b"GET /health/live HTTP/1.1\\r\\nHost: x\\r\\n")
        held.append(one)
    except OSError:
        time.sleep(0.05)
    for one in held[-50:]:
        try:
            one.sendall(b"X: y\\r\\n")
        except OSError:
            pass
tell("held", len(held))
"""
_ARTIFACT = """
name = "../../../../../../tmp/@TOKEN@"
rogue.result = {
    "score": 0.5,
    "metrics": {name: 1.0, "/tmp/@TOKEN@": 2.0, ".." : 3.0},
    "artifacts": {name: "owned", "/etc/cron.d/@TOKEN@": "* * * * * root true"},
    "logs": [name],
}
"""


def _forged(facts: Facts) -> bool:
    return facts.score == 0.777


def _other_forged(facts: Facts) -> bool:
    return facts.other_score is not None and facts.other_score != 1.0


def _attack(
    name: str, clause: str, program: str, control: Control, won: Callable[[Facts], bool], **more: Any
) -> Attack:
    return Attack(name, 26, clause, "challenge", program, control, won, **({"outcomes": SUCCEEDED} | more))


SESSION = [
    _attack(
        "a result before its job",
        "before-the-start",
        _EARLY,
        Control("no result before its job", "a result is kept for whichever session is given its job later"),
        _other_forged,
        payload={"victim": "later"},
    ),
    _attack(
        "two results",
        "two-results",
        _TWICE,
        Control("the first result counts", "the last result within two seconds counts"),
        _forged,
    ),
    _attack(
        "a late result",
        "late",
        _LATE,
        Control("time of a job", "ten times the job's 4 s"),
        _forged,
        outcomes=frozenset({"timeout"}),
        timeout_s=4,
    ),
    _attack(
        "another attempt's result, and another job's",
        "another-token",
        _OTHER_ATTEMPT,
        Control("which attempt it is", "a result counts whatever attempt it names"),
        lambda facts: _forged(facts) or _other_forged(facts),
        payload={"victim": "4"},
    ),
    _attack(
        "another VM's bundle, by a token of one's own",
        "another-token",
        _BUNDLE,
        Control("whose bundle it is", "the listener gives a bundle to whoever asks"),
        lambda facts: "VAULT_SECRET" in facts.logs,
    ),
    _attack(
        "slow loris",
        "slow-loris",
        _LORIS,
        Control(
            "connections", "4,000 connections of a VM to the validator instead of 256; it makes 2,000 at most"
        ),
        lambda facts: facts.connections > 300,
        outcomes=ANY,
        timeout_s=60,
    ),
    _attack(
        "a path in an artifact's name",
        "artifact-path",
        _ARTIFACT,
        Control(
            "no file of a guest's name", "the harness writes one so named, and finds it", found_on_the_host
        ),
        lambda facts: bool(facts.escaped),
    ),
]
