"""Mixed precision of one process: the forward and backward in bfloat16, weights and optimizer in float32.

Sharded models do it in FSDP2 instead (sharding.py), which also sends the weights in bfloat16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from trapo.sharding import is_sharded


def compute_in(precision: str, model: PreTrainedModel) -> AbstractContextManager:
    """Context for a forward. precision: a value of train.precision."""
    if precision == "float32" or is_sharded(model):
        return nullcontext()
    return torch.autocast(model.device.type, getattr(torch, precision))
