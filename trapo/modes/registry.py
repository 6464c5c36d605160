"""This file has the table of modes: the line above a function puts it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from trapo.errors import TrapoError
from trapo.modes.drawing import check_ahead
from trapo.modes.phase import Phase

if TYPE_CHECKING:
    from trapo.config import Config


@dataclasses.dataclass(frozen=True)
class Mode:
    """Is a way to train: what it does, in one sentence, and what makes a configuration's phases of it."""

    name: str
    doc: str
    phases: Callable[[Config], list[Phase]]
    check: Callable[[Config], None]  # raises TrapoError, in one line, for keys that do not go with the mode
    keys: tuple[str, ...] = ()  # of the group `hybrid`, that it reads
    distills: bool = False  # it reads the group `distill`


MODES: dict[str, Mode] = {}
Phases = TypeVar("Phases", bound=Callable[..., "list[Phase]"])


def phases(config: Config, ranks: int = 1) -> list[Phase]:
    """Returns the phases of a run, in order; their steps add up to train.steps. Raises TrapoError for a mode that so
    many ranks cannot run: one that makes its own updates combines gradients that are not sharded."""
    made = MODES[config.mode].phases(config)
    check_ahead(config, made)
    if ranks > 1 and any(phase.learns is not None for phase in made):
        raise TrapoError(f"mode: {config.mode} is for one process; got {ranks} ranks")
    return made


def check_mode(config: Config) -> None:
    """Raises TrapoError, in one line, for keys that do not go with the mode."""
    MODES[config.mode].check(config)
    for name, value in vars(config.hybrid).items():
        if value is not None and name not in MODES[config.mode].keys:
            readers = ", ".join(mode.name for mode in MODES.values() if name in mode.keys)
            raise TrapoError(f"hybrid.{name}: only {readers} reads it; got mode {config.mode}")
    given = [name for name, value in vars(config.distill).items() if value is not None]
    if given and not MODES[config.mode].distills:
        readers = " and ".join(mode.name for mode in MODES.values() if mode.distills)
        raise TrapoError(f"distill.{given[0]}: only {readers} read it; got mode {config.mode}")
    if config.guidance.instruction is not None and config.mode != "prefix_rl":
        raise TrapoError(f"guidance.instruction: only mode prefix_rl puts prefixes into prompts; got {config.mode}")
    if config.guidance.find is not None and config.mode != "prefix_rl":
        raise TrapoError(f"guidance.find: only mode prefix_rl looks for prefixes; got mode {config.mode}")


def has_no_sft_steps(config: Config) -> None:
    """Raises TrapoError for keys of an SFT phase in a mode without one."""
    given = {"train.sft_steps": config.train.sft_steps, **{f"sft.{k}": v for k, v in vars(config.sft).items()}}
    for name, value in given.items():
        if value is not None:
            raise TrapoError(f"{name}: only mode sft_then_rl has SFT steps; got mode {config.mode}")


def mode(
    doc: str,
    check: Callable[[Config], None] = has_no_sft_steps,
    keys: tuple[str, ...] = (),
    *,
    distills: bool = False,
) -> Callable[[Phases], Phases]:
    """Puts the function below it into MODES, under its name. keys: of the group `hybrid`, that it reads. distills: it
    reads the group `distill`."""

    def register(function: Phases) -> Phases:
        MODES[function.__name__] = Mode(function.__name__, doc, function, check, keys, distills)
        return function

    return register
