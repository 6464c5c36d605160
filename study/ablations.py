"""Part 3: variants of TRAPO `paper`, and the conditions under which the arms are compared again, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from study.arms import ARMS, Knobs, grid


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the arm's chosen settings. `overrides`: trapo's dotted keys; `traces`: how many of the training
    problems have an expert trace; `lengths`: of the training problems."""

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    traces: int | None = None
    lengths: tuple[int, ...] | None = None


def _one(key: str, *values: Any) -> dict[str, Variant]:
    return {f"{key.split('.')[-1]}={value}": Variant({key: value}) for value in values}


_GROUPS_OF_4 = {
    "guidance.sizes": "[2,1,1]",
    "guidance.ratios": "[0,0.35,1.0]",
    "guidance.thresholds": "[-1,0.6,0.9]",
    "train.prompts_per_step": 32,
}
TRAPO_VARIANTS: dict[str, Variant] = {
    **_one("advantage.baseline", "unguided", "own_tokens"),
    **_one("objective.expert_coef", 1.0, 0.1),
    **_one("objective.alpha", 0.01, 0.03, 0.3, 1.0),
    "thresholds: only where all failed": Variant({"guidance.thresholds": "[-1,0.01,0.01,0.01]"}),
    "thresholds: higher": Variant({"guidance.thresholds": "[-1,0.8,0.9,1.0]"}),
    "thresholds: always": Variant({"guidance.thresholds": "[-1,2,2,2]"}),
    "ratios: short": Variant({"guidance.ratios": "[0,0.1,0.2,0.4]"}),
    "ratios: no full trace": Variant({"guidance.ratios": "[0,0.2,0.5,0.8]"}),
    "groups of 4 (2,1,1)": Variant(_GROUPS_OF_4),
    "groups of 16 (8,4,2,2)": Variant({"guidance.sizes": "[8,4,2,2]", "train.prompts_per_step": 8}),
    "cut at a step boundary": Variant({"guidance.cut": "blank_line"}),
    "learning rate falls to 0, as SFT's": Variant({"optim.schedule": "linear"}),
    # Chosen on the test scores of the two (RULES.md, 2026-11-29): do their gains add?
    "alpha=0.03 and groups of 4": Variant({"objective.alpha": 0.03, **_GROUPS_OF_4}),
}
# When does it pay? Fewer traces (400 prompts all the same), and rewards that are sparser or denser.
CONDITION_ARMS = ("sft", "grpo", "sft_then_rl", "trapo_paper")
CONDITIONS: dict[str, Variant] = {
    "50 traces": Variant(traces=50),
    "long problems only (sparse reward)": Variant(lengths=(6, 7, 8)),
    "short problems only (dense reward)": Variant(lengths=(3, 4)),
}
# Settings chosen on part 2's problems need not suit these (RULES.md, 2026-11-29): sweeps of their own, at part 2's
# rates and below. GRPO is not among them: its sweep was flat, and it sees no trace.
_ANEW: dict[str, tuple[Knobs, ...]] = {
    "sft": grid(lr=(1e-3, 4e-3, 1.6e-2), batch=(1, 4)),
    "sft_then_rl": ARMS["sft_then_rl"].grid,
    "trapo_paper": grid(lr=(3e-4, 1e-3), expert_coef=(1.0, 4.0, 16.0)),
}
RETUNED = {"50 traces": _ANEW, "short problems only (dense reward)": _ANEW}
# Their first seeds lost more than 15 points, four times the spread over seeds: they get no further ones (RULES.md).
SETTLED = {"expert_coef=1.0", "expert_coef=0.1", "alpha=0.3", "alpha=1.0", "ratios: short", "groups of 16 (8,4,2,2)"}
ABLATION_TASK = "chain"
