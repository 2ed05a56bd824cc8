"""One local VMM of a run that has several."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.processes import Processes
from examples.demo.unix_http import UnixConnection

_BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class VmmPart:
    """`name` is its process's and its folder's; the validator calls it `host` and uses it up to `limits`."""

    name: str
    host: str
    state: Path
    limits: Mapping[str, int]

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.state / f"{self.name}.sock"

    @property
    def token_file(self) -> Path:
        """The token that its API wants."""
        return self.state / self.name / "token"

    def table(self) -> str:
        """Its `[[vmm]]`."""
        limits = ", ".join(f"{kind} = {most}" for kind, most in self.limits.items())
        return "\n".join(
            [
                "[[vmm]]",
                f'name = "{self.host}"',
                f'url = "unix:{self.socket}"',
                f"limits = {{ {limits} }}",
                f'credentials_file = "{self.token_file}"',
            ]
        )

    def start(self, processes: Processes, guest_port: int) -> None:
        """Start it and wait until it answers."""
        command = [str(_BIN / "platform-vmm"), "serve", "--listen", f"unix:{self.socket}"]
        command += ["--state-dir", str(self.state / self.name), "--guest-port", str(guest_port)]
        processes.start(self.name, command, {})
        processes.wait_for(self.name, "answering", self.answers, 60)

    def restart(self, processes: Processes) -> None:
        """Start it again and wait until it answers."""
        processes.restart(self.name)
        processes.wait_for(self.name, "answering", self.answers, 60)

    def vms(self) -> list[dict[str, Any]]:
        """Every VM that it has.

        Raises:
            OSError: Or another error of `http.client` or JSON: it does not answer.
        """
        connection = UnixConnection(self.socket)
        try:
            token = self.token_file.read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", "/prpc/Status?json", "{}", headers)
            vms: list[dict[str, Any]] = json.loads(connection.getresponse().read())["vms"]
        finally:
            connection.close()
        return vms

    def answers(self) -> bool:
        """Whether it does."""
        try:
            self.vms()
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            return False
        return True
