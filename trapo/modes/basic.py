"""The basic modes are SFT, RL, one after the other, and TRAPO with its ablations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER
from trapo.modes.building import group_size, guided_schedule, make_phase, replace_groups
from trapo.modes.phase import Phase
from trapo.modes.registry import mode

if TYPE_CHECKING:
    from trapo.config import Config

AUTO = "auto"
# The keys of `objective` that are about own tokens alone, and about expert tokens alone.
_OF_RL = frozenset(
    {"policy", "policy_coef", "kl_coef", "tis_cap", "tis_low", "tis_mode", "tis_level", "off_policy_mask"}
).union(*(term.fields for term in tk.POLICY_TERMS.values()))
_OF_SFT = frozenset({"expert", "expert_coef"}).union(*(term.fields for term in tk.EXPERT_TERMS.values()))


def _has_sft_steps(config: Config) -> None:
    """Raises TrapoError where the SFT phase has no end, or RL no step after it."""
    asked, steps = config.train.sft_steps, config.train.steps
    if asked is None or steps < 2 or (isinstance(asked, int) and asked >= steps):
        raise TrapoError(
            f"train.sft_steps: mode sft_then_rl needs auto, or 1 <= sft_steps < train.steps={steps}, got {asked}"
        )
    if asked != AUTO:
        return
    if config.data.eval is None or config.eval.every == 0:
        raise TrapoError(
            "train.sft_steps: auto goes by the likelihood of held-out traces: it needs data.eval and eval.every"
        )
    if (schedule := config.sft.schedule or config.optim.schedule) != "constant":
        raise TrapoError(
            f"train.sft_steps: auto needs sft.schedule=constant, for nobody knows its last step; got {schedule}"
        )


@mode("Micro-groups are guided where the model fails: TrSFT on expert prefixes, policy gradient on own tokens.")
def trapo(config: Config, **mode: object) -> list[Phase]:
    return [make_phase(config, config.mode, guided_schedule(config), tk.Objective.trapo, mode, std=False)]


@mode("One unguided group with the clipped policy gradient; advantages are divided by their standard deviation.")
def grpo(config: Config, steps: int | None = None) -> list[Phase]:
    unguided = replace_groups(config, [(group_size(config), 0.0, NEVER)])
    return [make_phase(config, "grpo", unguided, tk.Objective.grpo, std=True, steps=steps)]


@mode("The full expert trace of each prompt is imitated, by −log p; nothing is generated.")
def sft(config: Config, **of_phase: Any) -> list[Phase]:
    one_trace = replace_groups(config, [(1, 1.0, ALWAYS)])
    return [make_phase(config, "sft", one_trace, tk.Objective.sft, std=False, **of_phase)]


@mode(
    "sft for train.sft_steps steps, by the keys of `sft`, then grpo from its model, with an optimizer of its own; of "
    "`objective`, each has the keys of its term.",
    _has_sft_steps,
)
def sft_then_rl(config: Config) -> list[Phase]:
    asked, own = config.train.sft_steps, config.sft
    steps = asked if isinstance(asked, int) else config.train.steps - 1  # of auto: the latest end
    optim = dataclasses.replace(
        config.optim, lr=own.lr or config.optim.lr, schedule=own.schedule or config.optim.schedule
    )
    (first,) = sft(_without(config, _OF_RL), steps=steps, optim=optim, prompts_per_step=own.prompts_per_step)
    first = dataclasses.replace(first, ends_at_plateau=asked == AUTO)
    return [first, *grpo(_without(config, _OF_SFT), config.train.steps - steps)]


def _without(config: Config, names: frozenset[str]) -> Config:
    """Returns the configuration with these keys of `objective` left to the mode."""
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, **dict.fromkeys(names)))


@mode("One full expert trace is among the rollouts of each group, always, with LUFFY's off-policy term on it.")
def luffy(config: Config) -> list[Phase]:
    size = group_size(config, least=2)
    one_off_policy = replace_groups(config, [(size - 1, 0.0, NEVER), (1, 1.0, ALWAYS)])
    return [make_phase(config, "luffy", one_off_policy, tk.Objective.luffy, std=False)]


@mode("trapo with −log p on prefixes in place of TrSFT (the paper's ablation).")
def nll_prefix(config: Config) -> list[Phase]:
    return trapo(config, expert="sft")


@mode("trapo with the same prefix, half a trace, for the later half of each group, whether it is needed or not.")
def fixed_prefix(config: Config) -> list[Phase]:
    size = group_size(config, least=2)
    halves = replace_groups(config, [(size - size // 2, 0.0, NEVER), (size // 2, 0.5, ALWAYS)])
    return [make_phase(config, "fixed_prefix", halves, tk.Objective.trapo, std=False)]
