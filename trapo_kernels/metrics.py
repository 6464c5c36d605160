"""What a loss reports beside its value: 0-dim tensors on the loss's device, computed without a host sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .objective import Objective, Tokens
from .ratios import clipped, k3, log_ratio, tis_weight
from .statistics import is_statistic

__all__ = ["METRICS", "Metric", "merge_metrics", "policy_metrics"]


class Metric(NamedTuple):
    """How a metric of several calls (micro-batches, ranks) becomes one: `over` is the count a mean is weighted by."""

    reduce: Literal["sum", "mean", "max"]
    over: str | None
    doc: str


# The one table of names. Means over no token are 0. Names with a condition are there where it holds.
METRICS: dict[str, Metric] = {
    "loss": Metric("sum", None, "the loss"),
    "loss_expert": Metric("sum", None, "its part from the expert term, expert_coef included"),
    "loss_policy": Metric("sum", None, "its part from the policy term"),
    "loss_entropy": Metric("sum", None, "its part from the entropy bonus: −entropy_coef · ΣH / normalizer"),
    "loss_kl": Metric("sum", None, "its part from the KL term, kl_coef included"),
    "tokens": Metric("sum", None, "active tokens, those left out by skip_inactive included"),
    "expert_tokens": Metric("sum", None, "expert tokens that were computed"),
    "own_tokens": Metric("sum", None, "own tokens that were computed"),
    "zero_gradient_tokens": Metric("sum", None, "active tokens known to have no gradient, computed or left out"),
    "grad_left_out": Metric("max", None, "with grad_tolerance: share of the logit gradients' mass that was left out"),
    "computed_tokens": Metric("sum", None, "expert_tokens + own_tokens"),
    "entropy": Metric("mean", "computed_tokens", "entropy, nats"),
    "expert_prob": Metric("mean", "expert_tokens", "probability of expert tokens"),
    "trsft_clipped": Metric("mean", "expert_tokens", "fraction of expert tokens with p < alpha"),
    "ratio_mean": Metric("mean", "own_tokens", "ratio to old_logprobs (1 where not given)"),
    "ratio_max": Metric("max", None, "largest ratio"),
    "clip_low": Metric("mean", "own_tokens", "fraction with A < 0 and ratio < 1 − clip_low: no gradient"),
    "clip_high": Metric("mean", "own_tokens", "fraction with A > 0 and ratio > 1 + clip_high: no gradient"),
    "clip_dual": Metric("mean", "own_tokens", "fraction with A < 0 and ratio > dual_clip: no gradient"),
    "kl_old_k1": Metric("mean", "own_tokens", "KL(old ‖ policy), k1 estimate: old − logp"),
    "kl_old_k3": Metric("mean", "own_tokens", "KL(old ‖ policy), k3 estimate: r − 1 − log r"),
    "kl_ref_k1": Metric("mean", "own_tokens", "with ref_logprobs: KL(policy ‖ reference), k1: logp − ref"),
    "kl_ref_k3": Metric("mean", "own_tokens", "with ref_logprobs: the same, k3: e^(ref−logp) − (ref−logp) − 1"),
    "tis_weight": Metric("mean", "own_tokens", "with tis_cap: the truncated importance weight"),
}


# Statistics of rows that a caller or an objective asked for are reported under their own names.
_STATISTIC = Metric("mean", "computed_tokens", "a statistic of statistics.py")


def policy_metrics(
    objective: Objective, tokens: Tokens, losses: Mapping[str, Tensor], normalizer: Tensor, counts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the metrics of computed tokens [n]. `losses` as `Objective.losses` gives them; `counts` are reported as
    given."""
    expert, own = tokens.expert, tokens.own_tokens
    mine = tokens.only(own)

    def mean(values: Tensor, region: Tensor) -> Tensor:
        return torch.where(region, values, 0).sum() / region.sum().clamp(min=1)

    out = dict(counts)
    parts = {name: losses[name].sum() / normalizer for name in losses}
    zero = torch.zeros((), dtype=tokens.logprobs.dtype, device=tokens.logprobs.device)
    out["loss"] = sum(parts.values(), zero)
    for name in ("expert", "policy", "entropy", "kl"):
        out[f"loss_{name}"] = parts.get(name, zero)
    out["expert_tokens"], out["own_tokens"] = expert.sum(), own.sum()
    out["computed_tokens"] = out["expert_tokens"] + out["own_tokens"]
    out["entropy"] = mean(tokens.entropy, expert | own)
    p = tokens.logprobs.exp()
    out["expert_prob"] = mean(p, expert)
    out["trsft_clipped"] = mean((p < objective.alpha).to(p.dtype), expert)
    delta = log_ratio(mine)
    ratio = delta.exp()
    out["ratio_mean"] = mean(ratio, own)
    out["ratio_max"] = torch.cat([torch.where(own, ratio, 0), zero[None]]).amax()
    out |= {f"clip_{side}": mean(where.to(p.dtype), own) for side, where in _clipped(objective, mine).items()}
    out["kl_old_k1"], out["kl_old_k3"] = mean(-delta, own), mean(k3(delta), own)
    if mine.ref_logprobs is not None:
        delta = mine.ref_logprobs - mine.logprobs
        out["kl_ref_k1"], out["kl_ref_k3"] = mean(-delta, own), mean(k3(delta), own)
    if objective.tis_cap is not None:
        out["tis_weight"] = mean(tis_weight(objective, mine), own)
    out |= {name: mean(values, expert | own) for name, values in tokens.statistics.items()}
    return out


def _clipped(objective: Objective, own: Tokens) -> dict[str, Tensor]:
    none = torch.zeros_like(own.expert)
    clips = own.advantages is not None and objective.has_policy_term
    low, high, dual = clipped(objective, own) if clips else (none, none, none)
    return {"low": low, "high": high, "dual": dual}


def merge_metrics(calls: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the metrics of several calls as those of one: sums add, maxima compete, means are weighted by their
    counts.

    The loss and its parts add up to the loss of the whole where every call was given the same global normalizer.
    """
    calls = list(calls)
    out: dict[str, Tensor] = {}
    seen = dict.fromkeys(name for call in calls for name in call if is_statistic(name))
    for name, metric in {**METRICS, **dict.fromkeys(seen, _STATISTIC)}.items():
        present = [call for call in calls if name in call]
        if not present:
            continue
        values = torch.stack([call[name] for call in present])
        if metric.over is None:
            out[name] = values.amax() if metric.reduce == "max" else values.sum()
        else:
            counts = torch.stack([call[metric.over] for call in present])
            out[name] = (values * counts).sum() / counts.sum().clamp(min=1)
    return out
