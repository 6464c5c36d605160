"""This file has the modes that learn a teacher's distributions instead of rewards."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import trapo_kernels as tk
from trapo.distillation.how import COLUMNS, CURRENT, INITIAL, Distillation
from trapo.distillation.tutor import Afterwards
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER
from trapo.modes.building import group_size, make_phase, replace_groups
from trapo.modes.phase import Phase
from trapo.modes.registry import has_no_sft_steps, mode

if TYPE_CHECKING:
    from trapo.config import Config


def _check(config: Config) -> None:
    """Raises TrapoError for keys of a teacher that do not go together."""
    has_no_sft_steps(config)
    given, teacher = config.distill, config.distill.teacher
    itself = config.mode == "self_distill"
    if itself and teacher not in (None, CURRENT, INITIAL):
        raise TrapoError(f"distill.teacher: mode self_distill takes current or initial; got {teacher!r}")
    if not itself and teacher in (None, CURRENT, INITIAL):
        raise TrapoError(
            "distill.teacher: mode distill needs a model's path, http://host:port of a server, or columns; got "
            f"{'null' if teacher is None else teacher}"
        )
    how = _how(config, CURRENT)
    for name, read, by in (
        ("tail", how.top, "a server or columns as distill.teacher"),
        ("top_k", how.served, "a server as distill.teacher"),
        ("dtype", how.weights is not None or teacher == INITIAL, "a teacher with weights of its own"),
        ("template", itself, "mode self_distill"),
        ("beta", how.kind in ("jsd", "mixed"), "distill.kind=jsd or mixed"),
    ):
        if getattr(given, name) is not None and not read:
            raise TrapoError(f"distill.{name}: only {by} reads it; got {getattr(given, name)}")
    if config.optim.expert.lr is not None:
        raise TrapoError(f"optim.expert.lr: mode {config.mode} has one optimizer; got {config.optim.expert.lr}")


def _how(config: Config, teacher: str) -> Distillation:
    """Returns the group `distill` with the mode's choices in place of null. teacher: the mode's."""
    kind = "jsd" if config.mode == "self_distill" else "reverse_kl"
    given = {name: value for name, value in vars(config.distill).items() if value is not None}
    return Distillation(**{"teacher": teacher, "kind": kind, **given})


def _rollouts(config: Config) -> int:
    """Returns the rollouts of a prompt: one, where neither a key nor a policy term wants more."""
    guidance, policy = config.guidance, (config.objective.policy or "none").lower()
    if (guidance.sizes is None) == (guidance.group_size is None) and (guidance.sizes is not None or policy != "none"):
        return group_size(config)  # which refuses both
    return sum(guidance.sizes or [guidance.group_size or 1])


def _phase(config: Config, how: Distillation) -> Phase:
    nothing = functools.partial(tk.Objective, expert=None, policy=None)
    size, off_policy = _rollouts(config), how.teacher == COLUMNS
    # One micro-group, whatever micro-groups a preset has.
    one = dataclasses.replace(config.guidance, group_size=None, sizes=None, ratios=None, thresholds=None)
    drawn = replace_groups(
        dataclasses.replace(config, guidance=one), [(1, 1.0, ALWAYS) if off_policy else (size, 0.0, NEVER)]
    )
    phase = make_phase(config, config.mode, drawn, nothing, std=True)
    if phase.objective.has_policy_term and size == 1:
        raise TrapoError(
            f"objective.policy: got {config.objective.policy}; it compares rollouts, of which there is one"
        )
    # Without a term on them prefixes would be context: here the divergence is on them.
    schedule = dataclasses.replace(phase.schedule, supervise="every") if off_policy else phase.schedule
    return dataclasses.replace(phase, schedule=schedule, distills=how, memory=Afterwards(how.check_every))


@mode("A teacher's distributions are learnt, on the model's own rollouts, or on traces with its top-k.", _check,
      distills=True)  # fmt: skip
def distill(config: Config) -> list[Phase]:
    return [_phase(config, _how(config, COLUMNS))]


@mode("The teacher is the model itself with the expert trace in its context; rollouts are the model's without it.",
      _check, distills=True)  # fmt: skip
def self_distill(config: Config) -> list[Phase]:
    return [_phase(config, _how(config, CURRENT))]
