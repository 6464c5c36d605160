"""This file has the GRPO family as TRL's and Liger's losses define it: log-probabilities and entropies [B, T] to a
loss.

Everything here is plain torch on [B, T] tensors; nothing knows the vocabulary. It is what needs a whole sequence, or a
quantity of the whole batch, before the first gradient: sequence ratios, VESPO's weights, top-entropy and off-policy
masks, means over sequences. What needs none of that goes through `Objective` in one pass instead (see liger.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..formulas.ratios import outside_clip

__all__ = ["GRPOOptions", "GRPOTokens", "clipped_tokens", "grpo_loss", "masked_mean", "policy_normalizer"]
__all__ += ["two_pass_reason"]

CLIP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # one formula; they differ in the reduction
ONE_PASS_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")  # "luspo" multiplies the loss of a sequence by its length
LOSSES = (*CLIP_LOSSES, "cispo", "sapo", "vespo")


@dataclass(frozen=True)
class GRPOOptions:
    """Holds Liger's and TRL's settings, by their names, validated."""

    beta: float = 0.04
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, accepted: str) -> None:
            if not ok:
                raise ValueError(f"FusedLinearGRPOLoss: {name} must be {accepted}; got {getattr(self, name)!r}")

        check("loss_type", self.loss_type in LOSSES, "one of " + ", ".join(LOSSES))
        check("importance_sampling_level", self.importance_sampling_level in ("token", "sequence"), "token or sequence")
        sequence = self.importance_sampling_level == "sequence"
        check("loss_type", not sequence or self.loss_type in CLIP_LOSSES, "a clipped one with sequence-level ratios")
        check("sapo_temperature_pos", self.sapo_temperature_pos > 0, "above 0")
        check("sapo_temperature_neg", self.sapo_temperature_neg > 0, "above 0")
        check("delta", self.delta is None or self.delta > 0, "above 0 or None")
        check("top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "in (0, 1]")
        needs_length = self.loss_type == "dr_grpo"
        check("max_completion_length", not needs_length or self.max_completion_length is not None, "given for dr_grpo")

    def single_pass(self) -> str | None:
        """Returns why this needs the log-probabilities before any gradient; None: it does not."""
        reason = two_pass_reason(
            self.loss_type, self.importance_sampling_level, delta=self.delta, epsilon_high=self.epsilon_high,
            beta=self.beta, use_bias_correction_kl=self.use_bias_correction_kl, entropy=self.entropy_coef != 0,
        )  # fmt: skip
        return reason or two_pass_masks(self.top_entropy_quantile, self.off_policy_mask_threshold)


def two_pass_reason(
    loss_type: str,
    importance_sampling_level: str,
    *,
    delta: float | None,
    epsilon_high: float,
    beta: float,
    use_bias_correction_kl: bool,
    entropy: bool,
    expert: bool = False,
) -> str | None:
    """Returns why a loss of these settings needs the log-probabilities before any gradient; None: it does not.

    `entropy`: it has an entropy bonus; `expert`: and expert tokens, with whose terms all token losses share one
    normalizer.
    """
    if loss_type not in ONE_PASS_LOSSES:
        return f"loss_type={loss_type!r}"
    if importance_sampling_level != "token":
        return f"importance_sampling_level={importance_sampling_level!r}"
    if delta is not None and delta <= 1 + epsilon_high:
        return f"delta={delta} within the clip range"
    if beta != 0 and use_bias_correction_kl:
        return "use_bias_correction_kl"
    if loss_type == "grpo" and (expert or beta != 0):
        return "loss_type='grpo' weighs each sequence, expert and KL terms too"
    if beta != 0 and entropy and loss_type != "bnpo" and not expert:
        return "beta and entropy_coef have normalizers of their own"
    return None


def two_pass_masks(top_entropy_quantile: float, off_policy_mask_threshold: float | None) -> str | None:
    """Returns the setting of a mask that needs the log-probabilities or entropies of the whole batch first; None: none
    does."""
    if top_entropy_quantile < 1:
        return "top_entropy_quantile"
    return None if off_policy_mask_threshold is None else "off_policy_mask_threshold"


class GRPOTokens(NamedTuple):
    """Holds what the loss reads [B, T], advantages [B]; `mask` is 1 at the tokens that count."""

    logprobs: Tensor
    entropy: Tensor | None
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_ratio: Tensor | None = None  # π_old / π_engine, already truncated or masked [B, T] or [B, 1]
    sampling_logprobs: Tensor | None = None  # the engine's, for the off-policy mask; None: old_logprobs


def grpo_loss(o: GRPOOptions, t: GRPOTokens, normalizer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns (loss, metrics "kl", "clip_ratio", "entropy" where they exist). `normalizer`: see `policy_normalizer`."""
    advantages, mask = t.advantages[:, None], t.mask
    old = t.logprobs.detach() if t.old_logprobs is None else t.old_logprobs
    log_ratio = t.logprobs - old
    if o.importance_sampling_level == "sequence":
        log_weight = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    else:
        log_weight = log_ratio
    ratio = log_weight.exp()
    loss = _policy_term(o, t, ratio, log_ratio)
    if o.off_policy_mask_threshold is not None:
        loss = loss * _near_policy(o, t, old)
    high_entropy = mask
    if o.top_entropy_quantile < 1:
        assert t.entropy is not None
        high_entropy = mask * _high_entropy(t.entropy.detach(), mask, 1 - o.top_entropy_quantile)
        loss = loss * high_entropy
    if t.sampling_ratio is not None and o.loss_type != "vespo":
        loss = loss * t.sampling_ratio
    metrics: dict[str, Tensor] = {}
    if o.beta != 0:
        ref = t.logprobs.detach() if t.ref_logprobs is None else t.ref_logprobs
        kl = torch.exp(ref - t.logprobs) - (ref - t.logprobs) - 1
        if o.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + o.beta * kl
        metrics["kl"] = masked_mean(kl, mask)
    total = _reduced(o, loss, mask, normalizer)
    if o.entropy_coef != 0:
        assert t.entropy is not None
        total = total - o.entropy_coef * masked_mean(t.entropy, high_entropy)
    metrics["clip_ratio"] = masked_mean(clipped_tokens(o, ratio, advantages).expand_as(mask), mask)
    if t.entropy is not None:
        metrics["entropy"] = masked_mean(t.entropy, mask)
    return total, {name: value.detach() for name, value in metrics.items()}


def policy_normalizer(o: GRPOOptions, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
    """Returns what a sum of token losses is divided by; for "grpo", "sapo" and "luspo", which weigh sequences, the
    batch."""
    if o.loss_type == "bnpo":
        return mask.sum().clamp(min=1)
    if o.loss_type in ("dapo", "cispo", "vespo"):
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=mask.device, dtype=torch.float32)
        else:
            count = mask.sum().float()
            if ranks > 1:
                dist.all_reduce(count)
        return (count / ranks).clamp(min=1)
    length = (o.max_completion_length or 1) if o.loss_type == "dr_grpo" else 1
    return torch.full((), float(mask.shape[0] * length), dtype=torch.float32, device=mask.device)


def _policy_term(o: GRPOOptions, t: GRPOTokens, ratio: Tensor, log_ratio: Tensor) -> Tensor:
    """Returns the loss of a token, or of a sequence [B, 1] with sequence-level ratios."""
    advantages = t.advantages[:, None]
    if o.loss_type == "cispo":  # arXiv 2506.13585; the bound is epsilon_high itself
        return -ratio.clamp(max=o.epsilon_high).detach() * advantages * t.logprobs
    if o.loss_type == "sapo":  # arXiv 2511.20347
        tau = torch.where(advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    if o.loss_type == "vespo":
        return -_gamma_weights(o, t, log_ratio.detach()) * advantages * t.logprobs
    bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)  # INTELLECT-2
    clipped = ratio.clamp(1 - o.epsilon_low, 1 + o.epsilon_high)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def _gamma_weights(o: GRPOOptions, t: GRPOTokens, log_ratio: Tensor) -> Tensor:
    """Returns VESPO's weights: φ(w) = e^λ w^k e^(−λw) of the whole sequence's ratio w, a constant [B, 1]."""
    lowest = math.log(1e-8)
    log_w = (log_ratio.clamp(-20, 20) * t.mask).sum(-1, keepdim=True)
    if t.sampling_ratio is not None:
        log_w = log_w + t.sampling_ratio.log().clamp(lowest, 20).sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, 20)
    up = t.advantages[:, None] >= 0
    k = torch.where(up, o.vespo_k_pos, o.vespo_k_neg)
    lam = torch.where(up, o.vespo_lambda_pos, o.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _near_policy(o: GRPOOptions, t: GRPOTokens, old: Tensor) -> Tensor:
    """Returns DeepSeek-V3.2's mask: a sequence with A < 0 whose mean log(π_engine / π) is over the threshold counts for
    nothing [B, 1]."""
    assert o.off_policy_mask_threshold is not None
    sampled = old if t.sampling_logprobs is None else t.sampling_logprobs
    drift = (sampled - t.logprobs.detach()).nan_to_num(nan=0.0)
    mean = (drift * t.mask).sum(-1, keepdim=True) / t.mask.sum(-1, keepdim=True).clamp(min=1)
    return ((t.advantages[:, None] >= 0) | (mean <= o.off_policy_mask_threshold)).to(drift.dtype)


def _high_entropy(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Returns 1 at tokens whose entropy is at or over the quantile of all active tokens, those of other ranks
    included."""
    values = entropy[mask.bool()].float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        longest = torch.tensor(values.numel(), device=values.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        padded = values.new_full((int(longest),), -1.0)  # no entropy is below 0
        padded[: values.numel()] = values
        found = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(found, padded)
        values = torch.cat(found)
        values = values[values >= 0]
    if values.numel() == 0:
        return torch.zeros_like(mask)
    return (entropy * mask >= torch.quantile(values, quantile)).to(mask.dtype)


def _reduced(o: GRPOOptions, loss: Tensor, mask: Tensor, normalizer: Tensor) -> Tensor:
    if o.loss_type in ("grpo", "sapo"):
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / normalizer
    return (loss * mask).sum() / normalizer


def clipped_tokens(o: GRPOOptions, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Returns 1 where the clip takes the gradient away, else 0."""
    if o.loss_type in ("sapo", "vespo"):
        return torch.zeros_like(ratio)
    if o.loss_type == "cispo":
        return ((ratio > o.epsilon_high) & (advantages > 0)).to(ratio.dtype)
    low, high, _ = outside_clip(ratio, advantages, o.epsilon_low, o.epsilon_high)
    return (low | high).to(ratio.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the mask; 0 over none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
