"""This adapter gives slime a custom loss function, on the log-probabilities and entropies that slime makes of
Megatron's logits.

    --loss-type custom_loss --custom-loss-function-path trapo_kernels.integrations.slime.policy_loss

Written against slime at commit 624b824: `loss_function` and `policy_loss_function` of
slime/backends/megatron_utils/loss.py. The terms are PPO's clip with slime's eps_clip, eps_clip_high and eps_clip_c,
entropy_coef and, with use_kl_loss, kl_loss_coef (k3); `make_policy_loss(policy="cispo", ...)` in a module
of yours is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs
from torch import Tensor

from ..objective import Objective
from ..paths import batch_of_logprobs

__all__ = ["make_policy_loss", "policy_loss"]

DIVISORS: dict[str, Any] = {"normalizer": 1.0, "expert_normalizer": None}
# slime's arguments that change its own loss, and mean nothing to this one
UNREAD = ("use_tis", "use_opsm", "use_unbiased_kl", "custom_pg_loss_reducer_function_path")


def make_policy_loss(**settings: Any) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Returns a loss function of slime's signature; `settings`: fields of Objective, over what slime's arguments say.

    Raises:
        ValueError: from the loss, for a kl_loss_type that is not k3, or a term that a batch has no input for.
    """

    def loss_of(
        args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = _objective(args, settings)
        _, found = get_log_probs_and_entropy(
            logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"], with_entropy=True,
            **get_rollout_top_p_logprob_kwargs(args, batch),
        )  # fmt: skip
        logprobs, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
        old = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
        fields = {"advantages": "advantages", "old_logprobs": old, "ref_logprobs": "ref_log_probs"}
        given = {name: torch.cat(batch[field]) for name, field in fields.items() if batch.get(field)}
        tokens, values = batch_of_logprobs(
            "policy_loss", logprobs, objective, entropy, divisors=DIVISORS, masks={"expert_mask": None, "mask": None},
            floats={**dict.fromkeys((*fields, "rollout_logprobs", "policy_weights")), **given},
        )  # fmt: skip
        parts = {name: sum_of_sample_mean(part) for name, part in tokens.token_losses(values).items()}
        loss = sum(parts.values(), 0 * logits.sum() if logprobs.numel() == 0 else logits.new_zeros(()))
        report = {f"{name}_loss": part.detach() for name, part in parts.items()}
        return loss, {"loss": loss.detach(), "entropy": sum_of_sample_mean(entropy).detach(), **report}

    return loss_of


def _objective(args: Any, settings: dict[str, Any]) -> Objective:
    if args.use_kl_loss and args.kl_loss_type != "k3":  # "low_var_kl" is bounded at 10
        raise ValueError(f"policy_loss: kl_loss_type must be 'k3'; got {args.kl_loss_type!r}")
    for name in UNREAD:
        if getattr(args, name, None):
            raise ValueError(f"policy_loss: {name} must be off, which this loss does not read; got {name} on")
    if "policy" not in settings and args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(f"policy_loss: policy must be set with advantage_estimator={args.advantage_estimator!r}")
    stock = {
        "expert": None, "policy": "clip", "clip_low": args.eps_clip, "clip_high": args.eps_clip_high,
        "dual_clip": args.eps_clip_c, "entropy_coef": args.entropy_coef,
        "kl_coef": args.kl_loss_coef if args.use_kl_loss else 0.0,
    }  # fmt: skip
    return Objective(**{**stock, **settings, "reduction": "sum"})


policy_loss = make_policy_loss()
