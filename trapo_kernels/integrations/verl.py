"""This adapter gives verl an actor loss with an expert mask, in verl's registry of policy losses.

verl finds this module by its entry point (group "verl.plugins"), or by VERL_USE_EXTERNAL_MODULES=
trapo_kernels.integrations.verl. Importing it registers the policy loss "trapo":

    actor_rollout_ref.actor.policy_loss.loss_mode=trapo

A batch that has a field "expert_mask", of the shape of response_mask, gets the expert term there: verl's own `ppo_loss`
hands no mask to a policy loss, so importing this replaces it, for this loss mode and such batches. What puts the field
there is `trapo.integrations.verl`, an agent loop with expert prefixes, or you.

Importing it also registers the distillation losses of verl_distillation.py and the head of verl_head.py
(`impl_backend=trapo`). verl's engines hand over log-probabilities, so the loss takes two passes (four GEMMs).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.utils import losses as verl_losses

from ..formulas.ratios import clipped, log_ratio
from ..objective import Objective
from ..paths import batch_of_logprobs
from ..tokens import Tokens
from . import verl_distillation  # noqa: F401  registers
from .verl_head import FusedLinearForPPO, use_fused_head

__all__ = ["FusedLinearForPPO", "actor_loss", "actor_objective", "ppo_loss", "trapo_policy_loss", "use_fused_head"]

NAME = "trapo"  # of the policy loss

# What the loss reads from a batch, where it is there.
FIELDS = (
    *("response_mask", "advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs", "rollout_is_weights"),
    "expert_mask",
)
INPUTS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "policy_weights")


def actor_objective(config: Any, **overrides: Any) -> Objective:
    """Returns the objective that an ActorConfig describes, with TrSFT (α = 0.1) on expert tokens.

    Raises:
        ValueError: kl_loss_type is not the k3 estimate ("low_var_kl", "k3").
    """
    if config.use_kl_loss and config.kl_loss_type not in ("low_var_kl", "k3"):
        raise ValueError(f"actor_objective: kl_loss_type must be 'low_var_kl' or 'k3'; got {config.kl_loss_type!r}")
    settings: dict[str, Any] = {
        "expert": "trsft",
        "policy": "clip",
        "clip_low": config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        "clip_high": config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        "dual_clip": config.get("clip_ratio_c", 3.0),
        "entropy_coef": float(config.entropy_coeff),
        "kl_coef": float(config.kl_loss_coef) if config.use_kl_loss else 0.0,
    }
    return Objective(**{**settings, **overrides})


@register_policy_loss(NAME)
def trapo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    expert_mask: Tensor | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Computes verl's policy loss [B, T] without KL and entropy, which verl adds itself.

    Args:
        expert_mask: [B, T] bool: True = expert-prefix token. None = all own, as verl calls it.
        objective: None = `actor_objective(config)`.
        rollout_is_weights: [B, T], on the policy term.
    """
    objective = replace(objective or actor_objective(config), entropy_coef=0.0, kl_coef=0.0)
    parts, metrics = _token_losses(
        objective, log_prob, response_mask,
        {"advantages": advantages, "old_logprobs": old_log_prob}, None, expert_mask, rollout_is_weights,
    )  # fmt: skip
    total = sum(parts.values(), torch.zeros_like(log_prob))
    loss = agg_loss(loss_mat=total, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return loss, metrics


def actor_loss(
    config: Any, model_output: Any, data: Any, dp_group: Any = None, *, objective: Objective | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Does what verl's `ppo_loss` does, with an expert mask.

    Args:
        config: ActorConfig.
        model_output: log_probs, and entropy where the objective has a bonus, as verl's engines return them.
        data: TensorDict with response_mask, old_log_probs, advantages, and where they exist expert_mask,
            ref_log_prob, rollout_is_weights, rollout_log_probs.
        objective: None = `actor_objective(config)`.

    Every part is reduced by config.loss_agg_mode over the mask, as verl reduces its own.
    """
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    objective = objective or actor_objective(config)
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy", None)
    if entropy is not None:
        entropy = no_padding_2_padding(entropy, data)
    elif objective.entropy_coef:
        raise ValueError("actor_loss: model_output must have entropy with entropy_coef; set actor.calculate_entropy")
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        config.global_batch_info[name] = data[name]
    config.global_batch_info["loss_scale_factor"] = config.loss_scale_factor
    summed = data["dp_size"] > 1 or any(
        value is not None for value in (data["batch_num_tokens"], data["global_batch_size"], config.loss_scale_factor)
    )
    fields = data.select(*(name for name in FIELDS if name in data)).to_padded_tensor()
    inputs = {
        "advantages": fields["advantages"],
        "old_logprobs": fields.get("old_log_probs", None),
        "ref_logprobs": fields.get("ref_log_prob", None),
        "rollout_logprobs": fields.get("rollout_log_probs", None),
    }
    mask = fields["response_mask"].to(bool)
    parts, metrics = _token_losses(
        objective, log_prob, mask, inputs, entropy, _as_wide(fields.get("expert_mask", None), mask),
        fields.get("rollout_is_weights", None),
    )  # fmt: skip
    metrics = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    loss = torch.zeros((), dtype=torch.float32, device=log_prob.device)
    for name, values in parts.items():
        part = agg_loss(loss_mat=values, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **config.global_batch_info)
        loss = loss + part
        aggregation = AggregationType.SUM if summed else AggregationType.MEAN
        metrics[f"actor/{name}_loss"] = Metric(value=part.detach(), aggregation=aggregation)
    return loss, metrics


def _as_wide(expert_mask: Tensor | None, mask: Tensor) -> Tensor | None:
    """Returns the expert mask in the width of the mask: rows that verl adds to fill a batch up have one token and no
    loss, but the expert mask of the row that they were copied from."""
    return None if expert_mask is None else F.pad(expert_mask, (0, mask.shape[1] - expert_mask.shape[1]))


def _token_losses(
    objective: Objective,
    log_prob: Tensor,
    mask: Tensor,
    inputs: dict[str, Tensor | None],
    entropy: Tensor | None,
    expert_mask: Tensor | None,
    weights: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (weighted loss of each part per token [B, T], metrics). `weights` multiply the policy term."""
    for name, setting in objective.needs.items():
        if inputs.get(name) is None:
            raise ValueError(f"actor_loss: {name} must be in the batch, which {setting} needs; got None")
    if objective.coupled or objective.reads_logit or objective.reference_head or objective.statistics:
        raise ValueError(f"actor_loss: objective must read log-probabilities and entropies of tokens; got {objective}")
    active = mask.bool()
    expert = torch.zeros_like(active) if expert_mask is None else expert_mask.bool()
    given = {name: t for name, t in {**inputs, "policy_weights": weights}.items() if t is not None}
    batch, values = batch_of_logprobs(
        "actor_loss", log_prob, replace(objective, reduction="sum"), entropy,
        divisors={"normalizer": 1.0, "expert_normalizer": 1.0},
        floats={name: given[name].expand(active.shape) if name in given else None for name in INPUTS},
        masks={"expert_mask": expert, "mask": active},
    )  # fmt: skip
    return batch.token_losses(values), _metrics(objective, batch.tokens(values))


@torch.no_grad()
def _metrics(objective: Objective, tokens: Tokens) -> dict[str, Any]:
    """Returns the metrics, by verl's names where it has one; means over no token are 0."""
    expert, own = tokens.expert, ~tokens.expert
    mine = tokens.only(own)
    low, high, dual = clipped(objective, mine) if mine.advantages is not None else (own & False,) * 3
    p = tokens.logprobs.exp()

    def mean(values: Tensor, region: Tensor) -> float:
        return float(torch.where(region, values.float(), 0).sum() / region.sum().clamp(min=1))

    found = {
        "actor/pg_clipfrac": mean(low | high, own),
        "actor/pg_clipfrac_lower": mean(dual, own),
        "actor/ppo_kl": mean(-log_ratio(mine), own),
    }
    if bool(expert.any()):
        found["actor/expert_prob"] = mean(p, expert)
        found["actor/expert_fraction"] = float(expert.float().mean())
        found["actor/trsft_clipped"] = mean(p < objective.alpha, expert)
    return found


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Does what verl's `ppo_loss` does; with loss_mode=trapo and an expert_mask in the batch it is `actor_loss`."""
    if config.policy_loss.get("loss_mode", "vanilla") == NAME and "expert_mask" in data:
        return actor_loss(config, model_output, data, dp_group)
    return _loss_of_verl(config, model_output, data, dp_group)


_loss_of_verl = verl_losses.ppo_loss
for _name in ("verl.workers.utils.losses", "verl.trainer.distillation.losses", "verl.workers.engine_workers"):
    if _name in sys.modules:  # each has it under its own name; the workers' module is imported later as a rule
        setattr(sys.modules[_name], "ppo_loss", ppo_loss)  # noqa: B010
