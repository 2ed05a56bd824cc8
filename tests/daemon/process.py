"""A validator as a process of its own, with nothing around it that answers."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from examples.demo.ports import free_ports

from platform_protocol.signing import Keypair

BIN = Path(sys.executable).parent


@dataclass
class Daemon:
    """A validator's settings, and the processes started with them."""

    folder: Path
    seed: bytes
    ports: list[int]
    more: dict[str, str] = field(default_factory=dict)

    @classmethod
    def made(cls, folder: Path, seed: bytes | None = None) -> Self:
        """One with free ports and a state directory of its own."""
        (folder / "state").mkdir(mode=0o700, parents=True)
        return cls(folder, seed or secrets.token_bytes(32), free_ports(4))

    @property
    def environment(self) -> dict[str, str]:
        """Everything that it needs, and nothing that answers."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "VALIDATOR_HOTKEY": Keypair.from_seed(self.seed).address,
            "HOTKEY_PASSPHRASE": f"0x{self.seed.hex()}",
            "PLATFORM_BASE_API": f"http://127.0.0.1:{self.ports[0]}",
            "DSTACK_VMM_URL": f"http://127.0.0.1:{self.ports[1]}",
            "DSTACK_VMM_TOKEN": "made-up-vmm-token-0123456789",
            "PCCS_URL": f"http://127.0.0.1:{self.ports[1]}",
            "VALIDATOR_DB_PATH": str(self.folder / "state" / "validator.db"),
            "VALIDATOR_HTTP_LISTEN": f"127.0.0.1:{self.ports[2]}",
            "VALIDATOR_ADMIN_LISTEN": f"127.0.0.1:{self.ports[3]}",
            "VALIDATOR_BASE_URL": f"http://10.0.2.2:{self.ports[2]}",
            "RUST_LOG": "debug",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **self.more,
        }

    @contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The daemon, ended with SIGKILL if the test did not end it."""
        with (
            log.open("wb") as out,
            subprocess.Popen(
                [str(BIN / "validator")], env=self.environment, stdout=out, stderr=out, cwd=self.folder
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def health(self) -> dict[str, Any]:
        """`/health`, or an empty dict."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[2]}/health", timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            found = json.load(error)
        except (OSError, http.client.HTTPException):
            return {}
        return found

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A validator command with the same settings."""
        return subprocess.run(
            [str(BIN / "validator"), *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
