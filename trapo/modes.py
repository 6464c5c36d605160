"""What each mode is: a guidance schedule and an objective, run by the same loop.

    trapo         micro-groups with guidance where it helps; TrSFT on prefixes, policy gradient on own tokens
    grpo          one unguided group; clipped policy gradient, advantages over their std
    sft           the full expert trace of each prompt; −log p
    sft_then_rl   sft for train.sft_steps steps, then grpo
    luffy         one full trace among the rollouts of each group, always; LUFFY's off-policy term on it
    nll_prefix    trapo with −log p on prefixes (the paper's ablation)
    fixed_prefix  trapo with the same prefix for the later half of each group, needed or not

Sources are named in trapo_kernels.Objective's presets. A new mode is one entry in MODES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import trapo_kernels as tk
from trapo.config import Config
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER, PRESETS, Schedule, schedule


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one schedule and one objective."""

    name: str
    steps: int
    schedule: Schedule
    objective: tk.Objective
    std: bool  # advantages divided by the group's standard deviation

    @property
    def needs_rewards(self) -> bool:
        return "advantages" in self.objective.needs


def phases(config: Config) -> list[Phase]:
    """The phases of a run, in order; their steps add up to train.steps."""
    return MODES[config.mode](config)


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


def _objective(config: Config, preset: Callable[..., tk.Objective], **mode: object) -> tk.Objective:
    """A preset of trapo_kernels, changed by the mode and then by what the configuration sets."""
    given = {k: v for k, v in dataclasses.asdict(config.objective).items() if v is not None}
    try:
        return preset(**{**mode, **given})
    except (TypeError, ValueError) as error:
        raise TrapoError(f"objective: {error}") from error


def _phase(
    config: Config,
    name: str,
    schedule: Schedule,
    objective: tk.Objective,
    *,
    std: bool,
    steps: int | None = None,
) -> Phase:
    std = std if config.advantage.std is None else config.advantage.std
    return Phase(name, config.train.steps if steps is None else steps, schedule, objective, std)


def _trapo(config: Config, **mode: object) -> list[Phase]:
    objective = _objective(config, tk.Objective.trapo, **mode)
    return [_phase(config, config.mode, _guided_schedule(config), objective, std=False)]


def _grpo(config: Config, steps: int | None = None) -> list[Phase]:
    size = _guided_schedule(config).rollouts_per_prompt
    unguided = _replace_groups(config, [(size, 0.0, NEVER)])
    return [_phase(config, "grpo", unguided, _objective(config, tk.Objective.grpo), std=True, steps=steps)]


def _sft(config: Config, steps: int | None = None) -> list[Phase]:
    one_trace = _replace_groups(config, [(1, 1.0, ALWAYS)])
    return [_phase(config, "sft", one_trace, _objective(config, tk.Objective.sft), std=False, steps=steps)]


def _sft_then_rl(config: Config) -> list[Phase]:
    sft_steps = config.train.sft_steps
    assert sft_steps is not None  # config.py asks for it in this mode
    return _sft(config, sft_steps) + _grpo(config, config.train.steps - sft_steps)


def _luffy(config: Config) -> list[Phase]:
    size = _guided_schedule(config).rollouts_per_prompt
    if size < 2:
        raise TrapoError(f"guidance.sizes: mode luffy needs at least 2 rollouts per prompt, got {size}")
    one_off_policy = _replace_groups(config, [(size - 1, 0.0, NEVER), (1, 1.0, ALWAYS)])
    return [_phase(config, "luffy", one_off_policy, _objective(config, tk.Objective.luffy), std=False)]


def _fixed_prefix(config: Config) -> list[Phase]:
    """Half of each group without a prefix, half with half a trace: the same amount of guidance for every prompt."""
    size = _guided_schedule(config).rollouts_per_prompt
    if size < 2:
        raise TrapoError(f"guidance.sizes: mode fixed_prefix needs at least 2 rollouts per prompt, got {size}")
    halves = _replace_groups(config, [(size - size // 2, 0.0, NEVER), (size // 2, 0.5, ALWAYS)])
    return [_phase(config, "fixed_prefix", halves, _objective(config, tk.Objective.trapo), std=False)]


MODES: dict[str, Callable[[Config], list[Phase]]] = {
    "trapo": _trapo,
    "grpo": _grpo,
    "sft": _sft,
    "sft_then_rl": _sft_then_rl,
    "luffy": _luffy,
    "nll_prefix": lambda config: _trapo(config, expert="sft"),
    "fixed_prefix": _fixed_prefix,
}
