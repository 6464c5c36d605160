"""This adapter gives torchtitan's RL trainer a loss in the place of GRPOLoss or DAPOLoss, from the logits that its
model returns.

    from trapo_kernels.integrations.torchtitan import TrapoLoss

    PolicyTrainer.Config(..., loss=TrapoLoss.Config(clip_high=0.28))

Written against torchtitan at commit b5bcd76: `BaseLoss` of torchtitan/components/loss.py, torchtitan/experiments/rl/
losses/dapo.py and the call in torchtitan/experiments/rl/actors/trainer.py. Beside the logits nothing of their size but
their gradient is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import BaseLoss

from ..functional import policy_loss_from_logits
from ..objective import Objective

__all__ = ["TrapoLoss"]


class TrapoLoss(BaseLoss):
    """Computes the loss of an objective over the tokens whose generator log-probability is finite, as DAPOLoss has it.

    Where DAPOLoss bounds |log ratio| at 10 before it is clipped, this loss does not: what lies outside of the clip has
    the clip's value, or the ratio itself where the clip does not bind.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        policy: str = "clip"
        """The policy term: "clip", "unclipped", "cispo", ... (docs/methods.md)."""
        clip_low: float | None = 0.2
        clip_high: float | None = 0.2
        dual_clip: float | None = None
        entropy_coef: float = 0.0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        del compile_config
        self.objective = Objective(
            expert=None, policy=config.policy, clip_low=config.clip_low, clip_high=config.clip_high,
            dual_clip=config.dual_clip, entropy_coef=config.entropy_coef,
        )  # fmt: skip

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Takes pred [..., V]; everything else [...]. Metrics add up over ranks, but those that end in "/max"."""
        kept = loss_mask & torch.isfinite(generator_logprobs)
        divisor = 1.0 if global_valid_tokens is None else max(float(global_valid_tokens), 1.0)
        out = policy_loss_from_logits(
            pred, labels, self.objective, advantages=advantages, mask=kept, normalizer=divisor,
            old_logprobs=generator_logprobs,
        )  # fmt: skip
        m, share = out.metrics, out.metrics["own_tokens"] / divisor
        return out.loss, {
            "loss/mean": m["loss"],
            "loss/ratio_mean": m["ratio_mean"] * share,
            "loss/ratio_clipped_frac": (m["clip_low"] + m["clip_high"]) * share,
            "loss/ratio/max": m["ratio_max"],
            "trainer/entropy/mean": m["entropy"] * share,
        }
