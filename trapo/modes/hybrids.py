"""This file has the modes that came after SFT -> RL: who gets a trace, how much of it, and what it weighs.

Each is its published recipe in this loop; docs/modes.md says what each does, with its source.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER, MicroGroup, Schedule
from trapo.modes import weighing
from trapo.modes.building import group_size, make_phase, replace_groups, with_expert_optimizer
from trapo.modes.draws import Binomial, Uniform
from trapo.modes.instructions import text_of
from trapo.modes.memory import ShortestPrefixes, TraceQueue
from trapo.modes.phase import Phase, cosine
from trapo.modes.registry import mode

if TYPE_CHECKING:
    from trapo.config import Config

PIECES = 5  # of UFT's traces


@mode(
    "RL where a rollout is right; of other prompts (hybrid.gate) the trace is imitated, their rollouts dropped.",
    keys=("gate",),
)
def hpt(config: Config) -> list[Phase]:
    size, gate = group_size(config), config.hybrid.gate or 0
    if gate >= size:
        raise TrapoError(f"hybrid.gate: got {gate}; with {size} rollouts a prompt it must be below that")
    drawn = replace_groups(config, [(size, 0.0, NEVER), (1, 1.0, (gate + 0.5) / size)])
    first, trace = drawn.micro_groups
    gated = dataclasses.replace(trace, guided_only=True, replaces=True)
    drawn = dataclasses.replace(drawn, micro_groups=(first, gated))
    of_mode = {"expert": "sft", "reduction": "region_mean"}
    return [make_phase(config, "hpt", drawn, tk.Objective.trapo, of_mode, std=False)]


@mode(
    "RL; prompts without a right rollout wait, and each hybrid.buffer of them are one SFT step on their traces.",
    keys=("buffer",),
)
def relift(config: Config) -> list[Phase]:
    unguided = replace_groups(config, [(group_size(config), 0.0, NEVER)])
    whole = replace_groups(config, [(1, 1.0, ALWAYS)])
    optim = with_expert_optimizer(config)
    phase = make_phase(config, "relift", unguided, tk.Objective.trapo, {"expert": None}, std=False, optim=optim)
    imitation = tk.Objective.sft(entropy_coef=phase.objective.entropy_coef)
    queue = TraceQueue(whole, imitation, config.hybrid.buffer or 128, config.rollout.max_response_tokens)
    return [dataclasses.replace(phase, memory=queue)]


@mode(
    "GRPO from a hint of 0 to 5 fifths of the trace, drawn for each prompt and ever shorter; a small NLL on it.",
    keys=("high", "low", "steps"),
)
def uft(config: Config) -> list[Phase]:
    hinted = replace_groups(config, [(group_size(config), 1.0, ALWAYS)])
    hinted = dataclasses.replace(hinted, supervise="one_per_prefix")
    of_mode = {"expert": "sft", "expert_coef": 0.001, "reduction": "region_mean"}
    phase = make_phase(config, "uft", hinted, tk.Objective.grpo, of_mode, std=True)
    steps = config.hybrid.steps or max(round(0.6 * config.train.steps), 1)  # 300 of 500
    curve = functools.partial(cosine, *ends(config, 0.95, 0.05), steps, after=0.0)
    return [dataclasses.replace(phase, vary=functools.partial(_hints, curve))]


def _hints(curve: functools.partial[float], phase: Phase, step: int) -> Phase:
    (group,) = phase.schedule.micro_groups
    p = curve(step)
    drawn = dataclasses.replace(group, draw=Binomial(PIECES, p))
    return _with_groups(phase, (drawn,), {"hint_share": p})


@mode(
    "One rollout of a group continues an ever shorter prefix, whose most uncertain tokens get its advantage.",
    keys=("high", "low", "steps", "keep"),
)
def prefix_rft(config: Config) -> list[Phase]:
    size = group_size(config, least=2)
    groups = replace_groups(config, [(size - 1, 0.0, NEVER), (1, 0.95, ALWAYS)])
    phase = make_phase(config, "prefix_rft", groups, tk.Objective.grpo, {"expert": "weighted"}, std=True)
    high, low = ends(config, 0.95, 0.05)
    curve = functools.partial(cosine, high, low, config.hybrid.steps or config.train.steps)
    keep = 0.2 if config.hybrid.keep is None else config.hybrid.keep
    return [
        dataclasses.replace(
            phase,
            vary=functools.partial(_lengths, curve, high),
            weigh=functools.partial(weighing.keep_uncertain, keep=keep),
        )
    ]


def _lengths(curve: functools.partial[float], high: float, phase: Phase, step: int) -> Phase:
    own, guided = phase.schedule.micro_groups
    low = curve(step)
    drawn = dataclasses.replace(guided, draw=Uniform(min(low, high), high))
    return _with_groups(phase, (own, drawn), {"prefix_low": low})


@mode("GRPO; where the first half of a group fails, the other half continues a prefix that carries no loss.")
def prefix_rl(config: Config) -> list[Phase]:
    size = group_size(config, least=2)
    halves = replace_groups(config, [(size - size // 2, 0.0, NEVER), (size // 2, 0.5, 0.5 / (size - size // 2))])
    own, guided = halves.micro_groups
    guided = dataclasses.replace(guided, guided_only=True)
    found = None
    if config.guidance.find is not False:
        found = ShortestPrefixes()
        guided = dataclasses.replace(guided, draw=found)
    text = config.guidance.instruction
    told = None if text is None else text_of(text)
    drawn = dataclasses.replace(halves, micro_groups=(own, guided), instruction=told)
    phase = make_phase(config, "prefix_rl", drawn, tk.Objective.grpo, std=True)
    return [dataclasses.replace(phase, memory=found, grouping="level")]


@mode(
    "(1 − μ) · GRPO on own rollouts + μ · NLL of a trace of each prompt, a mean each; μ falls by a cosine.",
    keys=("high", "low", "steps"),
)
def chord(config: Config) -> list[Phase]:
    size = group_size(config)
    with_trace = replace_groups(config, [(size, 0.0, NEVER), (1, 1.0, ALWAYS)])
    phase = make_phase(config, "chord", with_trace, tk.Objective.chord, {"expert": "sft"}, std=True)
    curve = functools.partial(cosine, *ends(config, 0.9, 0.05), config.hybrid.steps or 200)
    return [dataclasses.replace(phase, vary=functools.partial(_mixed, curve), grouping="unguided")]


def _mixed(curve: functools.partial[float], phase: Phase, step: int) -> Phase:
    mu = curve(step)
    objective = dataclasses.replace(phase.objective, expert_coef=mu, policy_coef=1 - mu)
    return dataclasses.replace(phase, objective=objective, shown={"mu": mu})


@mode("One trace in each group: demonstrations weigh 0.5·e^−H, right own rollouts 0.1·e^H, wrong ones −1.")
def srft(config: Config) -> list[Phase]:
    size = group_size(config, least=2)
    with_trace = replace_groups(config, [(size - 1, 0.0, NEVER), (1, 1.0, ALWAYS)])
    of_mode = {"expert": "weighted", "reduction": "region_mean"}
    phase = make_phase(config, "srft", with_trace, tk.Objective.trapo, of_mode, std=False)
    return [dataclasses.replace(phase, weigh=weighing.by_entropy)]


def ends(config: Config, high: float, low: float) -> tuple[float, float]:
    """Returns where a mode's curve begins and ends. Raises TrapoError where that is no share."""
    own = config.hybrid
    high, low = high if own.high is None else own.high, low if own.low is None else own.low
    if not 0 <= low <= high <= 1:
        raise TrapoError(f"hybrid.high: got {high} with hybrid.low={low}; they must be 0 <= low <= high <= 1")
    return high, low


def _with_groups(phase: Phase, groups: tuple[MicroGroup, ...], shown: dict[str, float]) -> Phase:
    schedule: Schedule = dataclasses.replace(phase.schedule, micro_groups=groups)
    return dataclasses.replace(phase, schedule=schedule, shown=shown)
