"""This adapter gives prime-rl a custom loss by import path, from log-probabilities; the terms alone, without the head.

    [trainer.loss]
    type = "custom"
    import_path = "trapo_kernels.integrations.prime_rl.policy_loss"

    [trainer.loss.kwargs]
    policy = "clip"
    clip_low = 0.2
    clip_high = 0.28

The function gets one sequence and returns the sum of its token losses; the trainer divides by its token count. Every
keyword is a field of `Objective`. Imports torch alone: prime-rl is not on PyPI, and its two dataclasses are read and
written by their field names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..objective import Objective
from ..paths import batch_of_logprobs
from ..ratios import k3

__all__ = ["LossOutputs", "policy_loss"]


@dataclass
class LossOutputs:
    """Holds what prime-rl reads from a loss: `.loss`, a scalar, and `.metrics`, averaged over sequences."""

    loss: Tensor
    metrics: dict[str, Tensor]


@lru_cache
def _objective(settings: tuple[tuple[str, Any], ...]) -> Objective:
    return Objective(**{"expert": None, "policy": "unclipped", **dict(settings), "reduction": "sum"})


def policy_loss(inputs: Any, **settings: Any) -> LossOutputs:
    """Computes the objective's loss of one sequence, summed over its tokens.

    Args:
        inputs: trainer_logprobs [T], inference_logprobs [T], advantages [T], loss_mask [T] bool; where they exist
            ref_logprobs [T], loss_weights [T] and expert_mask [T] bool.
        **settings: fields of Objective. Default: policy "unclipped", no expert term. The ratio is to the engine that
            sampled; with tis_cap it is to this policy, weighted by the truncated ratio to the engine.

    Raises:
        ValueError: an entropy bonus, which log-probabilities cannot give, or an input that a term needs is missing.
    """
    objective = _objective(tuple(sorted(settings.items())))
    if objective.entropy_coef:
        raise ValueError(f"policy_loss: entropy_coef must be 0, without entropies; got {objective.entropy_coef}")
    if objective.coupled or objective.reads_logit or objective.reference_head or objective.statistics:
        raise ValueError(f"policy_loss: objective must read log-probabilities of tokens alone; got {objective}")
    mask, sampled = inputs.loss_mask.bool(), inputs.inference_logprobs.detach()
    given = {
        "advantages": inputs.advantages,
        "old_logprobs": None if objective.tis_cap is not None else sampled,
        "ref_logprobs": getattr(inputs, "ref_logprobs", None),
        "rollout_logprobs": sampled,
        "policy_weights": None,
    }
    for name, setting in objective.needs.items():
        if given[name] is None:
            raise ValueError(f"policy_loss: {name} must be given, which {setting} needs; got None")
    logprobs, expert = inputs.trainer_logprobs.float(), getattr(inputs, "expert_mask", None)
    batch, values = batch_of_logprobs(
        "policy_loss", logprobs, objective, None, floats=given,
        divisors={"normalizer": 1.0, "expert_normalizer": 1.0},
        masks={"expert_mask": None if expert is None else expert.bool(), "mask": mask},
    )  # fmt: skip
    parts = batch.token_losses(values)
    total, weights = sum(parts.values(), torch.zeros_like(logprobs)), getattr(inputs, "loss_weights", None)
    if weights is not None:  # of the whole loss of a token, where `policy_weights` are of its policy term
        total = total * weights.masked_fill(~mask, 0)
    metrics = {f"loss_{name}": values.detach().sum() / mask.sum().clamp(min=1) for name, values in parts.items()}
    with torch.no_grad():
        metrics["mismatch_kl"] = k3((logprobs - sampled)[mask]).sum() / mask.sum().clamp(min=1)
    return LossOutputs(total.sum(), metrics)
