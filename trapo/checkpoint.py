"""Checkpoints: a folder that transformers can load, with the trainer's own state beside the weights.

All randomness of a run is derived from (seed, step), so weights, optimizer, scheduler and the step number are the
whole state: a resumed run continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.files import write_folder_atomic
from trapo.sharding import SHARDS

STATE_FILE = "trainer_state.pt"
_NAME = re.compile(r"step-(\d{6,})")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # optimizer steps of the loop that are in it

    @property
    def shards(self) -> Path | None:
        """Optimizer state of a sharded run; None where it is in `load_state`."""
        return self.path / SHARDS if (self.path / SHARDS).is_dir() else None

    def load_state(self) -> dict[str, Any]:
        """What `save` was given as state."""
        return torch.load(self.path / STATE_FILE, map_location="cpu", weights_only=True)


def save(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int,
    write: Callable[[Path], None] | None = None,
    shards: Path | None = None,
) -> Checkpoint:
    """Write `folder/step-NNNNNN` atomically, then remove all but the newest `keep`.

    write: in place of `write_model`. shards: what `sharding.save_shards` wrote; it is moved in.
    """

    def fill(path: Path) -> None:
        write(path) if write else write_model(path, model, tokenizer)
        if shards is not None:
            shards.rename(path / SHARDS)
        torch.save(state, path / STATE_FILE)

    checkpoint = Checkpoint(folder / f"step-{step:06d}", step)
    write_folder_atomic(checkpoint.path, fill)
    for old in find(folder)[:-keep]:
        shutil.rmtree(old.path)
    return checkpoint


def write_model(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Weights, configuration and tokenizer in transformers' layout."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def find(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first."""
    named = [(p, _NAME.fullmatch(p.name)) for p in folder.glob("step-*")]
    return sorted((Checkpoint(p, int(m[1])) for p, m in named if m), key=lambda c: c.step)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path)
