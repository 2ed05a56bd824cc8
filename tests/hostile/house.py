"""Where attempts are made and their facts gathered: a system, and those who attack it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import secrets
import tarfile
import time
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.miners import send
from examples.demo.unix_http import answers
from tests.canary.places import Canary, launch_secrets
from tests.chaos.evidence import expected_score
from tests.hostile.attack import TOKEN, Attack, Facts
from tests.hostile.bait import found_in
from tests.hostile.machine import MARK, marked_files
from tests.hostile.system import System
from tests.hostile.world import Traps

from platform_protocol.signing import Keypair
from platform_protocol.tokens import proxy_password

_ENDED = ("completed", "failed", "cancelled")
_JOB_S = 240.0
"""For all attempts of a job; in a virtual machine five of them, each with a boot, take longer."""
_HEALTH_EVERY = 0.5
_FORGED_SCORE = 0.777


@dataclass(slots=True)
class Attempt:
    """One job that attacks, or does so with a guard widened."""

    attack: Attack
    token: str
    job: str = ""
    victim: str = ""
    refused: str = ""
    memory: int = 0
    grown: int = 0
    answers_s: float = 0.0
    connections: int = 0
    page_from: int = 0
    began: float = field(default_factory=time.monotonic)
    looked: float = 0.0


class House:
    """One system under attack.

    Args:
        system: It.
        traps: Around it.
    """

    def __init__(self, system: System, traps: Traps) -> None:
        self.system = system
        self._traps = traps

    def begin(self, attack: Attack, *, widened: bool) -> Attempt:
        """Upload a submission, or queue a job of the hostile challenge."""
        attempt = Attempt(attack, f"{MARK}{secrets.token_hex(6)}")
        self.system.bait.opened()
        attempt.page_from = self.system.log.stat().st_size
        attempt.memory = self.system.memory()
        if widened:
            guard = attack.control.guard
            guard = guard.replace("@VAULT@", self.system.challenges.get("vault", ""))
            guard = guard.replace("@BAIT@", str(self.system.bait_folder))
            self.system.widen(guard)
        if "victim" in attack.payload:
            later = attack.payload["victim"] == "later"
            payload = {"seconds": 0 if later else float(attack.payload["victim"])}
            challenge = self.system.challenges["vault-late" if later else "vault"]
            attempt.victim = self.system.stack.add_job(challenge, payload, 60)
        if attack.by == "challenge":
            attempt.job = self._queue(attack, attempt)
        else:
            self._upload(attack, attempt, widened=widened)
        return attempt

    def poll(self, attempt: Attempt) -> bool:
        """Look at it, and at the validator meanwhile; whether it has ended, or never will."""
        self.look_around(attempt)
        if attempt.refused:
            return True
        wanted = [job for job in (attempt.job, attempt.victim) if job]
        late = time.monotonic() - attempt.began > _JOB_S * (4 if self.system.virtual else 1)
        if late or self._refused(attempt):
            # Of a control: what a widened guard let through, the Platform API did not take.
            for job in wanted:
                with contextlib.suppress(OSError):
                    self.system.stack.admin("POST", f"/jobs/{job}/cancel", {})
        return late or all(self.system.job(job)["status"] in _ENDED for job in wanted)

    def look_around(self, attempt: Attempt) -> None:
        """The validator's memory, whether it answers, and secrets of VMs that are new."""
        for number, secret in enumerate(launch_secrets(self.system.state / "vmm")):
            if all(canary.secret != secret for canary in self.system.canaries):
                name = f"launch secret {len(self.system.canaries) + number}"
                self.system.canaries.append(Canary(name, secret, (self.system.state / "vmm",)))
                self.system.canaries.append(
                    Canary(f"{name}'s word at the proxy", _proxy_word(secret), (self.system.state / "vmm",))
                )
        attempt.grown = max(attempt.grown, self.system.memory() - attempt.memory)
        now = time.monotonic()
        if now - attempt.looked >= _HEALTH_EVERY:
            attempt.looked = now
            answers(f"http://127.0.0.1:{self.system.stack.validator.guest_port}/health/live")
            attempt.answers_s = max(attempt.answers_s, time.monotonic() - now)
            attempt.connections = max(attempt.connections, _held(self.system.stack.validator.guest_port))
        if self.system.stack.processes.parts["validator"].process.poll() is not None:
            self.system.restarts += 1
            self.system.start_validator()

    def facts(self, attempt: Attempt) -> Facts:
        """All that is known of an attempt that has ended."""
        job: dict[str, Any] = {"outcome": "refused", "score": None, "result": None}
        if attempt.job:
            job = self.system.job(attempt.job)
        body = job["result"] or ""
        said = json.loads(body) if body else {}
        logs = "\n".join(_LEVEL.sub("", line) for line in said.get("logs") or ())
        shown = {key: value for key, value in said.items() if key not in ("receipt", "lease_token")}
        other = self.system.job(attempt.victim)["score"] if attempt.victim else None
        return Facts(
            outcome=str(job["outcome"]),
            score=job["score"],
            error=str(said.get("error") or attempt.refused or ""),
            logs=logs,
            guest=self.system.guest(attempt.job),
            found=found_in(self.system.canaries, f"{json.dumps(shown)}\n{logs}"),
            trapped=self._traps.of(attempt.token),
            opened=self.system.bait.opened(),
            escaped=marked_files(attempt.token, (self.system.state,)) if attempt.attack.control.apart else (),
            validator_bytes=attempt.grown,
            stored=len(body),
            other_score=other,
            page=self._page(attempt),
            answers_s=attempt.answers_s,
            connections=attempt.connections,
        )

    def upload_honest(self, number: int) -> str:
        """An honest miner's submission to the echo challenge, which scores its number. Its job."""
        body = packed({"main.py": f"print({number})\n"})
        miner = Keypair.from_seed(b"honest".ljust(32, b"."))
        made = send(self.system.stack.base, self.system.challenges["echo"], miner, f"n{number}.tar.gz", body)
        return str(made["jobs"][0])

    def honest_failed(self, jobs: dict[str, int]) -> list[str]:
        """Those of these jobs (with their numbers) that did not come to their own score."""
        found = []
        for job, number in jobs.items():
            row = self.system.job(job)
            if row["outcome"] != "succeeded" or row["score"] != expected_score(f"n{number}.tar.gz"):
                found.append(f"job {job}: {row['status']}, {row['outcome']}, score {row['score']}")
        return found

    def all_ended(self, jobs: dict[str, int]) -> bool:
        """Whether they have."""
        return all(self.system.job(job)["status"] in _ENDED for job in jobs)

    def _queue(self, attack: Attack, attempt: Attempt) -> str:
        program = self._filled(attack.program, attempt)
        payload = {"program": program}
        return self.system.stack.add_job(self.system.challenges["rogue"], payload, attack.timeout_s)

    def _upload(self, attack: Attack, attempt: Attempt, *, widened: bool) -> None:
        if attack.archive is not None:
            body = attack.archive(attempt.token)
        else:
            files = {"main.py": self._filled(attack.program, attempt)}
            files |= {"network": ""} if attack.network else {}
            body = packed(files | ({"widen": attack.control.guard} if widened else {}))
        name = "arena"
        if widened:
            name = "arena-archive" if attack.archive is not None else "arena-arena"
        miner = Keypair.from_seed(attempt.token.encode().ljust(32, b"."))
        filename = attack.filename.replace(TOKEN, attempt.token)
        try:
            made = send(self.system.stack.base, self.system.challenges[name], miner, filename, body)
        except urllib.error.HTTPError as error:
            attempt.refused = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
        else:
            attempt.job = str(made["jobs"][0])

    def _refused(self, attempt: Attempt) -> bool:
        page = self._page(attempt)
        return any("result_refused" in line and attempt.job in line for line in page.splitlines())

    def _page(self, attempt: Attempt) -> str:
        """What the validator wrote to its log since the attempt began."""
        with self.system.log.open("rb") as file:
            file.seek(attempt.page_from)
            return file.read().decode("utf-8", "surrogateescape")

    def _filled(self, program: str, attempt: Attempt) -> str:
        known = {
            TOKEN: attempt.token,
            "@GUEST_PORT@": str(self.system.stack.validator.guest_port),
            "@VMM_PORT@": str(self.system.vmm_port),
            "@STATE@": str(self.system.state),
            "@BAIT@": str(self.system.bait_folder),
            "@VICTIM@": attempt.victim,
            "@VAULT@": self.system.challenges.get("vault", ""),
            "@FIRST_PORT@": self.system.stack.validator.port_range.partition("-")[0],
            "@SCORE@": str(_FORGED_SCORE),
        }
        if "@BUNDLE@" in program:
            known["@BUNDLE@"] = self.system.bundle("vault")
        for word, value in known.items():
            program = program.replace(word, value)
        return program


_LEVEL = re.compile(r"^(debug|info|warning|error): ")
_ESTABLISHED = "01"


def _proxy_word(launch_secret: bytes) -> bytes:
    """With what that VM shows the proxy who it is."""
    raw = base64.urlsafe_b64decode(launch_secret + b"=" * (-len(launch_secret) % 4))
    return proxy_password(raw).encode()


def _held(port: int) -> int:
    """How many connections somebody has to a port of this network namespace."""
    wanted = f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(wanted) and row[3] == _ESTABLISHED for row in rows)


def packed(files: dict[str, str]) -> bytes:
    """A tar.gz of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()
