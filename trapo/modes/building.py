"""A configuration becomes a phase here: what a mode asks for, changed by the keys that are set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.guidance import PRESETS, Schedule, schedule, split_group
from trapo.modes.phase import Phase, supervised
from trapo.modes.registry import has_no_sft_steps
from trapo.settings.groups import OptimConfig
from trapo.settings.objective import expert_reads, given_fields, imitates, make_objective, overruled

if TYPE_CHECKING:
    from trapo.config import Config


def guided_schedule(config: Config) -> Schedule:
    """Returns the guidance preset with the fields that the configuration sets."""
    g = config.guidance
    base = PRESETS[g.preset]
    given = {k: getattr(g, k) for k in ("cut", "traces", "trace_part", "supervise") if getattr(g, k) is not None}
    groups = base.micro_groups
    groups = schedule(
        _sizes(config, [m.size for m in groups]),
        [m.ratio for m in groups] if g.ratios is None else g.ratios,
        [m.threshold for m in groups] if g.thresholds is None else g.thresholds,
    ).micro_groups
    return dataclasses.replace(base, micro_groups=groups, stop_decided=g.stop_decided, **given)


def _sizes(config: Config, of_preset: list[int]) -> list[int]:
    """Returns the rollouts of each micro-group. Raises TrapoError where two keys say them, or one says too few."""
    g = config.guidance
    if g.group_size is None:
        return of_preset if g.sizes is None else g.sizes
    if g.sizes is not None:
        raise TrapoError(f"guidance.group_size: got {g.group_size} beside guidance.sizes={g.sizes}; give one of them")
    count = len(of_preset if g.ratios is None else g.ratios)
    if count != len(of_preset):
        raise TrapoError(
            f"guidance.group_size: got {g.group_size} with {count} guidance.ratios; the preset has {len(of_preset)} "
            "micro-groups, so say guidance.sizes"
        )
    return split_group(g.group_size, of_preset)


def replace_groups(config: Config, columns: list[tuple[int, float, float]]) -> Schedule:
    """Returns the configured schedule's rules with other micro-groups: (size, ratio, threshold) each."""
    sizes, ratios, thresholds = zip(*columns, strict=True)
    groups = schedule(sizes, ratios, thresholds).micro_groups
    return dataclasses.replace(guided_schedule(config), micro_groups=groups)


def group_size(config: Config, least: int = 1) -> int:
    """Returns the rollouts of a prompt, whatever micro-groups they are in."""
    size = guided_schedule(config).rollouts_per_prompt
    if size < least:
        raise TrapoError(f"guidance.sizes: mode {config.mode} needs at least {least} rollouts per prompt, got {size}")
    return size


def one_update(config: Config) -> None:
    """Raises TrapoError for a step of several updates, in a mode that compares a step's gradients."""
    has_no_sft_steps(config)
    if (count := config.train.updates_per_step) != 1:
        raise TrapoError(f"train.updates_per_step: mode {config.mode} has one gradient a step; must be 1, got {count}")


def with_expert_optimizer(config: Config) -> OptimConfig:
    """Returns the configured optimizer with one of its own for expert tokens, whose rate is the same where
    optim.expert.lr says none."""
    optim, own = config.optim, config.optim.expert
    if own.lr is None:
        own = dataclasses.replace(own, lr=optim.lr, schedule=optim.schedule)
    return dataclasses.replace(optim, expert=own)


def make_phase(
    config: Config,
    name: str,
    schedule: Schedule,
    preset: Callable[..., tk.Objective],
    of_mode: Mapping[str, object] = MappingProxyType({}),
    *,
    std: bool,
    steps: int | None = None,
    optim: OptimConfig | None = None,
    prompts_per_step: int | None = None,
) -> Phase:
    """Makes a phase with a preset of trapo_kernels, changed by the mode and then by what the configuration sets. optim
    and prompts_per_step: the phase's own; None: the configuration's."""
    given = given_fields(config.objective)
    objective = make_objective(preset, of_mode, given, config.mode)
    _refuse_what_is_missing(objective, config)
    if optim is None and config.optim.expert.lr is not None and not (imitates(objective) and objective.has_policy_term):
        raise TrapoError(
            f"optim.expert.lr: an optimizer for expert tokens needs some beside own ones; phase {name} has one kind"
        )
    return Phase(
        name,
        config.train.steps if steps is None else steps,
        supervised(schedule, objective),
        objective,
        std if config.advantage.std is None else config.advantage.std,
        optim=config.optim if optim is None else optim,
        prompts_per_step=config.train.prompts_per_step if prompts_per_step is None else prompts_per_step,
        overruled=overruled(preset(**of_mode), given, config.mode),
    )


def _refuse_what_is_missing(objective: tk.Objective, config: Config) -> None:
    """Raises TrapoError for an objective that needs what the trainer does not give to the loss."""
    if "rollout_logprobs" in expert_reads(objective):
        raise TrapoError("objective.expert: needs rollout_logprobs of expert tokens, which the trainer does not have")
    if config.rollout.top_k is not None and (objective.statistics or objective.reads_logit or objective.reference_head):
        raise TrapoError(
            f"rollout.top_k: objective.expert={objective.expert} reads more of a token than its log-probability, which "
            "the loss on truncated distributions does not have"
        )
    for name, needed_by in dataclasses.replace(objective, expert=None).needs.items():
        if name == "rollout_logprobs" and config.rollout.engine == "hf":
            raise TrapoError(
                f"objective: {needed_by} needs the engine's log-probabilities, which rollout.engine=hf does not give"
            )
        if name == "old_logprobs" and config.train.updates_per_step == 1:
            raise TrapoError(
                f"objective: {needed_by} needs old log-probabilities, which there are from train.updates_per_step=2 on"
            )
