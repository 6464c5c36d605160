"""This file computes what a loss reports beside its value: 0-dim tensors on the loss's device, computed without a host
sync."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .formulas.ratios import clipped, k3, log_ratio, probability, tis_weight
from .objective import Objective
from .statistics import is_statistic
from .tokens import Regions, Tokens

__all__ = ["METRICS", "Metric", "merge_metrics", "policy_metrics"]


class Metric(NamedTuple):
    """Says how a metric of several calls (micro-batches, ranks) becomes one: `over` is the count a mean is weighted
    by."""

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
    """Returns the metrics of computed tokens [n]. `losses` as `Objective.losses` gives them, filled or not; `counts`
    are reported as given."""
    regions, out = Regions(tokens), dict(counts)
    zero = torch.zeros((), dtype=tokens.logprobs.dtype, device=tokens.logprobs.device)
    values = _values(objective, tokens, regions["expert"].tokens, regions["own"].tokens)
    known = {name: each for name, (_, each) in values.items() if each is not None}
    # All sums in few operations: on a GPU each is a launch, which costs more than what it computes.
    inside = {"expert": tokens.expert, "own": regions.own, "all": tokens.expert | regions.own}
    within = [objective.regions[name] for name in losses] + [values[name][0] for name in known]
    where = torch.stack([inside[region] for region in within])
    each = torch.where(where, torch.stack([*losses.values(), *known.values()]), zero)
    sums, number = each.sum(1), where.sum(1)[len(losses) :]
    parts = sums[: len(losses)] / normalizer
    means = dict(zip(known, sums[len(losses) :] / number.clamp(min=1), strict=True))
    of = dict(zip(known, number, strict=True))
    out["loss"] = parts.sum()
    found = dict(zip(losses, parts, strict=True))
    for name in ("expert", "policy", "entropy", "kl"):
        out[f"loss_{name}"] = found.get(name, zero)
    for name, over in (("expert", "expert_prob"), ("own", "ratio_mean"), ("computed", "entropy")):
        out[f"{name}_tokens"] = of[over]
    if each.shape[1]:
        means["ratio_max"] = each[len(losses) + list(known).index("ratio_mean")].amax()
    return out | dict.fromkeys(values, zero) | means


# The region whose tokens a metric is the mean of, and each token's value [n]; None: it is 0 at every token.
_Values = dict[str, tuple[str, Tensor | None]]


def _values(objective: Objective, tokens: Tokens, expert: Tokens, mine: Tokens) -> _Values:
    """Returns what there are means of; `expert` and `mine` are the expert and the own tokens. "ratio_max" holds its
    place among the names."""
    p, delta = probability(expert), log_ratio(mine)
    values: _Values = {
        "entropy": ("all", tokens.entropy),
        "expert_prob": ("expert", p),
        "trsft_clipped": ("expert", (p < objective.alpha).to(p.dtype)),
        "ratio_mean": ("own", delta.exp()),
        "ratio_max": ("own", None),
    }
    values |= {f"clip_{side}": ("own", where) for side, where in _clipped(objective, mine).items()}
    values |= {"kl_old_k1": ("own", -delta), "kl_old_k3": ("own", k3(delta))}
    if mine.ref_logprobs is not None:
        delta = mine.ref_logprobs - mine.logprobs
        values |= {"kl_ref_k1": ("own", -delta), "kl_ref_k3": ("own", k3(delta))}
    if objective.tis_cap is not None:
        values["tis_weight"] = ("own", tis_weight(objective, mine))
    return values | {name: ("all", each) for name, each in tokens.statistics.items()}


def _clipped(objective: Objective, own: Tokens) -> dict[str, Tensor | None]:
    """Returns 1 where a bound takes the gradient away [n], for each bound that there is."""
    bounds = {"low": objective.clip_low, "high": objective.clip_high, "dual": objective.dual_clip}
    if own.advantages is None or not objective.has_policy_term or not any(b is not None for b in bounds.values()):
        return dict.fromkeys(bounds)
    found = dict(zip(bounds, clipped(objective, own), strict=True))
    return {side: None if bound is None else found[side].to(own.logprobs.dtype) for side, bound in bounds.items()}


def merge_metrics(calls: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the metrics of several calls as those of one: sums add, maxima compete, means are weighted by their
    counts.

    The loss and its parts add up to the loss of the whole where every call was given the same global normalizer.

    Example:
        >>> merge_metrics([{"tokens": torch.tensor(n), "loss": torch.tensor(x)} for n, x in ((1, 0.5), (3, 0.25))])
        {'loss': tensor(0.7500), 'tokens': tensor(4)}
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
