"""A VMM as a process of its own, and the calls of its API that a cycle makes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.demo.processes import MARK

START_S, ANSWER_S = 120.0, 60.0
_POLL = 0.003


class VmmFailed(Exception):
    """The VMM does not answer as it should; the message has the end of its log."""


class Vmm:
    """`program` is what Python runs instead of `-m platform_vmm`, with the same arguments after it.

    `python` is the interpreter, with whatever runs it as somebody else, in `environment`.
    """

    def __init__(
        self,
        folder: Path,
        program: Sequence[str] = ("-m", "platform_vmm"),
        *,
        python: Sequence[str] = (sys.executable,),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state, self.temporary = folder / "vmm", folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._log, self._socket = folder / "vmm.log", folder / "s"
        self._program = program
        self._python = python
        self._environment = dict(os.environ if environment is None else environment)
        self._mark = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._image = ""
        self.described: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        """Of the one that runs."""
        if self._process is None:
            raise VmmFailed("no VMM runs")
        return self._process.pid

    def make_image(self) -> None:
        """By a process of its own: memory that the making takes would hide what a VMM's cycles take."""
        command = [*self._python, "-m", "platform_vmm", "images", "--state-dir", str(self.state)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=START_S, check=False, env=self._environment
        )
        if done.returncode:
            raise VmmFailed(done.stderr[-2000:])

    def start(self) -> None:
        """Start it; returns when it answers, which is when it has reclaimed what it found."""
        listen = ["serve", "--listen", f"unix:{self._socket}", "--state-dir", str(self.state)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._python, *self._program, *listen],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, "TMPDIR": str(self.temporary), MARK: str(self._mark)},
            )
        self.until(self._answers, "the VMM to answer", START_S)
        self.described = json.loads(self.call("ListImages")["images"][0]["description"])
        self._image = f"platform-runtime@{self.described['runtimes']['platform-runtime']}"

    def end(self, number: int) -> None:
        """Send it a signal and wait for its end."""
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise self._failed(f"still there {ANSWER_S:.0f} s after {signal.Signals(number).name}") from None
        self._process = None

    def create(
        self,
        script: str,
        port: int,
        *,
        interpreter: Sequence[str] = ("/bin/sh", "-c"),
        filesystem: Mapping[str, Any] | None = None,
    ) -> str:
        """A VM that runs a script, under a filesystem policy; `port` of the host leads into it."""
        service = {"image": self._image, "command": [*interpreter, script.replace("$", "$$")]}
        compose = {"manifest_version": 2, "name": "cycle", "runner": "docker-compose"}
        compose |= {"docker_compose_file": json.dumps({"services": {"one": service}})}
        message = {"name": "cycle", "image": "local-sandbox", "vcpu": 1, "memory": 64, "disk_size": 1}
        ports = [{"protocol": "tcp", "host_port": port, "vm_port": 10000}]
        message |= {"compose_file": json.dumps(compose), "no_tee": True, "ports": ports}
        message |= {"user_config": json.dumps({"filesystem": filesystem or {}})}
        return str(self.call("CreateVm", message)["id"])

    def remove(self, identity: str) -> None:
        """Remove a VM and wait until it is gone."""
        self.call("RemoveVm", {"id": identity})
        self.until(lambda: not self.call("GetInfo", {"id": identity})["found"], f"VM {identity} to be gone")

    def remove_all(self) -> int:
        """Remove every VM; how many there were."""
        found = [vm["id"] for vm in self.call("Status")["vms"]]
        for identity in found:
            self.remove(identity)
        return len(found)

    def until_said(self, identity: str, word: str) -> None:
        """Wait until the guest wrote a word; a VM that failed says why."""
        log = self.state / "vms" / identity / "serial.log"

        def said() -> bool:
            if error := self.call("GetInfo", {"id": identity})["info"].get("boot_error"):
                raise VmmFailed(f"VM {identity}: {error}")
            return log.exists() and any(line == word for line in log.read_text().splitlines())

        self.until(said, f"VM {identity} to say {word}")

    def call(self, method: str, body: object = None) -> Any:
        """One call of the API.

        Raises:
            VmmFailed: It refused, or did not answer in time.
        """
        connection = http.client.HTTPConnection("vmm", timeout=ANSWER_S)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.sock.settimeout(ANSWER_S)
            connection.sock.connect(str(self._socket))
            token = (self.state / "token").read_text()
            connection.request(
                "POST", f"/prpc/{method}?json", json.dumps(body or {}), {"X-Admin-Token": token}
            )
            answer = connection.getresponse()
            text = answer.read()
        except TimeoutError as error:
            raise self._failed(f"{method}: no answer within {ANSWER_S:.0f} s") from error
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise self._failed(f"{method}: {answer.status} {text[:300].decode()}")
        return json.loads(text) if text else {}

    def until(self, condition: Callable[[], bool], what: str, limit: float = ANSWER_S) -> None:
        """Wait for what nobody tells us of."""
        deadline = time.monotonic() + limit
        while not condition():
            if self._process is not None and self._process.poll() is not None:
                raise self._failed(f"ended with {self._process.returncode} while we waited for {what}")
            if time.monotonic() > deadline:
                raise self._failed(f"waited {limit:.0f} s for {what}")
            time.sleep(_POLL)

    def _answers(self) -> bool:
        try:
            self.call("Version")
        except OSError:
            return False
        return True

    def _failed(self, what: str) -> VmmFailed:
        return VmmFailed(f"{what}\n{self._log.read_text(errors='replace')[-2000:]}")
