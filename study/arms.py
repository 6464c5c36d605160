"""The arms: each a configuration of the one loop, and the grid of settings that its sweep tries.

A run is one or two stages of `trapo`'s own modes. The grids have six settings each but SFT's, which has twelve: the
baseline that a later paper found broken (docs/methods.md) is tuned hardest. A sweep goes on beyond its grid while the
best setting is at its highest learning rate or `expert_coef` (jobs.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from study.settings import Settings
from trapo.config import Config, merge_config

Knobs = Mapping[str, float]  # lr, expert_coef, ... : what a sweep varies
KEYS = {"expert_coef": "objective.expert_coef", "expert_lr": "optim.expert.lr"}  # of knobs beside lr


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive steps with one trapo configuration."""

    config: Config
    random_prefix: bool = False  # prefixes of random length, see loop.py


@dataclasses.dataclass(frozen=True)
class Arm:
    label: str
    stages: Callable[[Settings, int, Knobs, Mapping[str, Any]], list[Stage]]  # settings, seed, knobs, overrides
    grid: tuple[Knobs, ...]


def grid(**axes: tuple[float, ...]) -> tuple[Knobs, ...]:
    """Returns every combination of the axes' values, the last axis fastest."""
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


LRS = (3e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4)
WITH_EXPERT = grid(lr=(1e-4, 3e-4, 1e-3), expert_coef=(1.0, 0.1))
SFT_GRID = grid(lr=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3), batch=(1, 4))  # batch: times prompts_per_step


def _config(
    settings: Settings, seed: int, mode: str, lr: float, steps: int, overrides: Mapping[str, Any], **more: Any
) -> Config:
    """Returns a trapo configuration. `overrides` (dotted keys) come last: an ablation's."""
    base: dict[str, Any] = {
        "mode": mode,
        "seed": seed,
        "optim": {"lr": lr, "warmup_steps": min(10, steps // 10), "schedule": "constant"},
        "train": {
            "steps": steps,
            "prompts_per_step": settings.prompts_per_step,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "normalizer": "tokens",
        },
    }
    dotted = {**more, **overrides}
    return merge_config(base, [f"{key}={value}" for key, value in dotted.items()])


def guided(mode: str, *, random_prefix: bool = False, **more: Any) -> Callable[..., list[Stage]]:
    """Returns one stage of a mode, with what a sweep varies from the knobs."""
    fixed = {key.replace("__", "."): value for key, value in more.items()}

    def stages(settings: Settings, seed: int, knobs: Knobs, overrides: Mapping[str, Any]) -> list[Stage]:
        varied = {key: knobs[knob] for knob, key in KEYS.items() if knob in knobs}
        config = _config(settings, seed, mode, knobs["lr"], settings.steps, overrides, **{**fixed, **varied})
        return [Stage(config, random_prefix)]

    return stages


def sft(
    settings: Settings, seed: int, knobs: Knobs, overrides: Mapping[str, Any], steps: int | None = None
) -> list[Stage]:
    steps = settings.steps if steps is None else steps
    batch = {
        "train.prompts_per_step": int(settings.prompts_per_step * knobs["batch"]),
        "optim.schedule": "linear",
    }
    return [Stage(_config(settings, seed, "sft", knobs["lr"], steps, overrides, **batch))]


def sft_then_rl(settings: Settings, seed: int, knobs: Knobs, overrides: Mapping[str, Any]) -> list[Stage]:
    """Returns the two stages. `sft_lr`, `sft_batch`: the SFT sweep's winner; `split`: the share of the steps that is
    SFT."""
    sft_steps = round(settings.steps * knobs["split"])
    first = sft(settings, seed, {"lr": knobs["sft_lr"], "batch": knobs["sft_batch"]}, overrides, sft_steps)
    return [*first, Stage(_config(settings, seed, "grpo", knobs["lr"], settings.steps - sft_steps, overrides))]


ARMS: dict[str, Arm] = {
    "sft": Arm("SFT", sft, SFT_GRID),
    "grpo": Arm("GRPO", guided("grpo"), grid(lr=LRS)),
    "sft_then_rl": Arm("SFT → GRPO", sft_then_rl, grid(lr=(1e-4, 2e-4), split=(0.25, 0.5, 0.75))),
    "luffy": Arm("LUFFY", guided("luffy"), WITH_EXPERT),
    "micro_groups": Arm(
        "micro-groups, no expert loss", guided("trapo", objective__expert_coef=0.0, advantage__std=True), grid(lr=LRS)
    ),
    "micro_groups_nll": Arm("micro-groups + NLL", guided("nll_prefix", advantage__std=True), WITH_EXPERT),
    "trapo_paper": Arm("TRAPO paper", guided("trapo", advantage__std=True), WITH_EXPERT),
    "trapo_official": Arm(
        "TRAPO official", guided("trapo", guidance__preset="official", objective__entropy_coef=0.001), WITH_EXPERT
    ),
    "fixed_prefix": Arm("fixed prefix", guided("fixed_prefix", advantage__std=True), WITH_EXPERT),
    "random_prefix": Arm("random prefix", guided("fixed_prefix", random_prefix=True, advantage__std=True), WITH_EXPERT),
}
