"""Results files: JSON, written atomically, safe for several worker processes, and a run is in them once it has started.

    {"study": "sweep", "settings": {...}, "runs": [{"key": ..., "status": "running|finished|failed", ...}, ...]}

Who works on a run holds a lock on a file of its own. The kernel lets go of it when the process ends, however it ends,
so that an interrupted run is started again and a running one is left alone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trapo.tools.files import write_atomic

Row = dict[str, Any]


class Results:
    """The rows of one part of the study."""

    def __init__(self, folder: Path, part: str, settings: Any, locks: Path) -> None:
        self.path, self.part = folder / f"{part}.json", part
        self.settings, self.locks = settings, locks

    def rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        return json.loads(self.path.read_text())["runs"]

    def finished(self) -> dict[str, Row]:
        return {row["key"]: row for row in self.rows() if row["status"] == "finished"}

    def run(self, key: str, about: Row, work: Callable[[], Row]) -> bool:
        """Do `work` and add its row, unless it is done, failed before, or somebody else is at it; whether it was done.

        A failed run stays in the table and is not tried again: its row would have to be deleted by hand.
        """
        with self._claimed(key) as mine:
            if not mine or self._status(key) in ("finished", "failed"):
                return False
            attempts = next((row["attempts"] for row in self.rows() if row["key"] == key), 0) + 1
            row = {"key": key, "status": "running", "attempts": attempts, **about}
            self._put(row)
            try:
                self._put({**row, "status": "finished", **work()})
            except Exception as error:
                self._put({**row, "status": "failed", "error": f"{type(error).__name__}: {error}"})
                traceback.print_exc()
            return True

    def taken(self, key: str) -> bool:
        """Returns whether a run needs nobody any more: done, failed, or being worked on."""
        if self._status(key) in ("finished", "failed"):
            return True
        with self._claimed(key) as mine:
            return not mine

    def _status(self, key: str) -> str | None:
        return next((row["status"] for row in self.rows() if row["key"] == key), None)

    def _put(self, row: Row) -> None:
        """Add a row, or replace the one with its key."""
        with self._locked(self._lock_file(self.path.name), wait=True):
            rows = self.rows()
            places = [i for i, other in enumerate(rows) if other["key"] == row["key"]]
            if places:
                rows[places[0]] = row
            else:
                rows.append(row)
            write_atomic(self.path, _document(self.part, self.settings, rows))

    def _claimed(self, key: str) -> Any:
        return self._locked(self._lock_file(f"{self.path}/{key}"), wait=False)

    def _lock_file(self, name: str) -> Path:
        return self.locks / hashlib.sha256(name.encode()).hexdigest()[:24]

    @contextmanager
    def _locked(self, path: Path, *, wait: bool) -> Iterator[bool]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _document(part: str, settings: Any, rows: list[Row]) -> str:
    """Returns a line per run, so that a reader finds it and a diff shows it."""
    head = json.dumps({"study": part, "settings": dataclasses.asdict(settings)}, allow_nan=False)
    lines = ",\n".join(json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows)
    return f'{head[:-1]}, "runs": [\n{lines}\n]}}\n'
