"""A run's folder: configuration, metrics, evaluations, checkpoints, summary; and where an interrupted run goes on.

config.yaml          what the run really used          metrics.jsonl   a row a step
eval/step-N.json     an evaluation; .jsonl: its responses
checkpoints/step-N   resumable, loadable by transformers
final/               the trained model                 summary.json    written last: the run is finished
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trapo import checkpoint
from trapo.checkpoint import Checkpoint
from trapo.config import Config, changed_keys, load_config, save_config
from trapo.errors import TrapoError
from trapo.files import write_atomic, write_json

# Keys that may differ between an interrupted run and its continuation: they do not change what was computed so far.
FREE_KEYS = ("run_dir", "checkpoint.", "eval.every", "reward.workers", "reward.timeout", "train.threads")


class RunDir:
    """Paths of a run and its append-only metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}.json"

    def open(self, config: Config, *, restart_finished: bool = False) -> Checkpoint | None:
        """Make the folder ready and return the checkpoint to continue from, None to start at step 0.

        Raises TrapoError when the folder holds a finished run (unless restart_finished, which deletes it) or a run
        with another configuration.
        """
        if self.summary.exists():
            if not restart_finished:
                raise TrapoError(
                    f"run_dir: {self.path} holds a finished run; choose another run_dir or pass --if-finished restart"
                )
            shutil.rmtree(self.path)
        stored = self.path / "config.yaml"
        if stored.exists():
            self._refuse_other_config(load_config(stored), config)
        elif self.path.exists() and any(self.path.iterdir()):
            raise TrapoError(f"run_dir: {self.path} is not empty and holds no run (no config.yaml)")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(self.checkpoints)
        save_config(config, stored)
        found = checkpoint.find(self.checkpoints)
        self._drop_metrics_after(found[-1].step if found else 0)
        return found[-1] if found else None

    def log(self, row: dict[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows of metrics.jsonl."""
        return read_rows(self.metrics)

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)

    def _refuse_other_config(self, old: Config, new: Config) -> None:
        changed = [key for key in changed_keys(old, new) if not key.startswith(FREE_KEYS)]
        if changed:
            raise TrapoError(
                f"run_dir: {self.path} holds an unfinished run with other settings ({', '.join(changed)}); "
                "repeat its command to continue it, or choose another run_dir"
            )

    def _drop_metrics_after(self, step: int) -> None:
        """Steps after the checkpoint will be run, and logged, again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, without a last line that a kill cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
