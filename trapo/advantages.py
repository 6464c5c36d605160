"""Group-relative advantages of one prompt's rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from trapo.collect import Rollout
from trapo.errors import TrapoError

STD_EPS = 1e-6  # GRPO's


def group_advantages(
    rewards: Sequence[float],
    *,
    guided: Sequence[bool],
    own_tokens: Sequence[int],
    baseline: str = "all",
    std: bool = False,
) -> list[float]:
    """A_i = R_i − mean(R over the baseline's rollouts), divided by the group's std + 1e-6 if asked.

    The std is the sample's (n − 1), as in verl and TRL. Equal rewards give exactly 0, so their tokens can be skipped.

    rewards, guided, own_tokens: one entry per rollout of the prompt.
    baseline: `all` rollouts; the `unguided` ones; those that have `own_tokens` (a rollout that is a whole expert trace
    has none: it lifts the mean but has nothing to reward). Falls back to all rollouts where none qualifies.
    """
    chosen = {
        "all": list(rewards),
        "unguided": [r for r, g in zip(rewards, guided, strict=True) if not g],
        "own_tokens": [r for r, n in zip(rewards, own_tokens, strict=True) if n > 0],
    }[baseline] or list(rewards)
    equal = min(chosen) == max(chosen)  # n·r / n need not be r
    mean = chosen[0] if equal else math.fsum(chosen) / len(chosen)
    scale = 1.0
    if std:
        # Of all rollouts, whatever the baseline: that of a few equal ones is 0 and would blow the others up.
        middle = math.fsum(rewards) / len(rewards)
        variance = math.fsum((r - middle) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
        scale = 1.0 / (math.sqrt(variance) + STD_EPS)
    return [(r - mean) * scale for r in rewards]


def assign_advantages(rollouts: Sequence[Rollout], baseline: str, std: bool) -> None:
    """Set `.advantage` of every rollout; rollouts of one prompt must stand side by side, as `collect` gives them."""
    for _, members in groupby(rollouts, key=lambda r: r.group):
        group = list(members)
        rewards = [r.reward for r in group]
        guided, own_tokens = [r.guided for r in group], [len(r.own_ids) for r in group]
        try:
            advantages = group_advantages(rewards, guided=guided, own_tokens=own_tokens, baseline=baseline, std=std)
        except OverflowError:
            largest = max(rewards, key=abs)
            raise TrapoError(
                f"reward.function: got rewards up to {largest:g}, whose mean or variance is too large for a float; "
                "return ordinary numbers, or scale them by reward.range"
            ) from None
        for rollout, advantage in zip(group, advantages, strict=True):
            rollout.advantage = advantage
