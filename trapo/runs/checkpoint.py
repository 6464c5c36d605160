"""A checkpoint is a folder that transformers can load, with the trainer's own state beside the weights.

All randomness of a run is derived from (seed, step), so weights, optimizer, scheduler and the step number are the
whole state: a resumed run continues bit for bit. A manifest in each folder tells a sound checkpoint from a damaged one,
its record (see history.py) which run it is of and what the run's logs held when it was saved.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trapo.errors import TrapoError
from trapo.models.sharding import SHARDS
from trapo.runs.manifest import find_damage, write_manifest
from trapo.tools.files import read_json, remove, temporary, write_folder_atomic, write_json

STATE_FILE = "trainer_state.pt"
RECORD_FILE = "trainer_run.json"
_NAME = re.compile(r"step-(\d{6,})")


class SaveError(TrapoError):
    """Says that a folder could not be written; nothing of it is left, and what was there before still is."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # optimizer steps of the loop that are in it

    @property
    def shards(self) -> Path | None:
        """Returns the optimizer state of a sharded run; None where it is in `load_state`."""
        return self.path / SHARDS if (self.path / SHARDS).is_dir() else None

    def load_state(self) -> dict[str, Any]:
        """Returns what `save` was given as state."""
        return torch.load(self.path / STATE_FILE, map_location="cpu", weights_only=True)

    def record(self) -> dict[str, Any]:
        """Returns what `save` was given as record; {} for a checkpoint without one."""
        try:
            found = read_json(self.path / RECORD_FILE)
        except (OSError, TrapoError):
            return {}
        return found if isinstance(found, dict) else {}


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    shards: Path | None = None,
    record: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write `folder/step-NNNNNN` atomically. Raises SaveError when it cannot be written: a full disk, for instance.

    write: writes the model into a folder. shards: what `sharding.save_shards` wrote; it is moved in.
    """

    def fill(path: Path) -> None:
        write(path)
        if shards is not None:
            shards.rename(path / SHARDS)
        torch.save(state, path / STATE_FILE)
        write_json(path / RECORD_FILE, dict(record or {}))
        write_manifest(path)

    checkpoint = Checkpoint(folder / f"step-{step:06d}", step)
    write_or_explain(checkpoint.path, fill)
    return checkpoint


def write_or_explain(path: Path, fill: Callable[[Path], None]) -> None:
    """Does what `write_folder_atomic` does, with its failures as SaveError."""

    def explained(folder: Path) -> None:
        try:
            fill(folder)
        except Exception as error:  # here what fills the disk is still on it
            if not is_write_error(error):
                raise
            raise SaveError(f"{path} could not be written: {reason(error, folder)}") from error

    try:
        write_folder_atomic(path, explained)
    except OSError as error:
        raise SaveError(f"{path} could not be written: {reason(error, path.parent)}") from error


def is_write_error(error: Exception) -> bool:
    """Returns whether a library may have raised it because a file could not be written: torch.save's are RuntimeErrors,
    those of tokenizers plain Exceptions."""
    return isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception


def reason(error: Exception, folder: Path) -> str:
    """Returns why a write failed, in a few words. torch.save says "unexpected pos" of a full disk."""
    try:
        if shutil.disk_usage(folder).free < 2**20:
            return "no space left on the disk"
    except OSError:
        pass  # the disk is gone; the error says more
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]


def find(folder: Path) -> list[Checkpoint]:
    """Returns all checkpoints that have their name, oldest first; some may be damaged."""
    named = [(p, _NAME.fullmatch(p.name)) for p in folder.glob("step-*") if p.is_dir()]
    return sorted((Checkpoint(p, int(m[1])) for p, m in named if m), key=lambda c: c.step)


def newest_sound(
    folder: Path, log: Callable[[str], None], stranger: Callable[[Checkpoint], str | None] = lambda _: None
) -> Checkpoint | None:
    """Returns the newest checkpoint that is whole and the run's; every newer one is reported in a line. None when there
    is no checkpoint.

    stranger: why a whole checkpoint is not the run's, None for one that is.
    Raises TrapoError when there are some and none can be used: starting anew would be a loss that nobody asked for.
    """
    found = find(folder)
    why = "damaged"
    for checkpoint in reversed(found):
        damage = find_damage(checkpoint.path)
        if damage is not None:
            log(f"checkpoint {checkpoint.path} is damaged ({damage}) and not used")
            continue
        reason = stranger(checkpoint)
        if reason is None:
            return checkpoint
        log(f"checkpoint {checkpoint.path} is not of this run ({reason}) and not used")
        why = "damaged or of another run"
    if found:
        raise TrapoError(
            f"run_dir: every checkpoint in {folder} is {why}; delete that folder to start the run from step 0"
        )
    return None


def prune(folder: Path, keep: int, also: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `also`."""
    for old in find(folder)[:-keep]:
        if old.step not in also:
            discard(old)


def discard(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint. It loses its name first: a kill must not leave half of it under that name."""
    doomed = temporary(checkpoint.path)
    remove(doomed)
    checkpoint.path.rename(doomed)
    remove(doomed)


def set_aside(checkpoint: Checkpoint) -> Path:
    """Take a checkpoint that is not the run's out of the way: it may be somebody's only copy."""
    number, aside = 0, checkpoint.path.with_name(f"not-used-{checkpoint.path.name}")
    while aside.exists():
        number += 1
        aside = checkpoint.path.with_name(f"not-used-{checkpoint.path.name}-{number}")
    checkpoint.path.rename(aside)
    return aside
