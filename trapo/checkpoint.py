"""Checkpoints: a folder that transformers can load, with the trainer's own state beside the weights.

All randomness of a run is derived from (seed, step), so weights, optimizer, scheduler and the step number are the
whole state: a resumed run continues bit for bit. A manifest in each folder tells a sound checkpoint from a damaged one.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trapo.errors import TrapoError
from trapo.files import write_folder_atomic
from trapo.manifest import find_damage, write_manifest
from trapo.sharding import SHARDS

STATE_FILE = "trainer_state.pt"
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch.save's are RuntimeErrors
_NAME = re.compile(r"step-(\d{6,})")


class SaveError(TrapoError):
    """A folder could not be written; nothing of it is left, and what was there before still is."""


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
    folder: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], shards: Path | None = None
) -> Checkpoint:
    """Write `folder/step-NNNNNN` atomically. Raises SaveError when it cannot be written: a full disk, for instance.

    write: writes the model into a folder. shards: what `sharding.save_shards` wrote; it is moved in.
    """

    def fill(path: Path) -> None:
        write(path)
        if shards is not None:
            shards.rename(path / SHARDS)
        torch.save(state, path / STATE_FILE)
        write_manifest(path)

    checkpoint = Checkpoint(folder / f"step-{step:06d}", step)
    write_or_explain(checkpoint.path, fill)
    return checkpoint


def write_or_explain(path: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder_atomic`, its failures as SaveError."""

    def explained(folder: Path) -> None:
        try:
            fill(folder)
        except _WRITE_ERRORS as error:  # here what fills the disk is still on it
            raise SaveError(f"{path} could not be written: {_reason(error, folder)}") from error

    try:
        write_folder_atomic(path, explained)
    except OSError as error:
        raise SaveError(f"{path} could not be written: {_reason(error, path.parent)}") from error


def _reason(error: Exception, folder: Path) -> str:
    """In a few words. torch.save says "unexpected pos" of a full disk."""
    if shutil.disk_usage(folder).free < 2**20:
        return "no space left on the disk"
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def find(folder: Path) -> list[Checkpoint]:
    """All checkpoints that have their name, oldest first; some may be damaged."""
    named = [(p, _NAME.fullmatch(p.name)) for p in folder.glob("step-*")]
    return sorted((Checkpoint(p, int(m[1])) for p, m in named if m), key=lambda c: c.step)


def newest_sound(folder: Path, log: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; every newer one is reported in a line. None when there is no checkpoint.

    Raises TrapoError when there are some and all are damaged: starting anew would be a loss that nobody asked for.
    """
    found = find(folder)
    for checkpoint in reversed(found):
        damage = find_damage(checkpoint.path)
        if damage is None:
            return checkpoint
        log(f"checkpoint {checkpoint.path} is damaged ({damage}) and not used")
    if found:
        raise TrapoError(
            f"run_dir: every checkpoint in {folder} is damaged; delete that folder to start the run from step 0"
        )
    return None


def prune(folder: Path, keep: int, also: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `also`."""
    for old in find(folder)[:-keep]:
        if old.step not in also:
            remove(old)


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. It loses its name first: a kill must not leave half of it under that name."""
    doomed = checkpoint.path.with_name(f".tmp-{checkpoint.path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.path.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed save or removal left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)
