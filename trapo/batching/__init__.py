"""This folder turns rollouts into what an update computes: micro-batches (micro_batches.py), their tensors (batch.py),
the log-probabilities that they are compared with (compared.py), what counts in them (counting.py), and what their
losses are divided by (divisors.py)."""

from __future__ import annotations

from trapo.batching.batch import (
    Batch,
    collate,
    filler,
    layout,
    pack,
    share,
    supports_of,
    target_logprobs,
)
from trapo.batching.compared import set_logprobs
from trapo.batching.counting import expert_part, has_gradient, loss_tokens, own_part
from trapo.batching.divisors import Divisors, divisors, with_entropy_mean
from trapo.batching.micro_batches import Group, groups, is_packed, micro_batches, packs, shuffled_parts

__all__ = [
    "Batch",
    "Divisors",
    "Group",
    "collate",
    "divisors",
    "expert_part",
    "filler",
    "groups",
    "has_gradient",
    "is_packed",
    "layout",
    "loss_tokens",
    "micro_batches",
    "own_part",
    "pack",
    "packs",
    "set_logprobs",
    "share",
    "shuffled_parts",
    "supports_of",
    "target_logprobs",
    "with_entropy_mean",
]
