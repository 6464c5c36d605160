"""Mixed precision of one process runs forward and backward in bfloat16; weights and optimizer are float32.

Sharded models do it in FSDP2 instead (sharding.py), which also sends the weights in bfloat16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from trapo.models.sharding import is_sharded


def resolve(precision: str, device: torch.device) -> str:
    """Returns a value of train.precision with `auto` decided: bfloat16 on GPUs, whose tensor cores are for 16 bits; on
    CPUs few have any."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" else "float32"


def compute_in(precision: str, model: PreTrainedModel) -> AbstractContextManager:
    """Returns the context for a forward. precision: a value of train.precision."""
    precision = resolve(precision, model.device)
    if precision == "float32" or is_sharded(model):
        return nullcontext()
    return torch.autocast(model.device.type, getattr(torch, precision))
