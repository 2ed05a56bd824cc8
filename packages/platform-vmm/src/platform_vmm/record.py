"""What is written of a VM before anything is done about it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from platform_vmm.configuration import VmConfiguration
from platform_vmm.errors import RecordUnreadable
from platform_vmm.state import write_durably

_FILE = "vm.json"


@dataclass(slots=True)
class Record:
    """`started` is what was asked for; `created_at` is seconds since the epoch."""

    id: str
    configuration: VmConfiguration
    created_at: float
    started: bool
    removing: bool = False

    @property
    def age(self) -> float:
        """Seconds since CreateVm, also over restarts of the VMM."""
        return max(0.0, time.time() - self.created_at)

    def save(self, folder: Path) -> None:
        """Write it, durably."""
        value = {
            "id": self.id,
            "created_at": self.created_at,
            "started": self.started,
            "removing": self.removing,
            "configuration": self.configuration.model_dump(),
        }
        write_durably(folder / _FILE, json.dumps(value))

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read it.

        Raises:
            RecordUnreadable: It was never finished, or is not ours.
        """
        try:
            value = json.loads((folder / _FILE).read_text())
            return cls(
                id=str(value["id"]),
                configuration=VmConfiguration.model_validate(value["configuration"]),
                created_at=float(value["created_at"]),
                started=bool(value["started"]),
                removing=bool(value["removing"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordUnreadable(f"{folder.name}: {error}") from error
