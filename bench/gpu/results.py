"""The results of a run: one JSON file, whole at every moment, rewritten whenever a stage has a new row."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from bench.gpu import rows as stage_rows

__all__ = ["Results", "slug"]


def slug(device: str) -> str:
    """Returns a device's name as a file's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


class Results:
    """`stages`: name -> how it ended, and its rows."""

    def __init__(self, path: Path, device: str, card: str, keep: bool) -> None:
        self.path = path
        today = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.data: dict[str, Any] = {"device": device, "card": card, "started": today, "stages": {}}
        if keep and path.exists():
            kept = json.loads(path.read_text())
            if (kept["device"], kept["card"]) != (device, card):
                raise SystemExit(f"--continue: {path} is of {kept['card']}, this is {card}")
            self.data = {**kept, "continued": today}
        self._seen: dict[str, int] = {}

    def done(self, stage: str) -> bool:
        return self.data["stages"].get(stage, {}).get("status") == "done"

    def note(self, stage: str, rows: Path, outcome: dict[str, Any]) -> None:
        """Notes how a stage is doing, with the rows that it has so far; on disk if there is anything new."""
        size = rows.stat().st_size if rows.exists() else 0
        if outcome["status"] == "running" and self._seen.get(stage) == size:
            return
        self._seen[stage] = size
        found = [row for row in stage_rows.read(rows) if row.get("what") != "begin"]
        self.data["stages"][stage] = {**outcome, "rows": found}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)

    def rows(self, what: str) -> list[dict[str, Any]]:
        """Returns all rows of a kind."""
        return [row for stage in self.data["stages"].values() for row in stage["rows"] if row.get("what") == what]
