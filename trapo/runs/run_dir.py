"""A run's folder holds configuration, metrics, evaluations, checkpoints and summary; this file knows where an
interrupted run goes on.

config.yaml          what the run really used          metrics.jsonl   a row a step
rollouts.jsonl       sample rollouts of some steps     tensorboard/, wandb/   where asked for
inputs.json          SHA-256 of data and reward code   .lock           held while a process works here
eval/step-N.json     an evaluation; .jsonl: its responses
checkpoints/step-N   resumable, loadable by transformers
final/               the trained model                 summary.json    written last: the run is finished
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trapo.config import changed_keys, load_tree
from trapo.errors import TrapoError
from trapo.runs import checkpoint, history, run_lock
from trapo.runs.checkpoint import Checkpoint
from trapo.runs.history import read_rows
from trapo.runs.inputs import Inputs, changed_inputs, refuse_changed
from trapo.settings.text import Tree, to_yaml
from trapo.tools.files import append_line, check_writable, read_json, remove, write_atomic, write_json

# Keys that may differ between an interrupted run and its continuation: they do not change what was computed so far.
FREE_KEYS = (
    "run_dir",
    "checkpoint.",
    "eval.every",
    "reward.workers",
    "reward.timeout",
    "train.max_skipped_steps",
    "train.threads",
    "log.",
    "rollout.server_url",
)
STEPS = "train.steps"  # may grow
# What `trapo eval` leaves in a folder that a run may still start in.
_NOT_A_RUN = ("eval.json", "eval.jsonl", "benchmarks", "benchmarks.json", "checkpoints", run_lock.NAME)
# What belongs to a run, in the order in which a restart may take it away: a kill in between leaves a finished run that
# can be restarted, and no checkpoint that could be continued.
_PARTS = (
    *("checkpoints", "final", "eval", "metrics.jsonl", "rollouts.jsonl", "tensorboard", "wandb", "wandb_id"),
    *("report.html", "report.png", "report.json", "inputs.json", "summary.json"),
)
_TRASH = ".tmp-old-run"
_IN_USE = ".tmp-server-weights"  # what a vLLM server reads (engines/make.py)
_EVALUATION = re.compile(r"step-(\d{6,})\.json")
Log = Callable[[str], None]


def quiet(_: str) -> None:
    """Is a log that nobody reads."""


class RunDir:
    """Knows the paths of a run and its append-only metrics. `settings` is the run's configuration as nested dicts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts.jsonl"
        self.inputs_file = path / "inputs.json"
        self.summary = path / "summary.json"
        self.inputs: Inputs | None = None  # of the run that was claimed
        self._seen: Any = None

    def evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}.json"

    def evaluations(self) -> dict[int, Path]:
        """Returns the evaluations that were made, by step."""
        named = [(p, _EVALUATION.fullmatch(p.name)) for p in sorted((self.path / "eval").glob("step-*.json"))]
        return {int(m[1]): p for p, m in named if m}

    def trace_nlls(self, last: int) -> dict[int, float]:
        """Returns the negative log-likelihood of held-out traces in each evaluation up to step `last` that has it, by
        step."""
        found = {step: read_json(path).get("trace_nll") for step, path in self.evaluations().items() if step <= last}
        return {step: nll for step, nll in found.items() if nll is not None}

    def best_steps(self, count: int) -> list[int]:
        """Returns the steps of the `count` best evaluations of trained weights, the best first;
        of equal ones the later."""
        accuracy = {step: read_json(path)["accuracy"] for step, path in self.evaluations().items() if step}
        return sorted(accuracy, key=lambda step: (accuracy[step], step), reverse=True)[:count]

    def look(self, settings: Tree, *, restart_finished: bool = False, log: Log = print) -> Checkpoint | None:
        """Returns the checkpoint that a run of this configuration continues from, None to start at step 0. Changes
        nothing.

        Damaged checkpoints are told to `log` and passed over. Raises TrapoError when the folder is in use or cannot be
        written, holds a finished run of as many steps (unless restart_finished), a run with another configuration,
        something else, or no checkpoint but useless ones.
        """
        refuse_unwritable(self.path)
        run_lock.refuse_busy(self.path)
        self._seen = self._state()
        if not self.config.exists():
            entries = self.path.iterdir() if self.path.exists() else []
            others = [p.name for p in entries if p.name not in _NOT_A_RUN and not p.name.startswith(".tmp-")]
            if others:
                raise TrapoError(f"run_dir: {self.path} holds {others[0]} and no run (no config.yaml); choose another")
            return None
        finished = self._finished_steps()
        if finished is not None and restart_finished:
            return None
        if finished is not None or self.has_results():
            self._compare(settings, finished, log)
        self.inputs = Inputs.load(self.inputs_file)
        found = checkpoint.newest_sound(self.checkpoints, log, lambda c: self._stranger(c, settings))
        if finished is not None and found is None:
            raise TrapoError(
                f"run_dir: {self.path} holds a finished run without checkpoints, which cannot go on to train.steps="
                f"{settings['train']['steps']}; choose another run_dir or pass --if-finished restart"
            )
        if self.inputs is None and found is not None:
            record = found.record()
            self.inputs = Inputs(record["run"], record["inputs"])
            log(f"{self.inputs_file} was lost or damaged; it is that of the checkpoint now")
        return found

    def claim(
        self, settings: Tree, resume_from: Checkpoint | None, files: dict[str, str] | None = None, log: Log = quiet
    ) -> None:
        """Make the folder ready for the run that `look` found possible: what came after the checkpoint goes, logs that
        are damaged are put right. files: `inputs.fingerprints` of now."""
        if self._seen is not None and self._seen != self._state():
            raise TrapoError(f"run_dir: {self.path} was changed by another process meanwhile; repeat the command")
        if self.summary.exists() and resume_from is None:
            self._delete_run(log)
        if self._saved_settings() != settings:
            write_atomic(self.config, to_yaml(settings))
        self.summary.unlink(missing_ok=True)  # of a run that is lengthened
        if resume_from is None or self.inputs is None:
            self.inputs = Inputs.new(files or {})
        else:
            self.inputs = Inputs(self.inputs.run, self.inputs.files | (files or {}))
        self.inputs.save(self.inputs_file)
        self.checkpoints.mkdir(exist_ok=True)
        self._remove_leftovers()
        step = resume_from.step if resume_from else 0
        for other in checkpoint.find(self.checkpoints):
            if other.step > step:
                self._put_away(other, settings, log)
        self._restore_logs(resume_from, step, log)
        self._seen = None

    def check_inputs(self, now: Mapping[str, str], *, accept_changed: bool, log: Log) -> None:
        """Hold the files that the run reads against those that it began with.

        Raises TrapoError where it would go on with others that nobody accepted.
        """
        if self.inputs is None or not self.has_results():
            return
        if not accept_changed:
            refuse_changed(self.inputs.files, now, self.path)
        if changed := changed_inputs(self.inputs.files, now):
            log(f"{', '.join(changed)}: the contents have changed since the run began; it goes on with the new ones")

    def has_results(self) -> bool:
        """Returns whether something was computed here already."""
        rows, damaged = history.read_what_can_be(self.metrics)
        return bool(checkpoint.find(self.checkpoints) or rows or damaged or self.evaluations())

    def record(self, settings: Tree, step: int) -> dict[str, Any]:
        """Returns what a checkpoint after `step` should know of the run."""
        assert self.inputs is not None  # claimed
        return {
            "run": self.inputs.run,
            "inputs": self.inputs.files,
            "config": history.config_digest(settings, (*FREE_KEYS, STEPS)),
            "step": step,
            "steps": settings["train"]["steps"],
            "metrics": self.rows(),
            "rollouts": history.rollouts_mark(self.rollouts),
            "evaluations": {str(s): read_json(path) for s, path in self.evaluations().items()},
        }

    def log(self, row: dict[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        append_rows(self.metrics, [row])

    def rows(self) -> list[dict[str, Any]]:
        """Returns all complete rows of metrics.jsonl."""
        return read_rows(self.metrics)

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)

    def _state(self) -> Any:
        config = self.config.read_bytes() if self.config.exists() else None
        return self.summary.exists(), [c.step for c in checkpoint.find(self.checkpoints)], config

    def _saved_settings(self) -> Tree | None:
        """Returns the settings that the folder holds; None where there is none or it cannot be read."""
        try:
            return load_tree(self.config) if self.config.exists() else None
        except TrapoError:
            return None

    def _finished_steps(self) -> int | None:
        if not self.summary.exists():
            return None
        steps = read_json(self.summary).get("steps")
        if not isinstance(steps, int):
            raise TrapoError(f"{self.summary}: damaged: it has no steps")
        return steps

    def _compare(self, settings: Tree, finished: int | None, log: Log) -> None:
        """Raises TrapoError for settings with which the run here cannot go on."""
        steps, schedule = settings["train"]["steps"], settings["optim"]["schedule"]
        if finished is not None and steps == finished:
            raise TrapoError(
                f"run_dir: {self.path} holds a finished run; choose another run_dir, give it more train.steps or pass "
                "--if-finished restart"
            )
        old = self._saved_settings()
        if old is None:
            if not checkpoint.find(self.checkpoints):
                load_tree(self.config)  # raises
            log(f"{self.config} is damaged; the checkpoints say whether the settings are the same")
            return
        changed = [k for k in changed_keys(old, settings) if not k.startswith(FREE_KEYS) and k != STEPS]
        if changed:
            kind = "an unfinished" if finished is None else "a finished"
            raise TrapoError(
                f"run_dir: {self.path} holds {kind} run with other settings ({', '.join(changed)}); "
                "repeat its command to continue it, or choose another run_dir"
            )
        before = old["train"]["steps"] if finished is None else finished
        if steps < before:
            raise TrapoError(
                f"train.steps: got {steps}; {self.path} holds a run of {before} steps, which can be "
                "lengthened and not shortened"
            )
        if steps > before:
            decay = f"optim.schedule={schedule} is from now on that of {steps} steps"
            log(
                f"train.steps: {before} before, now {steps}; the run goes on"
                + ("" if schedule == "constant" else f", and {decay}: the learning rate may jump")
            )
        threads, now = old["train"]["threads"], settings["train"]["threads"]
        if threads != now:
            log(
                f"train.threads: {threads} before, now {now}; sums are added up in another "
                "order, so last bits may differ"
            )

    def _stranger(self, found: Checkpoint, settings: Tree) -> str | None:
        """Returns why a whole checkpoint is not one of this run with this configuration."""
        record = found.record()
        if missing := [key for key in ("run", "config", "step", "metrics", "rollouts") if key not in record]:
            return f"{checkpoint.RECORD_FILE} does not say its {missing[0]}"
        if record["step"] != found.step:
            return f"it was saved after step {record['step']}"
        if self.inputs is not None and record["run"] != self.inputs.run:
            return f"but of run {record['run']}"
        if record["config"] != history.config_digest(settings, (*FREE_KEYS, STEPS)):
            return "its settings were others"
        if found.step > settings["train"]["steps"]:
            return f"train.steps is {settings['train']['steps']}"
        return None

    def _put_away(self, other: Checkpoint, settings: Tree, log: Log) -> None:
        """Puts away a checkpoint after the one that is continued: what will be computed again goes, a stranger is
        kept."""
        if other.record() and self._stranger(other, settings) is not None:
            log(f"checkpoint {other.path} is kept as {checkpoint.set_aside(other).name}")
        else:
            checkpoint.discard(other)

    def _restore_logs(self, resume_from: Checkpoint | None, step: int, log: Log) -> None:
        record = resume_from.record() if resume_from else {}
        rows = record.get("metrics", [])
        if resume_from is None and (lost := len(history.read_what_can_be(self.metrics)[0])):
            log(f"{self.path} holds no checkpoint: its {lost} steps are computed again")
        history.restore_metrics(self.metrics, rows, step, log)
        empty = {"bytes": 0, "sha256": history.EMPTY}
        history.restore_rollouts(self.rollouts, record.get("rollouts", empty), step, log)
        history.restore_evaluations(self, record.get("evaluations", {}), step, log)

    def _remove_leftovers(self) -> None:
        """Removes what a killed process left half-written or half-deleted."""
        for folder in (self.path, self.checkpoints, self.path / "eval"):
            for path in folder.glob(".tmp-*"):
                if path.name != _IN_USE:
                    remove(path)

    def _delete_run(self, log: Log) -> None:
        """Take away what is the run's and nothing else: the folder itself may be a link, a mount or the current one."""
        trash = self.path / _TRASH
        try:
            remove(trash)
            trash.mkdir()
            for name in _PARTS:
                if os.path.lexists(self.path / name):
                    (self.path / name).rename(trash / name)
            remove(trash)
        except OSError as error:
            raise TrapoError(f"run_dir: {self.path} cannot be emptied: {error.strerror or error}") from error
        others = [p.name for p in self.path.iterdir() if p.name not in (*_NOT_A_RUN, self.config.name)]
        if others:
            log(f"{self.path} is restarted; it also holds {others[0]}, which no run wrote and which is kept")


def refuse_unwritable(path: Path) -> None:
    """Raises TrapoError when nothing can be written into run_dir, so that it is known before the work is done."""
    try:
        if path.exists() and not path.is_dir():
            raise TrapoError(f"run_dir: {path} is a file; give a folder")
        check_writable(path)
    except OSError as error:
        raise TrapoError(f"run_dir: {path} cannot be written: {error.strerror}") from error


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines, all or none of them, and make them durable."""
    append_line(path, "\n".join(json.dumps(row, allow_nan=False) for row in rows))
