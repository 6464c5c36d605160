"""This adapter gives SkyRL a policy loss in its registry, from log-probabilities.

    import trapo_kernels.integrations.skyrl as ours     # in your entry point, before the workers start

    ours.register("trapo")                              # then trainer.algorithm.policy_loss_type=trapo

Written against SkyRL at commit a956457: `PolicyLossRegistry` of skyrl/backends/skyrl_train/utils/ppo_utils.py, and the
call in skyrl/backends/skyrl_train/workers/worker.py. SkyRL scales the advantages so that a sum over tokens is the
reduction that its configuration asks for, and adds entropy and KL itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from torch import Tensor

from ..functional import policy_loss_from_logprobs
from ..objective import Objective

__all__ = ["make_policy_loss", "register"]

PolicyLoss = Callable[..., tuple[Tensor, dict[str, float]]]


def register(name: str = "trapo", **settings: Any) -> None:
    """Registers the policy loss of this name, which `trainer.algorithm.policy_loss_type` then chooses.

    `settings`: as `make_policy_loss`.
    """
    PolicyLossRegistry.register(name, make_policy_loss(**settings))


def make_policy_loss(**settings: Any) -> PolicyLoss:
    """Returns a policy loss of SkyRL's signature.

    Args:
        **settings: fields of Objective, over what the configuration says: policy "clip" with its eps_clip_low,
            eps_clip_high, and no expert term.

    Raises:
        ValueError: from the loss, where a term needs what SkyRL does not hand on; the message names it.
    """

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        clip = {"policy": "clip", "clip_low": config.eps_clip_low, "clip_high": config.eps_clip_high}
        objective = Objective(**{"expert": None, **clip, **settings, "reduction": "sum"})
        old = None if objective.tis_cap is not None else old_log_probs
        out = policy_loss_from_logprobs(
            log_probs, objective, advantages=advantages, old_logprobs=old, rollout_logprobs=rollout_logprobs,
            mask=None if loss_mask is None else loss_mask != 0, normalizer=1.0,
        )  # fmt: skip
        m = out.metrics
        return out.loss, {
            "clip_ratio": float(m["clip_low"] + m["clip_high"]),
            "ratio_mean": float(m["ratio_mean"]),
            "ppo_kl": float(m["kl_old_k1"]),
        }

    return policy_loss
