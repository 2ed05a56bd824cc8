"""The folder of one run, and the note by which the next run finds what this one may leave."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from examples.demo.processes import end_all, marked
from rich.console import Console

_GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`output` is where the note and the report go; the run itself lives in a temporary folder."""

    output: Path
    prefix: str

    @property
    def note(self) -> Path:
        """Names the temporary folder for as long as there is one."""
        return self.output / "state"

    def begin(self, console: Console) -> Path:
        """Clean up after an earlier run, whatever became of it; make a folder for this one."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._clean_up(console)
        state = Path(tempfile.mkdtemp(prefix=self.prefix))
        state.chmod(0o711)
        self.note.write_text(str(state))
        return state

    def end(self) -> None:
        """End what still runs, and remove the folder."""
        state = Path(self.note.read_text().strip())
        end_all(state)
        _reclaim(state)
        shutil.rmtree(state, ignore_errors=True)
        self.note.unlink(missing_ok=True)

    def _clean_up(self, console: Console) -> None:
        if not self.note.exists():
            return
        state = Path(self.note.read_text().strip())
        ended = end_all(state) if marked(state) else 0
        if state.exists() and state.name.startswith(self.prefix):
            console.print(f"an earlier run was not ended; {ended} processes ended, {state} removed")
            _reclaim(state)
            shutil.rmtree(state, ignore_errors=True)
        self.note.unlink(missing_ok=True)


def _reclaim(state: Path) -> None:
    """Guests die with their VMM; their empty control groups stay until somebody removes them."""
    names = [f"platform-vmm-{identity.read_text().strip()}" for identity in state.glob("vmm*/id")]
    for base in [base for name in names for base in Path("/sys/fs/cgroup").glob(f"**/{name}")]:
        for group in [*(each for each in base.iterdir() if each.is_dir()), base]:
            _remove(group)


def _remove(group: Path) -> None:
    """It is busy until the last of its processes is gone, which was killed a moment ago."""
    deadline = time.monotonic() + _GONE_S
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
