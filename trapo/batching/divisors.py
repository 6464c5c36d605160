"""This file says what the summed losses of a minibatch are divided by: the key train.normalizer.

A divisor is that of the whole minibatch, rollouts that are skipped included, so that neither skipping nor the cut into
micro-batches changes the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import trapo_kernels as tk
from trapo.batching.counting import loss_tokens
from trapo.rollouts import Rollout
from trapo.settings.groups import TrainConfig


@dataclasses.dataclass(frozen=True)
class Divisors:
    """Holds the divisors of own tokens' and of expert tokens' losses."""

    own: float
    expert: float


def divisors(
    rollouts: Sequence[Rollout],
    objective: tk.Objective,
    train: TrainConfig,
    *,
    minibatches: int,
    max_response_tokens: int,
) -> Divisors:
    """Returns what the summed losses of a minibatch are divided by.

    minibatches: how many share a constant of the user's. max_response_tokens: what `constant` counts for each rollout
    where the user gives none (Dr.GRPO).
    """
    if _by_regions(objective, train):
        own = sum(len(r.own_ids) for r in rollouts)
        expert = sum(len(r.prefix_ids) for r in rollouts if r.supervised)
        return Divisors(float(max(own, 1)), float(max(expert, 1)))
    if train.normalizer == "tokens":
        tokens = [loss_tokens(r) for r in rollouts]
        counted = {"token_mean": sum(tokens), "sequence_mean": sum(n > 0 for n in tokens), "sum": 1}
        shared = float(max(counted[objective.reduction], 1))
    elif train.normalizer_constant is not None:
        shared = train.normalizer_constant / minibatches
    else:
        shared = float(len(rollouts) * max_response_tokens)
    return Divisors(shared, shared)


def with_entropy_mean(
    rollouts: Sequence[Rollout], objective: tk.Objective, train: TrainConfig, divided_by: float
) -> tk.Objective:
    """Returns the objective whose entropy bonus is a mean over tokens where a constant divides the other parts, as in
    TRAPO's code, verl and TRL."""
    if train.normalizer != "constant" or objective.reduction == "sequence_mean":
        return objective
    tokens = sum(loss_tokens(r) for r in rollouts)
    return dataclasses.replace(objective, entropy_coef=objective.entropy_coef * divided_by / max(tokens, 1))


def _by_regions(objective: tk.Objective, train: TrainConfig) -> bool:
    """Returns whether expert tokens and own tokens each have a mean of their own."""
    chosen = train.normalizer
    return chosen == "regions" or (chosen == "tokens" and objective.reduction == "region_mean")
