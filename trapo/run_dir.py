"""A run's folder: configuration, metrics, evaluations, checkpoints, summary; and where an interrupted run goes on.

config.yaml          what the run really used          metrics.jsonl   a row a step
rollouts.jsonl       sample rollouts of some steps     tensorboard/, wandb/   where asked for
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
FREE_KEYS = ("run_dir", "checkpoint.", "eval.every", "reward.workers", "reward.timeout", "log.")
# What `trapo eval` leaves in a folder that a run may still start in.
_NOT_A_RUN = ("eval.json", "eval.jsonl", "checkpoints")


class RunDir:
    """Paths of a run and its append-only metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.summary = path / "summary.json"

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}.json"

    def evaluations(self) -> dict[int, Path]:
        """Evaluations that were made, by step."""
        return {int(p.stem.removeprefix("step-")): p for p in sorted((self.path / "eval").glob("step-*.json"))}

    def look(self, config: Config, *, restart_finished: bool = False) -> Checkpoint | None:
        """The checkpoint that a run of this configuration continues from, None to start at step 0. Changes nothing.

        Raises TrapoError when the folder holds a finished run (unless restart_finished), a run with another
        configuration, or something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise TrapoError(f"run_dir: {self.path} is a file; give a folder")
        if not self.config.exists():
            entries = self.path.iterdir() if self.path.exists() else []
            others = [p.name for p in entries if p.name not in _NOT_A_RUN and not p.name.startswith(".tmp-")]
            if others:
                raise TrapoError(f"run_dir: {self.path} holds {others[0]} and no run (no config.yaml); choose another")
            return None
        if self.summary.exists():
            if not restart_finished:
                raise TrapoError(
                    f"run_dir: {self.path} holds a finished run; choose another run_dir or pass --if-finished restart"
                )
            return None
        found = checkpoint.find(self.checkpoints)
        if found or self.rows() or self.evaluations():
            self._refuse_other_config(load_config(self.config), config)
        return found[-1] if found else None

    def claim(self, config: Config, resume_from: Checkpoint | None) -> None:
        """Make the folder ready for the run that `look` found possible: what came after the checkpoint goes."""
        if self.summary.exists():
            trash = self.path.with_name(f".tmp-old-{self.path.name}")
            shutil.rmtree(trash, ignore_errors=True)
            self.path.rename(trash)  # at once, so that a kill cannot leave half a run
            shutil.rmtree(trash)
        if not self.config.exists() or load_config(self.config) != config:
            save_config(config, self.config)
        self.checkpoints.mkdir(exist_ok=True)
        checkpoint.remove_unfinished(self.checkpoints)
        step = resume_from.step if resume_from else 0
        for evaluated, path in self.evaluations().items():
            if evaluated > step:  # of weights that will be computed again
                path.unlink()
        for log in (p for p in (self.metrics, self.rollouts) if p.exists()):
            kept = [row for row in read_rows(log) if row["step"] <= step]
            write_atomic(log, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, row: dict[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        append_rows(self.metrics, [row])

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


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines in one write, and make them durable."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, without a last line that a kill cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
