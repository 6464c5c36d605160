"""This folder turns rollouts into what an update computes: micro-batches (micro_batches.py), their tensors (batch.py),
what counts in them (counting.py), and what their losses are divided by (divisors.py)."""

from __future__ import annotations

from trapo.batching.batch import Batch, collate, filler, layout, pack, refuse_unsampled, share, target_logprobs
from trapo.batching.counting import has_gradient, loss_tokens
from trapo.batching.divisors import Divisors, divisors, with_entropy_mean
from trapo.batching.micro_batches import Group, groups, micro_batches, packs

__all__ = [
    "Batch",
    "Divisors",
    "Group",
    "collate",
    "divisors",
    "filler",
    "groups",
    "has_gradient",
    "layout",
    "loss_tokens",
    "micro_batches",
    "pack",
    "packs",
    "refuse_unsampled",
    "share",
    "target_logprobs",
    "with_entropy_mean",
]
