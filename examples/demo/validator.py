"""One validator of a run: its keys, its settings, and what it says of itself."""

from __future__ import annotations

import http.client
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.unix_http import UnixConnection, answers

from platform_protocol.signing import Keypair


@dataclass(frozen=True, slots=True)
class ValidatorPart:
    """`folder` is its state directory, `api` the Platform API as it reaches it, `vmm` the VMM's folder."""

    name: str
    folder: Path
    keypair: Keypair
    guest_port: int
    egress_port: int
    admin_port: int
    api: str
    vmm: Path
    port_range: str
    level: str = "Container"

    @property
    def database(self) -> Path:
        """The journal."""
        return self.folder / "validator.db"

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.folder / "config.toml"

    def write(self) -> None:
        """Its state directory with its configuration."""
        self.folder.mkdir(mode=0o700)
        self.config.write_text(
            "\n".join(
                [
                    "[attestation]",
                    "allow_simulated = true",
                    f'simulated_root_file = "{self.vmm / "simulated-root.pem"}"',
                    "[sandbox_config]",
                    f'isolation_level = "{self.level}"',
                    "[sources]",
                    'allow = ["https", "file"]',
                    "[dstack]",
                    f'port_range = "{self.port_range}"',
                    "",
                ]
            )
        )

    def environment(self) -> dict[str, str]:
        """What it needs to know; its VMM among it, unless its configuration lists several."""
        token = self.vmm / "token"
        socket = {"DSTACK_VMM_URL": f"unix:{self.vmm.parent / 'vmm.sock'}"} if token.exists() else {}
        secret = {"DSTACK_VMM_TOKEN": token.read_text().strip()} if token.exists() else {}
        return {
            **socket,
            **secret,
            "VALIDATOR_HOTKEY": self.keypair.address,
            "VALIDATOR_HOTKEY_FILE": str(self.folder.with_suffix(".hotkey")),
            "PLATFORM_BASE_API": self.api,
            "VALIDATOR_DB_PATH": str(self.database),
            "VALIDATOR_HTTP_LISTEN": f"127.0.0.1:{self.guest_port}",
            "VALIDATOR_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "VALIDATOR_BASE_URL": f"http://10.0.2.2:{self.guest_port}",
            "VALIDATOR_EGRESS_LISTEN": f"127.0.0.1:{self.egress_port}",
            "VALIDATOR_EGRESS_BASE_URL": f"http://10.0.2.2:{self.egress_port}",
        }

    def ready(self) -> bool:
        """It runs, whether or not anything around it answers."""
        return answers(f"http://127.0.0.1:{self.guest_port}/health")

    def status(self) -> dict[str, Any] | None:
        """Its own view; None while it does not answer."""
        connection = UnixConnection(self.folder / "validator.sock")
        try:
            connection.request("GET", "/api/v1/status")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return found


def new_hotkey(path: Path) -> Keypair:
    """A key made for this run; its seed in a file that only we can read."""
    seed = secrets.token_bytes(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"0x{seed.hex()}")
    return Keypair.from_seed(seed)
