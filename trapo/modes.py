"""What each mode is: a guidance schedule and an objective, run by the same loop.

A mode is one function with `@mode("what it does, in a sentence")` above it; that line puts it into MODES, from which
the key `mode`, `trapo config` and the documentation have it. Sources are named in trapo_kernels.Objective's presets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER, PRESETS, Schedule, schedule
from trapo.settings.objective import given_fields, make_objective, overruled

if TYPE_CHECKING:
    from trapo.config import Config


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one schedule and one objective."""

    name: str
    steps: int
    schedule: Schedule
    objective: tk.Objective
    std: bool  # advantages divided by the group's standard deviation
    overruled: tuple[str, ...] = ()  # a line for each choice of the mode that the configuration changes

    @property
    def needs_rewards(self) -> bool:
        """For advantages, or to know who needs guidance."""
        return "advantages" in self.objective.needs or self.schedule.generates


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to train: what it does, in one sentence, and what makes a configuration's phases of it."""

    name: str
    doc: str
    phases: Callable[[Config], list[Phase]]
    check: Callable[[Config], None]  # raises TrapoError, in one line, for keys that do not go with the mode


MODES: dict[str, Mode] = {}
Phases = TypeVar("Phases", bound=Callable[..., "list[Phase]"])


def phases(config: Config) -> list[Phase]:
    """The phases of a run, in order; their steps add up to train.steps."""
    return MODES[config.mode].phases(config)


def phase_at(step: int, plan: Sequence[Phase]) -> Phase:
    """The phase that a step, counted from 0, belongs to."""
    end = 0
    for phase in plan:
        end += phase.steps
        if step < end:
            return phase
    raise AssertionError(f"step {step} is past the last phase's end {end}")


def check_mode(config: Config) -> None:
    """Raises TrapoError, in one line, for keys that do not go with the mode."""
    MODES[config.mode].check(config)


def _has_no_sft_steps(config: Config) -> None:
    if config.train.sft_steps is not None:
        raise TrapoError(f"train.sft_steps: only mode sft_then_rl has SFT steps; got mode {config.mode}")


def _has_sft_steps(config: Config) -> None:
    if config.train.sft_steps is None or config.train.sft_steps >= config.train.steps:
        raise TrapoError(
            f"train.sft_steps: mode sft_then_rl needs 1 <= sft_steps < train.steps={config.train.steps}, "
            f"got {config.train.sft_steps}"
        )


def mode(doc: str, check: Callable[[Config], None] = _has_no_sft_steps) -> Callable[[Phases], Phases]:
    """Puts the function below it into MODES, under its name."""

    def register(function: Phases) -> Phases:
        MODES[function.__name__] = Mode(function.__name__, doc, function, check)
        return function

    return register


@mode("Micro-groups are guided where the model fails: TrSFT on expert prefixes, policy gradient on own tokens.")
def trapo(config: Config, **mode: object) -> list[Phase]:
    return [_phase(config, config.mode, _guided_schedule(config), tk.Objective.trapo, mode, std=False)]


@mode("One unguided group with the clipped policy gradient; advantages are divided by their standard deviation.")
def grpo(config: Config, steps: int | None = None) -> list[Phase]:
    unguided = _replace_groups(config, [(_group_size(config), 0.0, NEVER)])
    return [_phase(config, "grpo", unguided, tk.Objective.grpo, std=True, steps=steps)]


@mode("The full expert trace of each prompt is imitated, by −log p; nothing is generated.")
def sft(config: Config, steps: int | None = None) -> list[Phase]:
    one_trace = _replace_groups(config, [(1, 1.0, ALWAYS)])
    return [_phase(config, "sft", one_trace, tk.Objective.sft, std=False, steps=steps)]


@mode("sft for train.sft_steps steps, then grpo for the rest of train.steps.", _has_sft_steps)
def sft_then_rl(config: Config) -> list[Phase]:
    sft_steps = config.train.sft_steps
    assert sft_steps is not None  # _has_sft_steps
    return sft(config, sft_steps) + grpo(config, config.train.steps - sft_steps)


@mode("One full expert trace is among the rollouts of each group, always, with LUFFY's off-policy term on it.")
def luffy(config: Config) -> list[Phase]:
    size = _group_size(config, least=2)
    one_off_policy = _replace_groups(config, [(size - 1, 0.0, NEVER), (1, 1.0, ALWAYS)])
    return [_phase(config, "luffy", one_off_policy, tk.Objective.luffy, std=False)]


@mode("trapo with −log p on prefixes in place of TrSFT (the paper's ablation).")
def nll_prefix(config: Config) -> list[Phase]:
    return trapo(config, expert="sft")


@mode("trapo with the same prefix, half a trace, for the later half of each group, whether it is needed or not.")
def fixed_prefix(config: Config) -> list[Phase]:
    size = _group_size(config, least=2)
    halves = _replace_groups(config, [(size - size // 2, 0.0, NEVER), (size // 2, 0.5, ALWAYS)])
    return [_phase(config, "fixed_prefix", halves, tk.Objective.trapo, std=False)]


def _guided_schedule(config: Config) -> Schedule:
    """The guidance preset with the fields that the configuration sets."""
    g = config.guidance
    base = PRESETS[g.preset]
    given = {k: getattr(g, k) for k in ("cut", "traces", "trace_part", "supervise") if getattr(g, k) is not None}
    groups = base.micro_groups
    groups = schedule(
        [m.size for m in groups] if g.sizes is None else g.sizes,
        [m.ratio for m in groups] if g.ratios is None else g.ratios,
        [m.threshold for m in groups] if g.thresholds is None else g.thresholds,
    ).micro_groups
    return dataclasses.replace(base, micro_groups=groups, stop_decided=g.stop_decided, **given)


def _replace_groups(config: Config, columns: list[tuple[int, float, float]]) -> Schedule:
    """The configured schedule's rules with other micro-groups: (size, ratio, threshold) each."""
    sizes, ratios, thresholds = zip(*columns, strict=True)
    groups = schedule(sizes, ratios, thresholds).micro_groups
    return dataclasses.replace(_guided_schedule(config), micro_groups=groups)


def _group_size(config: Config, least: int = 1) -> int:
    """Rollouts of a prompt, whatever micro-groups they are in."""
    size = _guided_schedule(config).rollouts_per_prompt
    if size < least:
        raise TrapoError(f"guidance.sizes: mode {config.mode} needs at least {least} rollouts per prompt, got {size}")
    return size


def _phase(
    config: Config,
    name: str,
    schedule: Schedule,
    preset: Callable[..., tk.Objective],
    of_mode: Mapping[str, object] = MappingProxyType({}),
    *,
    std: bool,
    steps: int | None = None,
) -> Phase:
    """A phase with a preset of trapo_kernels, changed by the mode and then by what the configuration sets."""
    given = given_fields(config.objective)
    objective = make_objective(preset, of_mode, given, config.mode)
    _refuse_what_is_missing(objective, config)
    return Phase(
        name,
        config.train.steps if steps is None else steps,
        schedule,
        objective,
        std if config.advantage.std is None else config.advantage.std,
        overruled(preset(**of_mode), given, config.mode),
    )


def _refuse_what_is_missing(objective: tk.Objective, config: Config) -> None:
    """Raises TrapoError for an objective that needs what the trainer does not give to the loss."""
    if objective.reference_head:
        raise TrapoError(
            f"objective.expert: {objective.expert} needs a reference's head, which the trainer does not give"
        )
    expert = tk.Objective(expert=objective.expert, expert_coef=objective.expert_coef, policy=None)
    for name in expert.reads if callable(objective.expert) else expert.needed:
        if name in ("old_logprobs", "rollout_logprobs"):
            raise TrapoError(f"objective.expert: needs {name} of expert tokens, which the trainer does not have")
    for name, needed_by in objective.needs.items():
        if name == "rollout_logprobs" and config.rollout.engine == "hf":
            raise TrapoError(
                f"objective: {needed_by} needs the engine's log-probabilities, which rollout.engine=hf does not give"
            )
        if name == "old_logprobs" and config.train.updates_per_step == 1:
            raise TrapoError(
                f"objective: {needed_by} needs old log-probabilities, which there are from train.updates_per_step=2 on"
            )
