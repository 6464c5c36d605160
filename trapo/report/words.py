"""This file has the words and colours of a run's reports. The page, the picture and the terminal take them from here,
so that one quantity has one name, and one guidance level one name and one colour, wherever it is shown.

The colours are readable on a white page and on a dark one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = [
    "DASHES", "INSIDE", "OUTSIDE", "PARTS", "QUANTITIES", "RUN_COLOURS", "UNGUIDED", "Quantity", "level_colours",
    "level_name", "run_colour",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Says what one number of a step is called."""

    title: str  # over a figure
    unit: str  # at its axis
    column: str = ""  # in the terminal's table; empty: it is not there
    short: str = ""  # there, on a narrow terminal


# By the names in metrics.jsonl and in evaluations.
QUANTITIES: dict[str, Quantity] = {
    "accuracy": Quantity("Held-out accuracy", "accuracy"),
    "own_reward": Quantity("Own reward", "mean, rollouts without prefix", "own reward", "own"),
    "reward": Quantity("Reward of all rollouts, expert text too", "mean reward"),
    "reward_by_ratio": Quantity("Reward by guidance level", "mean reward", "reward@", "@"),
    "rollouts_by_ratio": Quantity("Guidance used", "rollouts"),
    "guided": Quantity("Guided rollouts", "share"),
    "trsft_clipped": Quantity("Expert tokens outside the trust region", "share", "TrSFT clipped", "clip"),
    "trsft_inside": Quantity("Expert tokens inside the trust region", "share"),
    "kl_old_k3": Quantity("KL from the policy that sampled", "nats per token"),
    "kl_ref_k3": Quantity("KL to the reference", "nats per token"),
    "clipped": Quantity("Own tokens past the clip", "share"),
    "expert_prob": Quantity("Probability of expert tokens", "mean p"),
    "expert_prob_histogram": Quantity("Expert tokens by probability", "share of tokens"),
    "entropy": Quantity("Entropy", "nats per token", "entropy", "entropy"),
    "generated_length": Quantity("Length of the model's own part", "tokens"),
    "finished": Quantity("Rollouts that ended by themselves", "share"),
    "zero_advantage": Quantity("Rollouts with zero advantage", "share"),
    "grad_norm": Quantity("Gradient norm", "before clipping", "grad norm", "grad"),
    "lr": Quantity("Learning rate", ""),
    "reward_failures": Quantity("Rewards that failed", "rollouts", "failed rewards", "failed"),
    "tokens_per_second": Quantity("Throughput", "tokens per second", "tokens/s", "tok/s"),
    "seconds_step": Quantity("Time of a step by part", "seconds"),
    "peak_memory_gb": Quantity("Peak memory", "GB"),
    "peak_gpu_memory_gb": Quantity("Peak memory of the GPU", "GB"),
}

# Okabe and Ito's, told apart by people with any kind of colour vision; a run beyond them is dashed.
RUN_COLOURS = ["#1f86d1", "#d9640a", "#12a37c", "#c774a4", "#c99700", "#7a86d6"]
DASHES = ["solid", "dash", "dot", "dashdot"]
# From no guidance to a whole trace: grey, then darker to lighter, by the share of the trace.
UNGUIDED, _GUIDED = "#8b95a5", ["#3f6fd1", "#8b5fd3", "#d0528f", "#ee8a3c", "#e6c229"]
OUTSIDE, INSIDE = "#d9640a", "#1f86d1"  # of the trust region
PARTS = {
    "generate": "#1f86d1",
    "reward": "#c99700",
    "logprobs": "#c774a4",
    "teacher": "#12a37c",
    "collect": "#6aaee0",
    "update": "#d9640a",
    "sync": "#7a86d6",
    "evaluate": "#8a6d3b",
    "save": "#5b6472",
}


def run_colour(index: int) -> str:
    """Returns the colour of the index-th run; of a single run, that of its lines."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def level_name(ratio: str) -> str:
    """Returns what a guidance level is called, by the share of the trace that it gives."""
    return "no prefix" if float(ratio) == 0 else f"prefix {float(ratio):.0%}"


def level_colours(ratios: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each guidance level; one level has one colour in every run and report."""
    return {ratio: _level_colour(float(ratio)) for ratio in ratios}


def _level_colour(ratio: float) -> str:
    if ratio <= 0:
        return UNGUIDED
    place = min(ratio, 1.0) * (len(_GUIDED) - 1)
    low = min(int(place), len(_GUIDED) - 2)
    pairs = zip(_channels(_GUIDED[low]), _channels(_GUIDED[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
