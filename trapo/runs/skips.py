"""Some steps change nothing because a loss or gradient is not finite: reported, counted, and an end to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trapo.errors import TrapoError
from trapo.runs.run_dir import RunDir


class SkipLimit:
    """Stops a run after `limit` such steps in a row; those before an interruption, as its log has them, count too."""

    def __init__(self, limit: int, run_dir: RunDir) -> None:
        self.limit = limit
        self.run_dir = run_dir
        self.in_a_row = 0
        self.started = False

    def check(self, row: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Take a step's row of metrics.jsonl. Raises TrapoError when it is the last one allowed."""
        if not self.started:
            for earlier in self.run_dir.rows():
                if earlier["step"] < row["step"]:  # the log may hold this row already
                    self._count(earlier)
            self.started = True
        self._count(row)
        if row["skipped_steps"]:
            total = row["skipped_steps"] + row["optimizer_steps"]
            note(f"step {row['step']}: {row['skipped_steps']} of {total} updates skipped, loss or gradient not finite")
        if self.in_a_row >= self.limit:
            raise TrapoError(
                f"train.max_skipped_steps: {self.in_a_row} steps in a row, up to step {row['step']}, had a loss or "
                f"gradient that was not finite; the weights are as they were. Look at {self.run_dir.metrics}"
            )

    def refuse_nothing_learnt(self) -> None:
        """Raises TrapoError at the end of a run all of whose updates were skipped."""
        rows = self.run_dir.rows()
        skipped = sum(row["skipped_steps"] for row in rows)
        if skipped and not sum(row["optimizer_steps"] for row in rows):
            raise TrapoError(
                f"no update of the run had a finite loss and gradient ({skipped} skipped), so the weights are as they "
                f"were. Look at the rewards and {self.run_dir.metrics}"
            )

    def _count(self, row: Mapping[str, Any]) -> None:
        """Counts a step; one without anything to learn neither counts nor breaks the row."""
        if row["optimizer_steps"]:
            self.in_a_row = 0
        elif row["skipped_steps"]:
            self.in_a_row += 1
