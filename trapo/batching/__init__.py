"""From rollouts to what an update computes: micro-batches (micro_batches.py), their tensors (batch.py), and what counts
in them (counting.py)."""

from __future__ import annotations

from trapo.batching.batch import Batch, collate, filler, layout, pack, refuse_unsampled, share, target_logprobs
from trapo.batching.counting import has_gradient, loss_tokens
from trapo.batching.micro_batches import Group, groups, micro_batches, packs

__all__ = [
    "Batch",
    "Group",
    "collate",
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
]
