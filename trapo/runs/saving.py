"""This file says what a run saves of its model: checkpoints while it goes on, the final model at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.learner import Learner
from trapo.models.finite import refuse_not_finite
from trapo.models.sharding import HALF_SHARDS, save_shards
from trapo.models.weights import Writer, writer
from trapo.runs import checkpoint
from trapo.runs.manifest import write_manifest
from trapo.runs.ranks import Ranks, lost_rank
from trapo.runs.run_dir import RunDir
from trapo.settings.groups import CheckpointConfig
from trapo.tools.files import remove

Note = Callable[[str], None]
T = TypeVar("T")
_SCRATCH = ".tmp-weights"  # of a sharded model, until its folder is made


class Saver:
    """Writes a run's checkpoints and its final model. With several ranks all of them call the same methods.

    tree: the run's configuration, which each checkpoint records. step: of the newest checkpoint, 0 where there is none.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tree: dict[str, Any],
        run_dir: RunDir,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        learner: Learner,
        ranks: Ranks,
        step: int = 0,
    ) -> None:
        self.config, self.tree, self.run_dir, self.ranks, self.step = config, tree, run_dir, ranks, step
        self.model, self.tokenizer, self.learner = model, tokenizer, learner

    def is_due(self, step: int, steps: int, evaluations: int) -> bool:
        """Returns whether a checkpoint is written after this step of `steps`: at checkpoint.every, at the end, and, to
        keep the best, wherever an evaluation (one every so many steps; 0: none) may find the best weights so far."""
        last = step == steps

        def at(every: int) -> bool:
            return every > 0 and step % every == 0

        if self.config.keep_best and (last or at(evaluations)):
            return True
        return self.config.every > 0 and (last or at(self.config.every))

    def save(
        self, step: int, seconds: float, note: Note, *, must: bool = False, more: Mapping[str, Any] | None = None
    ) -> None:
        """Write a checkpoint of now. One that cannot be written is reported and training goes on (unless it `must`)."""
        refuse_not_finite(self.model, self.ranks, step, self.step)
        state = {"learner": self.learner.state_dict(), "seconds": seconds, **(more or {})}
        folder = self.run_dir.checkpoints

        def save(write: Writer, shards: Path | None) -> None:
            checkpoint.save(folder, step, write, state, shards, self.run_dir.record(self.tree, step))

        try:
            write = self._writer(folder, final=False)
            shards = self._together(
                folder, lambda: save_shards(folder, self.model, self.learner.optimizers(), self.ranks)
            )
            self.ranks.once(lambda: save(write, shards))
        except checkpoint.SaveError as error:
            self._tidy(folder)
            if must:
                raise
            kept = f"step {self.step}" if self.step else "none yet"
            note(f"no checkpoint after step {step}: {error}; training goes on, last checkpoint: {kept}")
            return
        self.step = step
        self.prune(note)

    def _writer(self, folder: Path, *, final: bool) -> Writer:
        """Returns what writes the model; its weights may lie in a scratch file in the folder until then."""
        scratch = folder / _SCRATCH if self.ranks.first else None
        return self._together(folder, lambda: writer(self.model, self.tokenizer, final=final, scratch=scratch))

    def _together(self, folder: Path, write: Callable[[], T]) -> T:
        """Returns what write() gives, which all ranks call. Raises SaveError on all of them when it could not be
        written on one."""
        failed: list[str] = []
        try:
            found = write()
        except Exception as error:
            if not checkpoint.is_write_error(error) or lost_rank(self.ranks, RuntimeError(str(error))):
                raise
            failed.append(checkpoint.reason(error, folder))
        if failed := self.ranks.gather(failed):
            raise checkpoint.SaveError(f"{folder} could not be written: {failed[0]}")
        return found

    def _tidy(self, folder: Path) -> None:
        """Removes what waited for a save that failed: its space may be what the disk lacks."""
        if self.ranks.first:
            for name in (_SCRATCH, HALF_SHARDS):
                with contextlib.suppress(OSError):
                    remove(folder / name)

    def prune(self, note: Note) -> None:
        """Remove the checkpoints that are neither among the newest nor among the best."""
        if self.ranks.first:
            try:
                best = self.run_dir.best_steps(self.config.keep_best)
                checkpoint.prune(self.run_dir.checkpoints, self.config.keep, also=best)
            except OSError as error:
                note(f"an old checkpoint could not be removed: {error.strerror}; training goes on")

    def write_final(self, step: int) -> None:
        """Write the final model, in the first rank."""
        refuse_not_finite(self.model, self.ranks, step, self.step)
        final = self.run_dir.final
        try:
            write = self._writer(self.run_dir.path, final=True)
            self.ranks.once(lambda: checkpoint.write_or_explain(final, lambda path: _with_manifest(path, write)))
        except checkpoint.SaveError:
            self._tidy(self.run_dir.path)
            raise


def _with_manifest(path: Path, write: Writer) -> None:
    """Write the final model so that damage to it is seen when it is loaded; an adapter in it can be taken alone."""
    write(path)
    for folder in (path / "adapter", path):
        if folder.is_dir():
            write_manifest(folder)
