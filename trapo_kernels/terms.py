"""This file has the terms of a token's loss, with their values and slopes; the longer formulas are in the folder
formulas/.

Notation: y is a token's target, z the logits that the softmax sees, logp = log π(y), p = exp(logp), H the entropy of π,
A the advantage, r = exp(logp − old_logp) the ratio (1 with the gradient of logp where no old_logprobs are given), sg
stop-gradient.

A term is one `Term`: its value, differentiable by autograd (the oracle and the two-pass path use that), and its
slopes ∂value/∂logp, ∂value/∂H and ∂value/∂z_y (the streamed path uses those, since

    dL/dz_j = g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H) + g_z 1[j=y]

needs no more). tests/test_objective.py holds the two together in float64, and tests/test_terms.py holds both to a plain
transcription of the published formula. A new term is an entry of a table; a function of yours is one (`own_term`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .formulas import dppo, lco, pear, sapo
from .formulas.custom import OwnFunction, function_name, slopes_by_autograd
from .formulas.ratios import (
    clipped_where,
    k3,
    log_of_clipped_ratio,
    log_ratio,
    possible,
    probability,
    ratio_unless,
    weighted,
)
from .tokens import Slopes, Tokens, given

if TYPE_CHECKING:
    from .objective import Objective

__all__ = ["EXPERT_TERMS", "POLICY_TERMS", "Term", "own_term"]


@dataclass(frozen=True)
class Term:
    """Is a loss of one token. `slope` is ∂value/∂logp; `entropy_slope` and `logit_slope` are ∂value/∂H and ∂value/∂z_y,
    where the value depends on them. A term with `own` has no slopes in closed form: autograd finds them."""

    value: Callable[[Objective, Tokens], Tensor]
    slope: Callable[[Objective, Tokens], Tensor] | None
    source: str
    needs: tuple[str, ...] = ()  # inputs without which the term has no value
    reads: tuple[str, ...] = ()  # inputs used where given
    scales_with_advantage: bool = False  # A = 0 gives no gradient
    entropy_slope: Callable[[Objective, Tokens], Tensor] | None = None
    logit_slope: Callable[[Objective, Tokens], Tensor] | None = None
    statistics: Callable[[Objective], tuple[str, ...]] = lambda o: ()  # statistics of a row that the value reads
    coupled: bool = False  # the value of a token depends on others of its sequence: no gradient in a single pass
    reference_head: bool = False  # a divergence from a reference head is added to it
    own: frozenset[str] | None = None  # a user's function: which of the three its value depends on
    fields: tuple[str, ...] = ()  # fields of the objective that change the value
    fused: int = 0  # the term's number in row kernels that compute slopes themselves; 0: none of them knows it

    @property
    def reads_logit(self) -> bool:
        return self.logit_slope is not None or (self.own is not None and "target_logits" in self.own)

    def slopes(self, o: Objective, t: Tokens) -> Slopes:
        """Returns all slopes of the term [n]."""
        if self.own is not None:
            return slopes_by_autograd(self.value, self.own, o, t)
        each = (self.slope, self.entropy_slope, self.logit_slope)
        return Slopes(*(None if slope is None else slope(o, t) for slope in each))


# Expert terms ------------------------------------------------------------------------------------------------


def _sft_value(o: Objective, t: Tokens) -> Tensor:
    return -t.logprobs


def _sft_slope(o: Objective, t: Tokens) -> Tensor:
    return torch.full_like(t.logprobs, -1.0)


def _trsft_value(o: Objective, t: Tokens) -> Tensor:
    # ℓ(p) = −log p for p ≥ α, else 1 − log α − p/α: C¹, with the gradient of the authors' −p/sg(max(p, α)).
    inside = t.logprobs >= math.log(o.alpha)
    below = torch.rsub(probability(t), 1 - math.log(o.alpha), alpha=1 / o.alpha)
    return torch.where(inside, -t.logprobs, below)


def _trsft_slope(o: Objective, t: Tokens) -> Tensor:
    return -(t.logprobs.exp() / o.alpha).clamp(max=1)


def _dft_value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(t.logprobs.detach().exp(), t.logprobs)


def _dft_slope(o: Objective, t: Tokens) -> Tensor:
    return -t.logprobs.exp()


def _weighted_value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(given(t.advantages), t.logprobs)


def _weighted_slope(o: Objective, t: Tokens) -> Tensor:
    return -given(t.advantages)


def _luffy_value(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -given(t.advantages) * p / (p + o.luffy_gamma)


def _luffy_slope(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -given(t.advantages) * o.luffy_gamma * p / (p + o.luffy_gamma) ** 2


def _chord_weight(t: Tokens) -> Tensor:
    return (t.logprobs.exp() * -torch.expm1(t.logprobs)).detach()  # p (1 − p)


def _chord_value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(_chord_weight(t), t.logprobs)


def _chord_slope(o: Objective, t: Tokens) -> Tensor:
    return -_chord_weight(t)


def _sed_spread(o: Objective, t: Tokens) -> Tensor:
    """Returns λ where the k likeliest classes hold less than τ, else 0 [n]."""
    return o.sed_coef * (t.statistics[f"top{o.sed_k}_mass"] < o.sed_tau).to(t.logprobs.dtype)


def _sed_value(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -t.logprobs + _sed_spread(o, t) * (p - 0.5).square()


def _sed_slope(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return _sed_spread(o, t) * p * (2 * p - 1) - 1


def _eaft_weight(o: Objective, t: Tokens) -> Tensor:
    return (t.statistics["top20_entropy"] / 3) ** o.eaft_power


def _eaft_value(o: Objective, t: Tokens) -> Tensor:
    return -weighted(_eaft_weight(o, t), t.logprobs)


def _eaft_slope(o: Objective, t: Tokens) -> Tensor:
    return -_eaft_weight(o, t)


EXPERT_TERMS: dict[str, Term] = {
    "sft": Term(_sft_value, _sft_slope, source="negative log-likelihood", fused=1),
    "trsft": Term(
        _trsft_value,
        _trsft_slope,
        source="TRAPO, arXiv 2512.17636: weight 1/max(p, α) on ∇p",
        fields=("alpha",),
        fused=2,
    ),
    "dft": Term(_dft_value, _dft_slope, source="Dynamic Fine-Tuning, the authors' code: −sg(p) log p", fused=3),
    "luffy": Term(
        _luffy_value,
        _luffy_slope,
        source="LUFFY, the authors' code: off-policy shaping p/(p+γ), A over on- and off-policy rollouts",
        needs=("advantages",),
        scales_with_advantage=True,
        fields=("luffy_gamma",),
        fused=4,
    ),
    "weighted": Term(
        _weighted_value,
        _weighted_slope,
        source="−A log p: Prefix-RFT, arXiv 2507.01679, with r = 1; SRFT, arXiv 2506.19767, whose A is a weight",
        needs=("advantages",),
        scales_with_advantage=True,
    ),
    "chord": Term(_chord_value, _chord_slope, source="CHORD-φ, the authors' code: −sg(p(1−p)) log p"),
    "sed": Term(
        _sed_value,
        _sed_slope,
        source="SED-SFT, the authors' code: −log p + λ·1[top-k mass < τ]·(p − ½)²",
        statistics=lambda o: (f"top{o.sed_k}_mass",),
        fields=("sed_coef", "sed_k", "sed_tau"),
    ),
    "eaft": Term(
        _eaft_value,
        _eaft_slope,
        source="EAFT, the authors' code: −sg((H_top20/3)^a) log p",
        statistics=lambda o: ("top20_entropy",),
        fields=("eaft_power",),
    ),
    "asft": Term(
        _dft_value,
        _dft_slope,
        source="ASFT, the authors' code: −sg(p) log p + λ·KL(π_ref ‖ π), the latter by divergence/",
        reference_head=True,
        fields=("asft_kl",),
        fused=3,
    ),
    "pear": Term(
        pear.value,
        pear.slope,
        source="PEAR, arXiv 2602.01058, second-hand: discounted suffix importance ratios to the behaviour policy",
        needs=("old_logprobs",),
        coupled=True,
        fields=("pear_gamma", "pear_low", "pear_high", "pear_floor", "pear_ceil", "pear_level", "pear_block"),
    ),
    "lco_mse": Term(
        lco.mse_value,
        None,
        source="LCO-MSE, second-hand: (z_y − sg(z_y + A/β'))²",
        needs=("advantages",),
        scales_with_advantage=True,
        logit_slope=lco.mse_slope,
        fields=("lco_beta", "lco_neg"),
    ),
    "lco_logcosh": Term(
        lco.logcosh_value,
        None,
        source="LCO with log cosh (LCH), second-hand: log cosh(z_y − sg(z_y + A/β'))",
        needs=("advantages",),
        scales_with_advantage=True,
        logit_slope=lco.logcosh_slope,
        fields=("lco_beta", "lco_neg"),
    ),
    "lco_kld": Term(
        lco.kld_value,
        lco.kld_slope,
        source="LCO-KLD, second-hand: KL(q ‖ π) for q = softmax(log π_old + A/β' at y), as −sg((q − p)/(1 − p)) log p",
        needs=("advantages",),
        reads=("old_logprobs",),
        fields=("lco_beta", "lco_neg"),
    ),
}


# Policy terms ------------------------------------------------------------------------------------------------


def _unclipped_value(o: Objective, t: Tokens) -> Tensor:
    advantages = given(t.advantages)
    return -ratio_unless(advantages == 0, log_ratio(t)) * advantages


def _unclipped_slope(o: Objective, t: Tokens) -> Tensor:
    return _unclipped_value(o, t)  # d exp(x) = exp(x) dx


def _stopped(o: Objective, t: Tokens, log_r: Tensor) -> list[tuple[Tensor, float]]:
    """Returns (where it takes the gradient away [n], the ratio there) of each bound of the clip."""
    bounds = (o.clip_low, o.clip_high, o.dual_clip)
    if bounds == (None, None, None):
        return []
    ends = (1 - (o.clip_low or 0), 1 + (o.clip_high or 0), o.dual_clip or 0)
    found = zip(clipped_where(o, t, log_r), ends, bounds, strict=True)
    return [(where, end) for where, end, bound in found if bound is not None]


def _without_gradient(advantages: Tensor, stopped: list[tuple[Tensor, float]]) -> Tensor:
    """Returns where the ratio has none [n]."""
    none = advantages == 0
    for beyond, _ in stopped:
        none = none | beyond
    return none


def _clip_value(o: Objective, t: Tokens) -> Tensor:
    log_r, advantages = log_of_clipped_ratio(o, t), given(t.advantages)
    stopped = _stopped(o, t, log_r)
    r = ratio_unless(_without_gradient(advantages, stopped), log_r)
    for beyond, bound in stopped:
        r = torch.where(beyond, bound, r)
    return -r * advantages


def _clip_slope(o: Objective, t: Tokens) -> Tensor:
    log_r, advantages = log_of_clipped_ratio(o, t), given(t.advantages)
    none = _without_gradient(advantages, _stopped(o, t, log_r))
    return (-ratio_unless(none, log_r) * advantages).masked_fill(none, 0)


def _inside_clip(o: Objective, r: Tensor) -> Tensor:
    low = 0.0 if o.clip_low is None else 1 - o.clip_low
    return r.clamp(low, math.inf if o.clip_high is None else 1 + o.clip_high)


def _cispo_weight(o: Objective, t: Tokens) -> Tensor:
    advantages = given(t.advantages)
    return _inside_clip(o, ratio_unless(advantages == 0, log_ratio(t).detach())) * advantages


def _cispo_value(o: Objective, t: Tokens) -> Tensor:
    return -_cispo_weight(o, t) * possible(t.logprobs)


def _cispo_slope(o: Objective, t: Tokens) -> Tensor:
    return -_cispo_weight(o, t)


_POLICY_INPUTS: dict[str, Any] = {
    "needs": ("advantages",),
    "reads": ("old_logprobs",),
    "scales_with_advantage": True,
}

POLICY_TERMS: dict[str, Term] = {
    "unclipped": Term(
        _unclipped_value,
        _unclipped_slope,
        source="importance-weighted policy gradient",
        fused=1,  # clip without bounds
        **_POLICY_INPUTS,
    ),
    "clip": Term(
        _clip_value,
        _clip_slope,
        source="PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729; asymmetric: DAPO, arXiv 2503.14476",
        fields=("clip_low", "clip_high", "dual_clip"),
        fused=1,
        **_POLICY_INPUTS,
    ),
    "gspo": Term(
        _clip_value,
        _clip_slope,
        source="GSPO, arXiv 2507.18071, token form: the ratio of a sequence, sg(s)·p/sg(p), clipped",
        coupled=True,
        fields=("clip_low", "clip_high"),
        **_POLICY_INPUTS,
    ),
    "cispo": Term(
        _cispo_value,
        _cispo_slope,
        source="CISPO (MiniMax-M1, arXiv 2506.13585): −sg(clip r)·A·log p",
        fields=("clip_low", "clip_high"),
        **_POLICY_INPUTS,
    ),
    **{
        f"dppo_{name}": Term(
            dppo.value, dppo.slope, source=source, fields=("clip_low", "clip_high", "dppo_cap"), **_POLICY_INPUTS
        )
        for name, source in dppo.SOURCES.items()
    },
    "sapo": Term(
        sapo.value,
        sapo.slope,
        source="SAPO: −(4/τ)·σ(τ(r−1))·A, τ by the sign of A",
        fields=("sapo_tau_pos", "sapo_tau_neg"),
        **_POLICY_INPUTS,
    ),
}


# Terms beside those two --------------------------------------------------------------------------------------


def _above_policy(t: Tokens) -> Tensor:
    """Returns ref_logp − logp [n]; 0 where both are −inf."""
    ref = given(t.ref_logprobs)
    neither = (ref == -torch.inf) & (t.logprobs == -torch.inf)
    return ref.masked_fill(neither, 0) - t.logprobs.masked_fill(neither, 0)


def _k3_value(o: Objective, t: Tokens) -> Tensor:
    return k3(_above_policy(t))


def _k3_slope(o: Objective, t: Tokens) -> Tensor:
    return -torch.expm1(_above_policy(t))


K3 = Term(_k3_value, _k3_slope, source="Schulman 2020, 'Approximating KL divergence'", needs=("ref_logprobs",))

ENTROPY = Term(
    lambda o, t: t.entropy,
    None,
    source="Shannon entropy of the whole distribution, in nats",
    entropy_slope=lambda o, t: torch.ones_like(t.entropy),
)


# Terms of your own -------------------------------------------------------------------------------------------


def own_term(fn: Callable[..., Tensor]) -> Term:
    """Returns a function of per-token tensors [n] as a term: its parameters' names say what it reads.

    Names: logprobs, entropy, target_logits, which have a gradient; advantages, old_logprobs, ref_logprobs,
    rollout_logprobs, which must be given to the loss unless the parameter has a default; statistics of a row
    (top20_mass, top20_entropy, sum_sq, argmax_match, mean_logit). Any other parameter has a number as its default, and
    keeps it. The function returns the loss of each token [n]. It is called on chunks of tokens, in any order: one
    token's loss must not depend on another's.

    Raises:
        TypeError: a parameter is none of these.
    """
    own = OwnFunction.of(fn)
    return Term(
        lambda o, t: own.value(t),
        None,
        source=f"{getattr(fn, '__module__', None)}.{function_name(fn)}",
        needs=own.needs,
        reads=own.reads,
        statistics=lambda o: own.statistics,
        own=own.differentiable,
    )
