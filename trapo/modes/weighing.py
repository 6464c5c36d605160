"""This file makes tokens weigh what the model's own uncertainty says, for one more forward of the rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trapo.learner import Learner
    from trapo.rollouts import Rollout


def keep_uncertain(rollouts: Sequence[Rollout], learner: Learner, *, keep: float) -> None:
    """Gives the share `keep` of prefix tokens with the highest entropy under the model the advantage of their rollout,
    like own ones, and the others 0 (Prefix-RFT, arXiv 2507.01679)."""
    guided = [r for r in rollouts if r.supervised and r.prefix_ids]
    for rollout, entropies in zip(guided, learner.entropies(guided), strict=True):
        of_prefix = entropies[len(rollout.problem.prompt_ids) - 1 :][: len(rollout.prefix_ids)]
        least = torch.quantile(of_prefix, 1 - keep)
        rollout.prefix_advantages = tuple((rollout.advantage * (of_prefix >= least)).tolist())


def by_entropy(rollouts: Sequence[Rollout], learner: Learner) -> None:
    """Gives a demonstration the weight 0.5·e^−H, a right rollout of the model's own 0.1·e^H and a wrong one −1; H is a
    sequence's mean entropy, without gradient (SRFT, arXiv 2506.19767, as HPT's authors run it)."""
    for rollout, entropies in zip(rollouts, learner.entropies(rollouts), strict=True):
        h = float(entropies[len(rollout.problem.prompt_ids) - 1 :].mean())
        if rollout.prefix_ids:
            rollout.prefix_advantages = (0.5 * math.exp(-h),) * len(rollout.prefix_ids)
        rollout.advantage = 0.1 * math.exp(h) if rollout.reward >= 1 else -1.0
