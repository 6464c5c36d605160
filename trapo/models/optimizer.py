"""AdamW, and the learning rate over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from trapo.errors import TrapoError
from trapo.models.sharding import is_sharded
from trapo.settings.groups import OptimConfig


def make_optimizer(
    model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter], optim: OptimConfig
) -> torch.optim.AdamW:
    """Returns the optimizer of these parameters of a model. Raises TrapoError where they are not float32."""
    if others := [p.dtype for p in parameters if p.dtype != torch.float32]:
        # An AdamW step is about lr in size: added to a 16-bit weight it is rounded away.
        raise TrapoError(f"model.dtype: training needs float32 weights; got {str(others[0]).removeprefix('torch.')}")
    return torch.optim.AdamW(
        parameters,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=has_fused(model),
    )


def has_fused(model: PreTrainedModel) -> bool:
    """Whether AdamW can update these weights in one kernel: on CPUs and GPUs, unless shards are on a CPU."""
    return model.device.type == "cuda" or (model.device.type == "cpu" and not is_sharded(model))


def lr_factor(step: int, optim: OptimConfig, steps: int) -> float:
    """Returns what the learning rate of a step (counted from 0) is multiplied by. Warmup does not start at 0: a step
    whose rollouts were paid for should learn something."""
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    done = min(max(step - optim.warmup_steps, 0) / max(steps - optim.warmup_steps, 1), 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return warmup * decay[optim.schedule]
