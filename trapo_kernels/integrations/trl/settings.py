"""This file reads what a GRPOTrainer's arguments say of its loss: an objective, a reduction, and whether one pass is
enough.

The trainers here are TRL's own or subclasses of them; only attributes that GRPOTrainer sets are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...objective import Objective
from ..grpo_terms import two_pass_masks, two_pass_reason

__all__ = ["objective_of", "per_token", "reduction_of", "token_normalizer", "why_two_passes"]


def objective_of(trainer: Any, expert: str | None = None) -> Objective:
    """Returns the objective that GRPOConfig describes, with this term on expert tokens."""
    delta = trainer.args.delta
    return Objective(
        expert=expert,
        policy="clip",
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        dual_clip=delta if delta is not None and delta > 1 + trainer.epsilon_high else None,
        entropy_coef=trainer.args.entropy_coef,
        kl_coef=trainer.beta,
    )


def why_two_passes(trainer: Any, *, own_objective: bool = False, expert: bool = False) -> str | None:
    """Returns why the trainer's loss needs the log-probabilities before any gradient; None: it does not.

    `own_objective`: an objective decides the terms instead of loss_type; `expert`: there are expert tokens.
    """
    reason = None
    if not own_objective:
        reason = two_pass_reason(
            trainer.loss_type, trainer.importance_sampling_level, delta=trainer.args.delta,
            epsilon_high=trainer.epsilon_high, beta=trainer.beta,
            use_bias_correction_kl=trainer.args.use_bias_correction_kl, entropy=trainer._entropy_bonus_enabled,
            expert=expert,
        )  # fmt: skip
        reason = reason or ("use_adaptive_entropy" if trainer.use_adaptive_entropy else None)
    if reason is not None:
        return reason
    masked = two_pass_masks(trainer.top_entropy_quantile, trainer.off_policy_mask_threshold)
    return "images" if trainer._is_vlm else masked and f"{masked}={getattr(trainer, masked)}"


def token_normalizer(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns TRL's for "dapo": tokens of the accumulation window, per process."""
    count: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if trainer.model.training:
        count = count * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return count


def reduction_of(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, *, own_objective: bool = False, expert: bool = False
) -> tuple[Tensor | None, Tensor]:
    """Returns (weights of the policy term [B, C] or None, normalizer) that give TRL's reduction over the mask [B, C].

    TRL weighs the policy term alone by its weight of a sequence, by its importance ratio between engine and trainer,
    and by the ratio of its normalizer to that of the entropy bonus.
    """
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
    tokens = mask.sum().clamp(min=1).float()
    if trainer.loss_type == "dapo":
        normalizer = token_normalizer(trainer, inputs).float()
    elif trainer.loss_type == "dr_grpo":
        count = float(mask.shape[0] * trainer.max_completion_length * steps)
        normalizer = torch.full((), count, dtype=torch.float32, device=mask.device)
    else:
        normalizer = tokens * steps
    if own_objective:
        return None, normalizer
    weights = None
    if trainer.loss_type == "grpo":
        weights = tokens / mask.shape[0] / mask.sum(-1, keepdim=True).clamp(min=1)
    elif trainer._entropy_bonus_enabled and not expert:
        weights, normalizer = tokens * steps / normalizer, tokens * steps
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        ratio = inputs["importance_sampling_ratio"]  # 1 on expert tokens
        weights = ratio if weights is None else weights * ratio
    return None if weights is None else weights.expand(mask.shape), normalizer


def per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Returns advantages [B] or [B, C] as [B, C]."""
    return (advantages[:, None] if advantages.ndim == 1 else advantages).expand(like.shape).float()
