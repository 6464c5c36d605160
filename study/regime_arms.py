"""The arms of the regime study: one configuration of trapo's loop each, where it starts, and what its sweep tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from study.arms import Arm, Knobs, Stage, grid, guided, sft, sft_then_rl
from study.settings import Settings


@dataclasses.dataclass(frozen=True)
class RegimeArm(Arm):
    """Is an arm with the settings that it has before its sweep: the pilot's best, or of arms that the pilot did not
    have those of the arm next to it."""

    start: Knobs
    ladder: bool = True  # whether part of its rollouts is guided


def _sft_then_trapo(settings: Settings, seed: int, knobs: Knobs, overrides: Mapping[str, Any]) -> list[Stage]:
    """Returns SFT → GRPO's first stage, and TRAPO in the place of its second."""
    first, _ = sft_then_rl(settings, seed, knobs, {})
    rest = dataclasses.replace(settings, steps=settings.steps - first.config.train.steps)
    return [first, *_TRAPO(rest, seed, knobs, overrides)]


_TRAPO = guided("trapo", advantage__std=True)
RL_RATES = grid(lr=(3e-4, 1e-3, 2e-3))
GUIDED = grid(lr=(3e-4, 1e-3), expert_coef=(1.0, 4.0, 16.0))
_LIKE_TRAPO: Knobs = {"lr": 1e-3, "expert_coef": 4.0}
_SFT_FIRST: Knobs = {"lr": 6e-4, "split": 0.5, "sft_lr": 3e-3, "sft_batch": 4}

REGIME_ARMS: dict[str, RegimeArm] = {
    "grpo": RegimeArm("GRPO", guided("grpo"), RL_RATES, {"lr": 1e-3}, ladder=False),
    "sft_then_rl": RegimeArm(
        "SFT → GRPO",
        sft_then_rl,
        grid(lr=(6e-4, 1e-3), split=(0.25, 0.5), sft_lr=(3e-3, 1e-2), sft_batch=(4,)),
        _SFT_FIRST,
        ladder=False,
    ),
    "trapo": RegimeArm("TRAPO, α = 0.1", _TRAPO, GUIDED, _LIKE_TRAPO),
    "trapo_003": RegimeArm(
        "TRAPO, α = 0.03", guided("trapo", advantage__std=True, objective__alpha=0.03), GUIDED, _LIKE_TRAPO
    ),
    "nll": RegimeArm("NLL on the same prefixes", guided("nll_prefix", advantage__std=True), GUIDED, _LIKE_TRAPO),
    "luffy": RegimeArm(
        "LUFFY",
        guided("luffy"),
        grid(lr=(3e-4, 1e-3), expert_coef=(4.0, 16.0, 64.0)),
        {"lr": 1e-3, "expert_coef": 16.0},
    ),
    "sft": RegimeArm("SFT", sft, grid(lr=(1e-3, 3e-3, 1e-2), batch=(4,)), {"lr": 3e-3, "batch": 4}, ladder=False),
    "sft_then_trapo": RegimeArm(
        "SFT → TRAPO",
        _sft_then_trapo,
        grid(lr=(6e-4, 1e-3), expert_coef=(1.0, 4.0), split=(0.25, 0.5), sft_lr=(3e-3,), sft_batch=(4,)),
        {**_SFT_FIRST, "expert_coef": 4.0},
    ),
    "no_policy": RegimeArm(
        "TRAPO without its policy term",
        guided("trapo", advantage__std=True, objective__policy="none"),
        RL_RATES,
        {"lr": 1e-3},
    ),
    "no_loss": RegimeArm(
        "prefixes without a loss",
        guided("trapo", advantage__std=True, objective__expert_coef=0.0),
        grid(lr=(1e-4, 3e-4, 1e-3)),
        {"lr": 3e-4},
    ),
    "always": RegimeArm(
        "TRAPO, guided always",
        guided("trapo", advantage__std=True, guidance__thresholds="[-1,2,2,2]"),
        GUIDED,
        _LIKE_TRAPO,
    ),
    "hpt": RegimeArm(
        "HPT", guided("hpt"), grid(lr=(3e-4, 1e-3), expert_coef=(1.0, 4.0)), {"lr": 1e-3, "expert_coef": 1.0}
    ),
    "two_optimizers": RegimeArm(
        "NLL with an optimizer of its own",
        guided("nll_prefix", advantage__std=True),
        grid(lr=(3e-4, 1e-3), expert_lr=(1e-3, 3e-3)),
        {"lr": 1e-3, "expert_lr": 1e-3},
    ),
    "prefix_rl": RegimeArm(
        "prefixes by bisection, no loss", guided("prefix_rl", guidance__find=True), RL_RATES, {"lr": 1e-3}
    ),
    "uft": RegimeArm("UFT", guided("uft"), RL_RATES, {"lr": 1e-3}),
}
# What is run first, and of that what is run in all corners.
FIRST = ("grpo", "sft_then_rl", "trapo", "trapo_003", "nll", "luffy", "sft", "sft_then_trapo")
MAIN = FIRST[:5]
