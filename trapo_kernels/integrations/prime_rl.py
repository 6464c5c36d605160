"""This adapter gives prime-rl a custom loss by import path, from log-probabilities; the terms alone.

    [trainer.loss]
    type = "custom"
    import_path = "trapo_kernels.integrations.prime_rl.policy_loss"

    [trainer.loss.kwargs]
    policy = "clip"
    clip_low = 0.2
    clip_high = 0.28

The function gets one sequence and returns the sum of its token losses; the trainer divides by its token count. Every
keyword is a field of `Objective` but the expert term. prime-rl keeps expert tokens in a stream of their own,
`ce_weights`, whose loss no configuration chooses; a module of yours puts ours in its place, and is what import_path
names:

    from trapo_kernels.integrations.prime_rl import policy_loss, use_expert_loss

    use_expert_loss(expert="trsft")

The head is in prime_rl_head.py.

Imports torch alone: prime-rl is not on PyPI, and its two dataclasses are read and written by their field names. Written
against prime-rl at commit 559b447, src/prime_rl/trainer/rl/loss.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..formulas.ratios import k3
from ..objective import Objective
from ..paths import batch_of_logprobs

__all__ = ["LossOutputs", "expert_loss", "policy_loss", "use_expert_loss"]

FLOATS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "policy_weights")


@dataclass
class LossOutputs:
    """Holds what prime-rl reads from a loss: `.loss`, a scalar, and `.metrics`, averaged over sequences."""

    loss: Tensor
    metrics: dict[str, Tensor]


@lru_cache
def _objective(policy: bool, settings: tuple[tuple[str, Any], ...]) -> Objective:
    terms = {"expert": None, "policy": "unclipped"} if policy else {"expert": "trsft", "policy": None}
    return Objective(**{**terms, **dict(settings), "reduction": "sum"})


def policy_loss(inputs: Any, *, adv_tau: float = 1.0, kl_tau: float = 0.0, **settings: Any) -> LossOutputs:
    """Computes the objective's loss of one sequence, summed over its tokens.

    With policy="dppo_tv" and prime-rl's own adv_tau and kl_tau it has the gradient of prime-rl's default loss.

    Args:
        inputs: prime-rl's LossInputs: trainer_logprobs [T], inference_logprobs [T], advantages [T], loss_mask [T] bool;
            ref_logprobs [T] and loss_weights [T] or None.
        adv_tau: factor of the advantages.
        kl_tau: factor of the squared log-ratio to the engine, added to the loss of each token.
        **settings: fields of Objective. Default: policy "unclipped". The ratio is to the engine that sampled; with
            tis_cap it is to this policy, weighted by the truncated ratio to the engine.

    Raises:
        ValueError: an entropy bonus, which log-probabilities cannot give, an expert term, which is `use_expert_loss`'s,
            or an input that a term needs is missing.
    """
    objective = _objective(True, tuple(sorted(settings.items())))
    if objective.expert is not None:
        raise ValueError(f"policy_loss: expert must be None, see use_expert_loss; got {objective.expert!r}")
    sampled = inputs.inference_logprobs.detach()
    given = {
        "advantages": adv_tau * inputs.advantages, "old_logprobs": None if objective.tis_cap is not None else sampled,
        "ref_logprobs": inputs.ref_logprobs, "rollout_logprobs": sampled,
    }  # fmt: skip
    loss, metrics, logprobs = _sum_over("policy_loss", inputs, objective, given)
    if kl_tau:
        weights = 1.0 if inputs.loss_weights is None else inputs.loss_weights
        loss = loss + kl_tau * (weights * (logprobs - sampled).square())[inputs.loss_mask].sum()
    with torch.no_grad():
        mismatch = k3((inputs.trainer_logprobs - sampled)[inputs.loss_mask])
        metrics["mismatch_kl"] = mismatch.sum() / inputs.loss_mask.sum().clamp(min=1)
    return LossOutputs(loss, metrics)


def expert_loss(inputs: Any, **settings: Any) -> LossOutputs:
    """Computes an expert term in the place of prime-rl's `ce_loss_fn`: a sum over the tokens that have ce_weights.

    Args:
        inputs: as `policy_loss`; prime-rl gives no advantages of the expert's that mean something.
        **settings: fields of Objective. Default: TrSFT with α = 0.1. No policy term.

    Raises:
        ValueError: a policy term, an entropy bonus, or a term that needs more than log-probabilities.
    """
    objective = _objective(False, tuple(sorted(settings.items())))
    if objective.policy is not None or objective.needs:
        reason = ", ".join(objective.needs.values()) or f"policy={objective.policy!r}"
        raise ValueError(f"expert_loss: objective must have an expert term alone, of log-probabilities; got {reason}")
    loss, metrics, logprobs = _sum_over("expert_loss", inputs, objective, {})
    count = inputs.loss_mask.sum().clamp(min=1)
    metrics["nll"] = -logprobs.detach()[inputs.loss_mask].sum() / count  # prime-rl's own metric of this stream
    return LossOutputs(loss, {**metrics, "expert_prob": logprobs.detach().exp()[inputs.loss_mask].sum() / count})


def use_expert_loss(**settings: Any) -> None:
    """Gives prime-rl's ce stream the `expert_loss` of these settings, from here on.

    Raises:
        ValueError: as `expert_loss`.
        RuntimeError: prime-rl looks its loss up elsewhere.
    """
    from prime_rl.trainer.rl import loss as prime_rl_loss

    if not hasattr(prime_rl_loss, "ce_loss_fn"):
        raise RuntimeError("use_expert_loss: prime_rl.trainer.rl.loss must have ce_loss_fn; got another version of it")
    none = torch.zeros(0)
    empty = SimpleNamespace(trainer_logprobs=none, loss_mask=none.bool(), loss_weights=None)
    expert_loss(empty, **settings)  # refuses what cannot be
    prime_rl_loss.ce_loss_fn = partial(expert_loss, **settings)


def _sum_over(
    caller: str, inputs: Any, objective: Objective, given: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns (the weighted sum of token losses, the mean of each part, the log-probabilities in fp32)."""
    if objective.entropy_coef:
        raise ValueError(f"{caller}: entropy_coef must be 0, without entropies; got {objective.entropy_coef}")
    if objective.coupled or objective.reads_logit or objective.reference_head or objective.statistics:
        raise ValueError(f"{caller}: objective must read log-probabilities of tokens alone; got {objective}")
    for name, setting in objective.needs.items():
        if given.get(name) is None:
            raise ValueError(f"{caller}: {name} must be given, which {setting} needs; got None")
    mask, logprobs = inputs.loss_mask.bool(), inputs.trainer_logprobs.float()
    batch, values = batch_of_logprobs(
        caller, logprobs, objective, None, floats={**dict.fromkeys(FLOATS), **given},
        divisors={"normalizer": 1.0, "expert_normalizer": 1.0}, masks={"expert_mask": None, "mask": mask},
    )  # fmt: skip
    parts = batch.token_losses(values)
    total = sum(parts.values(), torch.zeros_like(logprobs))
    if inputs.loss_weights is not None:  # of the whole loss of a token, where `policy_weights` are of its policy term
        total = total * inputs.loss_weights.masked_fill(~mask, 0)
    metrics = {f"loss_{name}": values.detach().sum() / mask.sum().clamp(min=1) for name, values in parts.items()}
    return total.sum(), metrics, logprobs
