"""The terms of a token's loss, with their values and slopes. The one place for formulas.

Notation: y is a token's target, z the logits that the softmax sees, logp = log π(y), p = exp(logp), H the entropy of π,
A the advantage, r = exp(logp − old_logp) the ratio (1 with the gradient of logp where no old_logprobs are given), sg
stop-gradient.

A term is one `Term`: its value, differentiable by autograd (the oracle and the two-pass path use that), and its
slopes ∂value/∂logp, ∂value/∂H and ∂value/∂z_y (the streamed path uses those, since

    dL/dz_j = g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H) + g_z 1[j=y]

needs no more). tests/test_objective.py holds the two together in float64, and tests/test_terms.py holds both to a plain
transcription of the published formula. To add a term, add an entry to a table; a function of yours is a term too
(`own_term`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .statistics import is_statistic

if TYPE_CHECKING:
    from .objective import Objective

__all__ = ["EXPERT_TERMS", "POLICY_TERMS", "Sequences", "Slopes", "Term", "Tokens", "own_term"]


@dataclass(frozen=True)
class Sequences:
    """Which sequence each token belongs to: its number [n], below `rows`. In a sequence, tokens stand in order."""

    row: Tensor  # int64
    rows: int  # at least as many as there are sequences

    @classmethod
    def of(cls, ids: Tensor) -> Sequences:
        """Tokens with one id [n] are a sequence, in the order in which they stand. Nothing waits for a device."""
        ordered, order = ids.sort(stable=True)
        first = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))[: ids.numel()]
        return cls(torch.zeros_like(order).scatter(0, order, first.cumsum(0)), ids.numel())

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device | str = "cpu") -> Sequences:
        """A sequence is a row of [rows, length] tokens."""
        return cls(torch.arange(rows, device=device)[:, None].expand(rows, length).reshape(-1), rows)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sequences:
        """The sequences of those tokens that `fn` takes from a tensor [n]."""
        return replace(self, row=fn(self.row))

    def _sums(self, values: Tensor) -> Tensor:
        """Of each sequence [rows]. In a fixed order: on CUDA an accumulating index_put sorts, where index_add races."""
        sums = values.new_zeros(self.rows)
        if values.is_cuda:
            return sums.index_put((self.row,), values, accumulate=True)
        return sums.index_add(0, self.row, values)

    def total(self, values: Tensor) -> Tensor:
        """Σ over the tokens of a token's sequence [n]."""
        wide = values if values.device.type == "mps" else values.double()  # thousands of tokens, one by one
        return self._sums(wide)[self.row].to(values.dtype)

    def with_any(self, chosen: Tensor) -> Tensor:
        """How many sequences have a `chosen` token (0-dim)."""
        return (self._sums(chosen.long()) > 0).sum()

    def later(self, values: Tensor) -> Tensor:
        """Σ over the tokens that come later in a token's sequence [n]; no gradient."""
        if torch.compiler.is_compiling():  # the number of steps is one of the lengths that a graph is not for
            found: Tensor = torch.ops.trapo_kernels.sums_of_later(values, self.row)
            return found
        return sums_of_later(values, self.row)


def sums_of_later(values: Tensor, row: Tensor) -> Tensor:
    """Σ of `values` [n] over the later tokens of the same `row` [n], by doubling: log n steps, in a fixed order."""
    order = row.argsort(stable=True)
    row, sums, step = row[order], values.detach()[order], 1
    while step < row.numel():
        further = torch.where(row[:-step] == row[step:], sums[step:], 0)
        sums, step = torch.cat([sums[:-step] + further, sums[-step:]]), 2 * step
    after = torch.where(row[:-1] == row[1:], sums[1:], 0)
    after = torch.nn.functional.pad(after, (0, 1))[: row.numel()]
    return torch.zeros_like(after).scatter(0, order, after)


@dataclass(frozen=True)
class Tokens:
    """Everything a term may read, one entry per token [n]; `None` where the caller gave nothing."""

    logprobs: Tensor
    entropy: Tensor
    expert: Tensor  # bool: True = expert-prefix token
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    target_logits: Tensor | None = None  # z_y
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # those an objective asks for
    sequences: Sequences | None = None
    own: Tensor | None = None  # bool; None: every token that is not an expert token

    @property
    def own_tokens(self) -> Tensor:
        return ~self.expert if self.own is None else self.own

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """The same tokens with `fn` applied to every tensor."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: fn(value) for name, value in given.items() if isinstance(value, Tensor)}
        return replace(self, **mapped, statistics={name: fn(value) for name, value in self.statistics.items()})

    def only(self, region: Tensor) -> Tokens:
        """Zeros outside `region`, so that what a caller padded other tokens with can neither give nor poison
        anything: 0 · NaN in a backward would."""
        outside = ~region
        return self.map(lambda t: t if t.dtype == torch.bool else t.masked_fill(outside, 0))


class Slopes(NamedTuple):
    """∂loss/∂logp, ∂loss/∂H and ∂loss/∂z_y per token [n]; None: there is none."""

    logprobs: Tensor | None
    entropy: Tensor | None = None
    target_logits: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """A loss of one token. `slope` is ∂value/∂logp; `entropy_slope` and `logit_slope` are ∂value/∂H and ∂value/∂z_y,
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
    fused: int = 0  # the term's number in row kernels that compute slopes themselves; 0: none of them knows it

    @property
    def reads_logit(self) -> bool:
        return self.logit_slope is not None or (self.own is not None and "target_logits" in self.own)

    def slopes(self, o: Objective, t: Tokens) -> Slopes:
        """All slopes of the term [n]."""
        if self.own is not None:
            return _slopes_by_autograd(self, o, t)
        each = (self.slope, self.entropy_slope, self.logit_slope)
        return Slopes(*(None if slope is None else slope(o, t) for slope in each))


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # functional.py has checked `Objective.needs`
    return values


def _possible(logprobs: Tensor) -> Tensor:
    """logp with 0 for −inf."""
    return logprobs.masked_fill(logprobs == -torch.inf, 0)


def _weighted(weight: Tensor, logprobs: Tensor) -> Tensor:
    """weight · logp, 0 where the weight is: p log p → 0 as p → 0, 0 · −inf is not."""
    return weight * logprobs.masked_fill(weight == 0, 0)


# Expert terms ------------------------------------------------------------------------------------------------


def _sft_value(o: Objective, t: Tokens) -> Tensor:
    return -t.logprobs


def _sft_slope(o: Objective, t: Tokens) -> Tensor:
    return torch.full_like(t.logprobs, -1.0)


def _trsft_value(o: Objective, t: Tokens) -> Tensor:
    # ℓ(p) = −log p for p ≥ α, else 1 − log α − p/α: C¹, with the gradient of the authors' −p/sg(max(p, α)).
    inside = t.logprobs >= math.log(o.alpha)
    return torch.where(inside, -t.logprobs, 1 - math.log(o.alpha) - t.logprobs.exp() / o.alpha)


def _trsft_slope(o: Objective, t: Tokens) -> Tensor:
    return -(t.logprobs.exp() / o.alpha).clamp(max=1)


def _dft_value(o: Objective, t: Tokens) -> Tensor:
    return -_weighted(t.logprobs.detach().exp(), t.logprobs)


def _dft_slope(o: Objective, t: Tokens) -> Tensor:
    return -t.logprobs.exp()


def _luffy_value(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -_given(t.advantages) * p / (p + o.luffy_gamma)


def _luffy_slope(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -_given(t.advantages) * o.luffy_gamma * p / (p + o.luffy_gamma) ** 2


def _chord_weight(t: Tokens) -> Tensor:
    return (t.logprobs.exp() * -torch.expm1(t.logprobs)).detach()  # p (1 − p)


def _chord_value(o: Objective, t: Tokens) -> Tensor:
    return -_weighted(_chord_weight(t), t.logprobs)


def _chord_slope(o: Objective, t: Tokens) -> Tensor:
    return -_chord_weight(t)


def _sed_spread(o: Objective, t: Tokens) -> Tensor:
    """λ where the k likeliest classes hold less than τ, else 0 [n]."""
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
    return -_weighted(_eaft_weight(o, t), t.logprobs)


def _eaft_slope(o: Objective, t: Tokens) -> Tensor:
    return -_eaft_weight(o, t)


def _pear_weight(o: Objective, t: Tokens) -> Tensor:
    """G_t = γ^(T−t) · exp Σ_(j>t) clip(logp_j − logπ_β,j) over the later expert tokens of the sequence [n]."""
    assert t.sequences is not None
    inside = t.expert.to(t.logprobs.dtype)
    steps = log_ratio(t).detach().clamp(o.pear_low, o.pear_high) * inside
    # One exponential: of two factors one may underflow where the other overflows.
    return (t.sequences.later(inside) * math.log(o.pear_gamma) + t.sequences.later(steps)).exp()


def _pear_value(o: Objective, t: Tokens) -> Tensor:
    return -_weighted(_pear_weight(o, t), t.logprobs)


def _pear_slope(o: Objective, t: Tokens) -> Tensor:
    return -_pear_weight(o, t)


def _lco_miss(o: Objective, t: Tokens) -> Tensor:
    """z_y − sg(z_y + A/β') = −A/β', with the gradient of z_y; β' = β for A > 0, else 100 β."""
    z, advantages = _given(t.target_logits), _given(t.advantages)
    z = z.masked_fill(z == -torch.inf, 0)  # ∞ − ∞
    return (z - z.detach()) - torch.where(advantages > 0, advantages / o.lco_beta, advantages / (100 * o.lco_beta))


def _lco_mse_value(o: Objective, t: Tokens) -> Tensor:
    return _lco_miss(o, t).square()


def _where_possible(slope: Tensor, t: Tokens) -> Tensor:
    """A bias of −inf removes a column: its logit has no slope."""
    return slope.masked_fill(_given(t.target_logits) == -torch.inf, 0)


def _lco_mse_slope(o: Objective, t: Tokens) -> Tensor:
    return _where_possible(2 * _lco_miss(o, t).detach(), t)


def _lco_logcosh_value(o: Objective, t: Tokens) -> Tensor:
    miss = _lco_miss(o, t)
    return torch.logaddexp(miss, -miss) - math.log(2)  # log cosh, without its overflow


def _lco_logcosh_slope(o: Objective, t: Tokens) -> Tensor:
    return _where_possible(torch.tanh(_lco_miss(o, t).detach()), t)


EXPERT_TERMS: dict[str, Term] = {
    "sft": Term(_sft_value, _sft_slope, source="negative log-likelihood", fused=1),
    "trsft": Term(_trsft_value, _trsft_slope, source="TRAPO, arXiv 2512.17636: weight 1/max(p, α) on ∇p", fused=2),
    "dft": Term(_dft_value, _dft_slope, source="Dynamic Fine-Tuning, the authors' code: −sg(p) log p", fused=3),
    "luffy": Term(
        _luffy_value,
        _luffy_slope,
        source="LUFFY, the authors' code: off-policy shaping p/(p+γ), A over on- and off-policy rollouts",
        needs=("advantages",),
        scales_with_advantage=True,
        fused=4,
    ),
    "chord": Term(_chord_value, _chord_slope, source="CHORD-φ, the authors' code: −sg(p(1−p)) log p"),
    "sed": Term(
        _sed_value,
        _sed_slope,
        source="SED-SFT, the authors' code: −log p + λ·1[top-k mass < τ]·(p − ½)²",
        statistics=lambda o: (f"top{o.sed_k}_mass",),
    ),
    "eaft": Term(
        _eaft_value,
        _eaft_slope,
        source="EAFT, the authors' code: −sg((H_top20/3)^a) log p",
        statistics=lambda o: ("top20_entropy",),
    ),
    "asft": Term(
        _dft_value,
        _dft_slope,
        source="ASFT, the authors' code: −sg(p) log p + λ·KL(π_ref ‖ π), the latter by divergence.py",
        reference_head=True,
        fused=3,
    ),
    "pear": Term(
        _pear_value,
        _pear_slope,
        source="PEAR, arXiv 2602.01058, second-hand: discounted suffix importance ratios to the behaviour policy",
        needs=("old_logprobs",),
        coupled=True,
    ),
    "lco_mse": Term(
        _lco_mse_value,
        None,
        source="LCO-MSE, second-hand: (z_y − sg(z_y + A/β'))²",
        needs=("advantages",),
        scales_with_advantage=True,
        logit_slope=_lco_mse_slope,
    ),
    "lco_logcosh": Term(
        _lco_logcosh_value,
        None,
        source="LCO with log cosh (LCH), second-hand: log cosh(z_y − sg(z_y + A/β'))",
        needs=("advantages",),
        scales_with_advantage=True,
        logit_slope=_lco_logcosh_slope,
    ),
}


# Policy terms ------------------------------------------------------------------------------------------------


def log_ratio(t: Tokens) -> Tensor:
    """log r = logp − old_logp [n]. A token of probability zero has log r = −inf whatever the old probability."""
    old = t.logprobs.detach() if t.old_logprobs is None else t.old_logprobs
    impossible = t.logprobs == -torch.inf
    # Filled before the subtraction: −inf − −inf would leave NaN in its backward.
    difference = t.logprobs.masked_fill(impossible, 0) - old.masked_fill(impossible, 0)
    return difference.masked_fill(impossible, -torch.inf)


def _ratio_where(counts: Tensor, log_r: Tensor) -> Tensor:
    """r where it `counts`, else 1: an overflown r times a zero, here or in a backward, would be NaN."""
    return log_r.masked_fill(~counts, 0).exp()


def _unclipped_value(o: Objective, t: Tokens) -> Tensor:
    advantages = _given(t.advantages)
    return -_ratio_where(advantages != 0, log_ratio(t)) * advantages


def _unclipped_slope(o: Objective, t: Tokens) -> Tensor:
    return _unclipped_value(o, t)  # d exp(x) = exp(x) dx


def _log_of_clipped_ratio(o: Objective, t: Tokens) -> Tensor:
    """Logarithm of the ratio that the policy term clips [n], with the gradient of logp: log r; for GSPO its mean over
    the own tokens of the sequence, as sg(mean) + logp − sg(logp)."""
    if o.policy != "gspo":
        return log_ratio(t)
    assert t.sequences is not None
    inside = t.own_tokens.to(t.logprobs.dtype)
    log_r = torch.where(t.own_tokens, log_ratio(t).detach(), 0)
    mean = t.sequences.total(log_r) / t.sequences.total(inside).clamp(min=1)
    logprobs = _possible(t.logprobs)
    return mean + (logprobs - logprobs.detach())


def clipped(o: Objective, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Where the clip takes the gradient away [n]: ratio too low (A < 0), too high (A > 0), beyond the dual clip."""
    return _clipped(o, t, _log_of_clipped_ratio(o, t))


def _clipped(o: Objective, t: Tokens, log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r, advantages = log_r.detach().exp(), _given(t.advantages)
    none = torch.zeros_like(t.expert)
    low = none if o.clip_low is None else (advantages < 0) & (r < 1 - o.clip_low)
    high = none if o.clip_high is None else (advantages > 0) & (r > 1 + o.clip_high)
    dual = none if o.dual_clip is None else (advantages < 0) & (r > o.dual_clip)
    return low, high, dual


def _clip_value(o: Objective, t: Tokens) -> Tensor:
    log_r, advantages = _log_of_clipped_ratio(o, t), _given(t.advantages)
    low, high, dual = _clipped(o, t, log_r)
    r = _ratio_where(~(low | high | dual) & (advantages != 0), log_r)
    for beyond, bound in ((low, 1 - (o.clip_low or 0)), (high, 1 + (o.clip_high or 0)), (dual, o.dual_clip or 0)):
        r = torch.where(beyond, bound, r)
    return -r * advantages


def _clip_slope(o: Objective, t: Tokens) -> Tensor:
    log_r, advantages = _log_of_clipped_ratio(o, t), _given(t.advantages)
    low, high, dual = _clipped(o, t, log_r)
    counts = ~(low | high | dual) & (advantages != 0)
    return (-_ratio_where(counts, log_r) * advantages).masked_fill(~counts, 0)


def _inside_clip(o: Objective, r: Tensor) -> Tensor:
    low = 0.0 if o.clip_low is None else 1 - o.clip_low
    return r.clamp(low, math.inf if o.clip_high is None else 1 + o.clip_high)


def _cispo_weight(o: Objective, t: Tokens) -> Tensor:
    advantages = _given(t.advantages)
    return _inside_clip(o, _ratio_where(advantages != 0, log_ratio(t).detach())) * advantages


def _cispo_value(o: Objective, t: Tokens) -> Tensor:
    return -_cispo_weight(o, t) * _possible(t.logprobs)


def _cispo_slope(o: Objective, t: Tokens) -> Tensor:
    return -_cispo_weight(o, t)


def _sapo_gate(o: Objective, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """(τ, r, σ(τ(r − 1))) [n]."""
    # Beyond 80 the gate is 1 and flat; an overflown r would make the backward 0 · ∞.
    r = log_ratio(t).clamp(max=80).exp()
    tau = torch.where(_given(t.advantages) > 0, torch.full_like(r, o.sapo_tau_pos), torch.full_like(r, o.sapo_tau_neg))
    return tau, r, torch.sigmoid(tau * (r - 1))


def _sapo_value(o: Objective, t: Tokens) -> Tensor:
    tau, _, gate = _sapo_gate(o, t)
    return -4 / tau * gate * _given(t.advantages)


def _sapo_slope(o: Objective, t: Tokens) -> Tensor:
    _, r, gate = _sapo_gate(o, t)
    return -4 * gate * (1 - gate) * r * _given(t.advantages)


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
        fused=1,
        **_POLICY_INPUTS,
    ),
    "gspo": Term(
        _clip_value,
        _clip_slope,
        source="GSPO, arXiv 2507.18071, token form: the ratio of a sequence, sg(s)·p/sg(p), clipped",
        coupled=True,
        **_POLICY_INPUTS,
    ),
    "cispo": Term(
        _cispo_value,
        _cispo_slope,
        source="CISPO (MiniMax-M1, arXiv 2506.13585): −sg(clip r)·A·log p",
        **_POLICY_INPUTS,
    ),
    "sapo": Term(
        _sapo_value,
        _sapo_slope,
        source="SAPO: −(4/τ)·σ(τ(r−1))·A, τ by the sign of A",
        **_POLICY_INPUTS,
    ),
}


def tis_weight(o: Objective, t: Tokens) -> Tensor:
    """sg(min(π_old / π_rollout, C)) [n]: truncated importance sampling of the engine that sampled the tokens; 0 where
    π_old is, whatever π_rollout."""
    old = (t.logprobs if t.old_logprobs is None else t.old_logprobs).detach()
    weight = (old - _given(t.rollout_logprobs)).exp().clamp(max=o.tis_cap)
    return weight.masked_fill(old == -torch.inf, 0)


# Terms beside those two --------------------------------------------------------------------------------------


def k3(difference: Tensor) -> Tensor:
    """e^d − 1 − d [n], of a difference of log-probabilities."""
    # Beyond 80 the exponential has absorbed the rest; unclamped, inf − inf would be NaN at d = inf.
    return torch.expm1(difference) - difference.clamp(max=80)


def _above_policy(t: Tokens) -> Tensor:
    """ref_logp − logp [n]; 0 where both are −inf."""
    ref = _given(t.ref_logprobs)
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

_INPUTS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
_DIFFERENTIABLE = ("logprobs", "entropy", "target_logits")


def function_name(fn: Any) -> str:
    """How messages call a function of the user's."""
    return getattr(fn, "__name__", None) or function_name(getattr(fn, "func", type(fn)))


def _is_constant(p: inspect.Parameter) -> bool:
    number = isinstance(p.default, (int, float))
    return number and p.name not in _INPUTS and p.name not in _DIFFERENTIABLE and not is_statistic(p.name)


@torch.compiler.assume_constant_result
def _read_by(fn: Callable[..., Tensor]) -> str:
    """What a function reads, as text, which a compiler can hold: names, with "?" after those that have a default; after
    "!" a parameter that may not be one."""
    parameters = [p for p in inspect.signature(fn).parameters.values() if not _is_constant(p)]
    for p in parameters:
        known = p.name in _INPUTS or p.name in _DIFFERENTIABLE or is_statistic(p.name)
        if not known or p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            return f"!{p}"
    return " ".join(p.name if p.default is p.empty else f"{p.name}?" for p in parameters)


def own_term(fn: Callable[..., Tensor]) -> Term:
    """A function of per-token tensors [n] as a term: its parameters' names say what it reads.

    Names: logprobs, entropy, target_logits, which have a gradient; advantages, old_logprobs, ref_logprobs,
    rollout_logprobs, which must be given to the loss unless the parameter has a default; statistics of a row
    (top20_mass, top20_entropy, sum_sq, argmax_match, mean_logit). Any other parameter has a number as its default, and
    keeps it. The function returns the loss of each token [n]. It is called on chunks of tokens, in any order: one
    token's loss must not depend on another's.

    Raises:
        TypeError: a parameter is none of these.
    """
    name, read = function_name(fn), _read_by(fn)
    if read.startswith("!"):
        accepted = ", ".join((*_DIFFERENTIABLE, *_INPUTS, "statistics of a row"))
        raise TypeError(f"{name}: parameters must be among {accepted}, or have a number as default; got {read[1:]}")
    names = tuple(n.removesuffix("?") for n in read.split())
    given = {n for n in names if n in _INPUTS}
    needs = tuple(n for n in read.split() if n in _INPUTS)

    def value(o: Objective, t: Tokens) -> Tensor:
        inputs = {n: t.statistics[n] if is_statistic(n) else getattr(t, n) for n in names}
        # A default stands for what the caller did not give.
        loss = fn(**{n: v for n, v in inputs.items() if v is not None or n in needs})
        if not isinstance(loss, Tensor) or loss.shape != t.logprobs.shape:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{name}: must return a loss per token, {list(t.logprobs.shape)}; got {got}")
        return loss.to(t.logprobs.dtype)

    return Term(
        value,
        None,
        source=f"{getattr(fn, '__module__', None)}.{name}",
        needs=needs,
        reads=tuple(sorted(given - set(needs))),
        statistics=lambda o: tuple(n for n in names if is_statistic(n)),
        own=frozenset(n for n in names if n in _DIFFERENTIABLE),
    )


def _slopes_by_autograd(term: Term, o: Objective, t: Tokens) -> Slopes:
    """Slopes of a term that has none in closed form."""
    assert term.own is not None
    names = tuple(n for n in _DIFFERENTIABLE if n in term.own)
    if not names:
        return Slopes(None)
    with _autograd():
        inputs: dict[str, Any] = {n: _given(getattr(t, n)).detach().requires_grad_() for n in names}
        loss = term.value(o, replace(t, **inputs))
        if not loss.requires_grad:
            return Slopes(None)
        found = torch.autograd.grad(loss.sum(), list(inputs.values()), allow_unused=True)
    slopes = dict(zip(names, found, strict=True))
    return Slopes(*(slopes.get(n) for n in _DIFFERENTIABLE))


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd, where it is off, and inside an operator (ops.py) too, which runs below autograd: its dispatch keys are
    excluded there. torch.func would be public, but does not go together with the dispatch modes of torch.compile."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield
