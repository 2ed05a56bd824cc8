"""One whole system, as processes, in which attempts are made and their facts gathered."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import secrets
import socket
import sys
import tarfile
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from examples.demo.miners import send
from examples.demo.ports import free_ports
from examples.demo.processes import DemoFailed
from examples.demo.repositories import commit_all, make_repository
from examples.demo.stack import make_stack, rows
from examples.demo.unix_http import answers
from tests.canary.places import Canary, launch_secrets
from tests.chaos.evidence import expected_score
from tests.hostile.attack import TOKEN, Attack, Facts, Guest
from tests.hostile.bait import Bait, found_in, new_canary
from tests.hostile.machine import MARK, marked_files
from tests.hostile.watch import Watch
from tests.hostile.widening import FILE
from tests.hostile.world import INSIDE, LISTED, RESOLVER, Traps

from platform_protocol.signing import Keypair

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_ECHO = HERE.parent / "chaos" / "challenge"
_ENDED = ("completed", "failed", "cancelled")
_LIMITS = {
    "VALIDATOR_CPU_CORES": "16",
    "VALIDATOR_MEMORY_MB": "4096",
    "VALIDATOR_DISK_MB": "20480",
    "VALIDATOR_MAX_CONCURRENT_JOBS": "4",
    "VALIDATOR_LOG_FORMAT": "people",
}
_OUTBOUND = f"""
[sandbox_config.network_policy]
allow_outbound = true
allowed_hosts = ["{LISTED}", "{INSIDE}"]
allowed_ports = [80]
dns_servers = ["{RESOLVER}"]
"""
_DESCRIPTORS = 1024
"""Of the validator: a usual limit of a service, which an attack may try to use up."""
_READY_S, _JOB_S = 300.0, 240.0
_HEALTH_EVERY = 0.5
_TICK = 0.05
_FORGED_SCORE = 0.777
CHALLENGES = ("arena", "rogue", "vault")


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
    """A stack with the arena, a hostile challenge, and one with secrets.

    Args:
        state: The run's folder.
        traps: Around it.
        open_guards: Whether its parts are those of `tests/hostile/widening`.
        ports: Host ports of its VMs.
        image: The VMM's image.
    """

    def __init__(self, state: Path, traps: Traps, *, open_guards: bool, ports: str) -> None:
        self._traps = traps
        self._open = open_guards
        self.stack = make_stack(state)
        self.stack.validators[0] = replace(self.stack.validator, port_range=ports)
        self._widen = state / "widen"
        self._widen.write_text("")
        self.canaries: list[Canary] = []
        self.watch = Watch(state / "vmm")
        self.challenges: dict[str, str] = {}
        self.restarts = 0
        self._secrets: dict[str, str] = {"arena": new_canary("arena"), "vault": new_canary("vault")}
        folder = state / "bait"
        folder.mkdir(mode=0o755)
        self._folder = folder
        host = new_canary("host")
        (folder / "secret").write_text(host)
        (folder / "secret").chmod(0o644)
        self.bait = Bait(folder / "secret")
        self.canaries += [
            Canary("a host's file", host.encode(), (folder,)),
            Canary("the traps' secret", traps.secret.encode()),
        ]
        self._port = 0
        self._started: set[tuple[int, float]] = set()

    @property
    def state(self) -> Path:
        """Its folder."""
        return self.stack.state

    # Start and end

    def start(self, names: tuple[str, ...], *, honest: bool) -> None:
        """Start the three processes and serve the challenges.

        Raises:
            DemoFailed: Something did not come up.
        """
        stack = self.stack
        stack.start_api()
        self._start_vmm()
        stack.validator_environment = _LIMITS | {"DSTACK_VMM_URL": f"http://127.0.0.1:{self._port}"}
        self._start_validator()
        self.watch.start()
        self._plant()
        for name in names:
            self._register(name)
        if honest:
            commit = make_repository(_ECHO, self.state / "repositories" / "echo")
            self.challenges["echo"] = stack.add_challenge(
                "echo", self.state / "repositories" / "echo", commit, 60, memory_mb=256
            )
        for name in names:
            kind = name.partition("-")[0]
            if kind in self._secrets:
                self._give(name, f"{kind.upper()}_SECRET", self._secrets[kind])
        self._until("every challenge serves", self._serve, _READY_S)

    def stop(self) -> dict[str, int]:
        """Drain and end everything. Exit codes by name."""
        self.watch.stop()
        code = self.stack.processes.stop("validator", 90) if "validator" in self.stack.processes.parts else 0
        return self.stack.stop() | {"validator": code}

    def close(self) -> None:
        """Let go of what is watched."""
        self.bait.close()

    # Attempts

    def begin(self, attack: Attack, *, widened: bool) -> Attempt:
        """Upload a submission, or queue a job of the hostile challenge."""
        attempt = Attempt(attack, f"{MARK}{secrets.token_hex(6)}")
        self.bait.opened()
        attempt.page_from = self._log.stat().st_size
        attempt.memory = self._memory()
        if widened:
            guard = attack.control.guard
            guard = guard.replace("@VAULT@", self.challenges.get("vault", ""))
            guard = guard.replace("@BAIT@", str(self._folder))
            self._widen.write_text(guard)
        if "victim" in attack.payload:
            later = attack.payload["victim"] == "later"
            payload = {"seconds": 0 if later else float(attack.payload["victim"])}
            challenge = self.challenges["vault-late" if later else "vault"]
            attempt.victim = self.stack.add_job(challenge, payload, 60)
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
        late = time.monotonic() - attempt.began > _JOB_S
        if late or self._refused(attempt):
            # Of a control: what a widened guard let through, the Platform API did not take.
            for job in wanted:
                with contextlib.suppress(OSError):
                    self.stack.admin("POST", f"/jobs/{job}/cancel", {})
        return late or all(self._job(job)["status"] in _ENDED for job in wanted)

    def look_around(self, attempt: Attempt) -> None:
        """The validator's memory, whether it answers, and secrets of VMs that are new."""
        for number, secret in enumerate(launch_secrets(self.state / "vmm")):
            if all(canary.secret != secret for canary in self.canaries):
                name = f"launch secret {len(self.canaries) + number}"
                self.canaries.append(Canary(name, secret, (self.state / "vmm",)))
        attempt.grown = max(attempt.grown, self._memory() - attempt.memory)
        now = time.monotonic()
        if now - attempt.looked >= _HEALTH_EVERY:
            attempt.looked = now
            answers(f"http://127.0.0.1:{self.stack.validator.guest_port}/health/live")
            attempt.answers_s = max(attempt.answers_s, time.monotonic() - now)
            attempt.connections = max(attempt.connections, _held(self.stack.validator.guest_port))
        if self.stack.processes.parts["validator"].process.poll() is not None:
            self.restarts += 1
            self._start_validator()

    def facts(self, attempt: Attempt) -> Facts:
        """All that is known of an attempt that has ended."""
        job: dict[str, Any] = {"outcome": "refused", "score": None, "result": None}
        if attempt.job:
            job = self._job(attempt.job)
        body = job["result"] or ""
        said = json.loads(body) if body else {}
        logs = "\n".join(_LEVEL.sub("", line) for line in said.get("logs") or ())
        shown = {key: value for key, value in said.items() if key not in ("receipt", "lease_token")}
        other = self._job(attempt.victim)["score"] if attempt.victim else None
        return Facts(
            outcome=str(job["outcome"]),
            score=job["score"],
            error=str(said.get("error") or attempt.refused or ""),
            logs=logs,
            guest=self._guest(attempt.job),
            found=found_in(self.canaries, f"{json.dumps(shown)}\n{logs}"),
            trapped=self._traps.of(attempt.token),
            opened=self.bait.opened(),
            escaped=marked_files(attempt.token, (self.state,)) if attempt.attack.control.apart else (),
            validator_bytes=attempt.grown,
            stored=len(body),
            other_score=other,
            page=self._page(attempt),
            answers_s=attempt.answers_s,
            connections=attempt.connections,
        )

    # The honest ones

    def upload_honest(self, number: int) -> str:
        """An honest miner's submission to the echo challenge, which scores its number. Its job."""
        body = packed({"main.py": f"print({number})\n"})
        miner = Keypair.from_seed(b"honest".ljust(32, b"."))
        made = send(self.stack.base, self.challenges["echo"], miner, f"n{number}.tar.gz", body)
        return str(made["jobs"][0])

    def honest_failed(self, jobs: dict[str, int]) -> list[str]:
        """Those of these jobs (with their numbers) that did not come to their own score."""
        found = []
        for job, number in jobs.items():
            row = self._job(job)
            if row["outcome"] != "succeeded" or row["score"] != expected_score(f"n{number}.tar.gz"):
                found.append(f"job {job}: {row['status']}, {row['outcome']}, score {row['score']}")
        return found

    def all_ended(self, jobs: dict[str, int]) -> bool:
        """Whether they have."""
        return all(self._job(job)["status"] in _ENDED for job in jobs)

    # Parts

    def _start_vmm(self) -> None:
        stack = self.stack
        self._port = free_ports(1)[0]
        command = _program("platform-vmm", "vmm", open_guards=self._open)
        command += ["serve", "--listen", f"127.0.0.1:{self._port}", "--state-dir", str(self.state / "vmm")]
        command += [
            "--guest-port",
            str(stack.validator.guest_port),
            "--guest-port",
            str(stack.validator.egress_port),
        ]
        stack.processes.start("vmm", command, self._environment())
        stack.processes.wait_for("vmm", "answering", self._vmm_answers, 60)

    def _vmm_answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def _start_validator(self) -> None:
        stack, part = self.stack, self.stack.validator
        if not part.folder.exists():
            part.write()
            with part.config.open("a") as file:
                file.write(_OUTBOUND)
        command = _program("validator", "validator", open_guards=self._open)
        command += ["run", "--config", str(part.config)]
        settings = part.environment() | dict(stack.validator_environment) | self._environment()
        started = stack.processes.start("validator", command, settings)
        resource.prlimit(started.process.pid, resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
        stack.processes.wait_for("validator", "ready", part.ready, 60)

    def _environment(self) -> dict[str, str]:
        if not self._open:
            return {}
        return {"PYTHONPATH": str(ROOT), FILE: str(self._widen), "HOSTILE_SCRATCH": str(self.state)}

    def _plant(self) -> None:
        """The host's secrets, also where everyone may read them: only the VM's walls keep them then."""
        part = self.stack.validator
        hotkey, token, admin = (
            part.folder.with_suffix(".hotkey"),
            self.state / "vmm" / "token",
            part.folder / "admin.token",
        )
        master = part.folder / "keyring" / "master.key"
        for name, path in (("hotkey", hotkey), ("token", token), ("admin", admin)):
            copy = self._folder / name
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o644)
        text = hotkey.read_text().strip()
        self.canaries += [
            Canary("hotkey", text.removeprefix("0x").encode(), (hotkey, self._folder)),
            Canary("VMM token", token.read_text().strip().encode(), (token, self._folder), _VALIDATOR),
            Canary("operators' token", admin.read_text().strip().encode(), (admin, self._folder)),
            Canary("master key", master.read_bytes(), (part.folder / "keyring",)),
            Canary("administrator's token of the Platform API", self.stack.admin_token.encode()),
            Canary("environment value of the arena", self._secrets["arena"].encode()),
            Canary("environment value of another challenge", self._secrets["vault"].encode()),
            Canary("dynamic value of another challenge", self._secrets["vault"][::-1].encode()),
        ]

    def _register(self, name: str) -> None:
        """`arena`, `rogue`, `vault`; `arena-NAME` is the arena with `widening/open_NAME.py` as its entry."""
        kind, _, opened = name.partition("-")
        repository = self.state / "repositories" / name
        commit = make_repository(HERE / kind, repository)
        toml = (repository / "platform.toml").read_text()
        if opened:
            source = HERE / "widening" / f"open_{opened}.py"
            (repository / source.name).write_text(source.read_text())
            toml = toml.replace(f'entry = "{kind}"', f'entry = "open_{opened}"').replace(
                "ready = 1", "ready = 0"
            )
        (repository / "platform.toml").write_text(toml.replace(f'name = "{kind}"', f'name = "{name}"'))
        if opened:
            commit = commit_all(repository, "with guards that can be widened")
        self.challenges[name] = self.stack.add_challenge(name, repository, commit, 30, memory_mb=512)

    def _give(self, name: str, variable: str, secret: str) -> None:
        challenge = self.challenges[name]
        self._until(
            f"{name} is listed",
            lambda: challenge in json.dumps((self.stack.status() or {}).get("challenges")),
            _READY_S,
        )
        path = self.state / "given"
        path.write_text(secret)
        done = self.stack.validator_command("env", "set", challenge, variable, "--file", str(path))
        path.unlink()
        if done.returncode:
            raise DemoFailed(f"validator env set: {done.stderr}")

    def _serve(self) -> bool:
        shown = (self.stack.status() or {}).get("challenges", [])
        states = {each["id"]: each["state"] for each in shown if "id" in each}
        broken = [each for each in shown if each["state"] == "Failed"]
        if broken:
            raise DemoFailed(f"a challenge failed: {broken}")
        return all(states.get(each) == "Active" for each in self.challenges.values())

    def _queue(self, attack: Attack, attempt: Attempt) -> str:
        program = self._filled(attack.program, attempt)
        payload = {"program": program, "bundle": self._bundle("vault")}
        return self.stack.add_job(self.challenges["rogue"], payload, attack.timeout_s)

    def _upload(self, attack: Attack, attempt: Attempt, *, widened: bool) -> None:
        if attack.archive is not None:
            body = attack.archive(attempt.token)
        else:
            files = {"main.py": self._filled(attack.program, attempt)}
            body = packed(files | ({"widen": attack.control.guard} if widened else {}))
        name = "arena"
        if widened:
            name = "arena-archive" if attack.archive is not None else "arena-arena"
        miner = Keypair.from_seed(attempt.token.encode().ljust(32, b"."))
        filename = attack.filename.replace(TOKEN, attempt.token)
        try:
            made = send(self.stack.base, self.challenges[name], miner, filename, body)
        except urllib.error.HTTPError as error:
            attempt.refused = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
        else:
            attempt.job = str(made["jobs"][0])

    def _refused(self, attempt: Attempt) -> bool:
        page = self._page(attempt)
        return any("result_refused" in line and attempt.job in line for line in page.splitlines())

    def _page(self, attempt: Attempt) -> str:
        """What the validator wrote to its log since the attempt began."""
        with self._log.open("rb") as file:
            file.seek(attempt.page_from)
            return file.read().decode("utf-8", "surrogateescape")

    def _filled(self, program: str, attempt: Attempt) -> str:
        known = {
            TOKEN: attempt.token,
            "@GUEST_PORT@": str(self.stack.validator.guest_port),
            "@VMM_PORT@": str(self._port),
            "@STATE@": str(self.state),
            "@BAIT@": str(self._folder),
            "@VICTIM@": attempt.victim,
            "@VAULT@": self.challenges.get("vault", ""),
            "@FIRST_PORT@": self.stack.validator.port_range.partition("-")[0],
            "@SCORE@": str(_FORGED_SCORE),
        }
        for word, value in known.items():
            program = program.replace(word, value)
        return program

    def _guest(self, job: str) -> Guest:
        found = rows(
            self.stack.validator.database,
            "SELECT cvms_journal.vm_id AS vm FROM jobs_journal"  # noqa: S608 - our own ids
            " JOIN cvms_journal ON cvms_journal.name = jobs_journal.vm"
            f" WHERE jobs_journal.job_id = '{job}'",
        )
        return self.watch.guests.get(found[-1]["vm"], Guest()) if found else Guest()

    def _bundle(self, name: str) -> str:
        """The digest of a challenge's bundle, by which the validator's listener names it."""
        found = rows(
            self.stack.validator.database,
            "SELECT bundle_sha256 AS digest FROM challenges_instances"  # noqa: S608 - our own ids
            f" WHERE challenge_id = '{self.challenges[name]}' AND bundle_sha256 IS NOT NULL",
        )
        return str(found[-1]["digest"])

    def _job(self, job: str) -> dict[str, Any]:
        return rows(
            self.stack.database,
            f"SELECT status, outcome, score, result FROM jobs WHERE id = '{job}'",  # noqa: S608 - our own ids
        )[0]

    def _memory(self) -> int:
        """Of the validator and the processes that it started."""
        total = 0
        with contextlib.suppress(psutil.Error):
            validator = psutil.Process(self.stack.processes.parts["validator"].process.pid)
            for process in (validator, *validator.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    @property
    def _log(self) -> Path:
        return self.stack.processes.parts["validator"].log

    def _until(self, what: str, holds: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise DemoFailed(f"not so that {what} after {seconds:.0f} s")
            time.sleep(_TICK)


_LEVEL = re.compile(r"^(debug|info|warning|error): ")
_ESTABLISHED = "01"
_VALIDATOR = frozenset({"validator"})


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


def _program(name: str, module: str, *, open_guards: bool) -> list[str]:
    """The product's own command, or the same with guards that can be widened."""
    if open_guards:
        return [sys.executable, "-m", f"tests.hostile.widening.{module}"]
    return [str(Path(sys.executable).parent / name)]
