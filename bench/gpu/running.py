"""A stage's process: its limit, its log, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

__all__ = ["ROOT", "Running", "how_it_ended"]

ROOT = Path(__file__).parent.parent.parent


def how_it_ended(code: int | None) -> str:
    """Returns an exit status in words."""
    if code is None:
        return "still running"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


@dataclass
class Running:
    """A command in a process group of its own, which `end` ends whole."""

    name: str
    command: Sequence[str]
    limit: float
    log: Path
    started: float = field(default_factory=time.monotonic)
    late: bool = False

    def __post_init__(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        self._file: IO[bytes] = self.log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self._file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def ended(self) -> bool:
        """Returns whether it has ended; past its limit it is ended here."""
        if self.process.poll() is None and time.monotonic() - self.started > self.limit:
            self.late = True
            self.end()
        return self.process.poll() is not None

    def end(self) -> None:
        for which, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, which)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):  # what it started and left behind
            os.killpg(self.process.pid, signal.SIGKILL)

    def outcome(self) -> dict[str, Any]:
        """Returns status, seconds and, where it failed, the last telling line of its log."""
        self._file.close()
        seconds = round(time.monotonic() - self.started, 1)
        code = self.process.poll()
        status = "late" if self.late else "done" if code == 0 else "failed"
        found: dict[str, Any] = {"status": status, "seconds": seconds, "limit": round(self.limit, 1)}
        if status != "done":
            why = f"stopped after {self.limit:.0f} s" if self.late else how_it_ended(code)
            found["why"] = f"{why}: {self._last_words()}"
        return found

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("ROW ")]
        telling = [line for line in lines if "rror" in line or "failed" in line]
        return ((telling or lines or [""])[-1])[:300]
