"""This file says what counts in an update: which rollouts have a gradient, and which of their tokens are in the
loss."""

from __future__ import annotations

import dataclasses

import trapo_kernels as tk
from trapo.rollouts import Rollout


def loss_tokens(rollout: Rollout) -> int:
    """Returns how many of a rollout's tokens are in the loss: the share it adds to the token normaliser."""
    return len(rollout.own_ids) + (len(rollout.prefix_ids) if rollout.supervised else 0)


def expert_part(rollout: Rollout) -> Rollout:
    """Returns the rollout up to the end of its prefix: what there is of it for expert tokens alone."""
    shorter = dataclasses.replace(rollout, own_ids=(), rollout_logprobs=None, supports=None)
    for name in ("old_logprobs", "ref_logprobs"):
        if (values := getattr(rollout, name)) is not None:
            setattr(shorter, name, values[: len(shorter) - 1])
    return shorter


def own_part(rollout: Rollout) -> Rollout:
    """Returns the rollout with its prefix as context alone."""
    return dataclasses.replace(rollout, supervised=False)


def has_gradient(rollout: Rollout, objective: tk.Objective, skip_inactive: bool) -> bool:
    """Returns whether a rollout must go through the model. With skip_inactive, one whose every token has a zero
    gradient need not: its advantage is 0, and it has no expert term, no entropy bonus and no KL term."""
    if not skip_inactive:
        return loss_tokens(rollout) > 0
    if rollout.supervised and objective.expert is not None and objective.expert_coef > 0:
        return True
    if objective.entropy_coef or (objective.kl_coef and rollout.own_ids):
        return loss_tokens(rollout) > 0
    # A function of the user's may have a gradient without an advantage.
    return (
        bool(rollout.own_ids) and objective.has_policy_term and (callable(objective.policy) or rollout.advantage != 0.0)
    )
