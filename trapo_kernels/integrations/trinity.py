"""This adapter gives Trinity-RFT a policy loss in its registry, with its expert samples.

    import trapo_kernels.integrations.trinity           # in a plugin of your plugin_dir

    algorithm:
      policy_loss_fn: trapo
      policy_loss_fn_args: {expert: trsft, clip_low: 0.2, clip_high: 0.28}

Written against Trinity-RFT's trinity/algorithm/policy_loss_fn/policy_loss_fn.py (commit 51d229f) and
mix_policy_loss.py beside it (commit 05ad975): `is_expert_mask` [B] says which samples an expert wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trinity.algorithm.policy_loss_fn.policy_loss_fn import POLICY_LOSS_FN, PolicyLossFn

from ..functional import policy_loss_from_logprobs
from ..objective import Objective

__all__ = ["TrapoPolicyLossFn"]


@POLICY_LOSS_FN.register_module("trapo")
class TrapoPolicyLossFn(PolicyLossFn):
    """Computes the loss of an objective, a mean over the tokens of the micro-batch.

    Args:
        backend: Trinity's, not read.
        **settings: fields of Objective. Default: TrSFT on the samples of an expert, ratios clipped at 1 ± 0.2.
    """

    def __init__(self, backend: str = "verl", **settings: Any) -> None:
        self.objective = Objective(**{**self.default_args(), **settings})

    def __call__(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        action_mask: Tensor,
        advantages: Tensor,
        is_expert_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Takes logprob, old_logprob, action_mask, advantages [B, T]; is_expert_mask [B], None = no sample is an
        expert's."""
        expert = torch.zeros_like(action_mask, dtype=torch.bool)
        if is_expert_mask is not None:
            expert = is_expert_mask.bool()[:, None].expand_as(expert)
        out = policy_loss_from_logprobs(
            logprob, self.objective, advantages=advantages, old_logprobs=old_logprob, expert_mask=expert,
            mask=action_mask != 0,
        )  # fmt: skip
        m = out.metrics
        return out.loss, {
            "loss": float(m["loss"]),
            "pg_clipfrac": float(m["clip_low"] + m["clip_high"]),
            "ppo_kl": float(m["kl_old_k1"]),
            "pg_loss": float(m["loss_policy"]),
            "expert/loss": float(m["loss_expert"]),
            "expert/prob": float(m["expert_prob"]),
        }

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        return {"expert": "trsft", "policy": "clip", "clip_low": 0.2, "clip_high": 0.2}
