"""What a token's loss is: the terms as data, with their values and slopes. The one place for formulas.

Notation: y is a token's target, logp = log π(y), p = exp(logp), H the entropy of π, A the advantage,
r = exp(logp − old_logp) the ratio (1 with the gradient of logp where no old_logprobs are given), sg stop-gradient.
The loss of a token is

    expert token:   expert_coef · E                                     − entropy_coef · H
    own token:      P · sg(min(exp(old − rollout), tis_cap))            − entropy_coef · H  + kl_coef · K

with E an entry of EXPERT_TERMS, P one of POLICY_TERMS and K the k3 estimate of the KL divergence to the reference.
K is on own tokens alone: it is an estimate from samples, and expert tokens were not sampled from the policy.

A term is one `Term`: its value, differentiable by autograd (the oracle and the two-pass path use that), and its
slope ∂value/∂logp (the streamed path uses that, since dL/dz_j = g_lp (1[j=y] − π_j) − g_H π_j (log π_j + H) needs no
more). tests/test_objective.py holds the two together in float64. To add a term, add an entry to a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .rows.base import FusedTerms

__all__ = ["EXPERT_TERMS", "POLICY_TERMS", "Objective", "Term", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Everything a term may read, one entry per token [n]; `None` where the caller gave nothing."""

    logprobs: Tensor
    entropy: Tensor
    expert: Tensor  # bool: True = expert-prefix token, False = own token
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """The same tokens with `fn` applied to every tensor."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: fn(values) for name, values in given.items()})

    def only(self, region: Tensor) -> Tokens:
        """Zeros outside `region`, so that what a caller padded other tokens with can neither give nor poison
        anything: 0 · NaN in a backward would."""
        outside = ~region
        kept = self.map(lambda t: t if t.dtype == torch.bool else t.masked_fill(outside, 0))
        return replace(kept, expert=self.expert)


@dataclass(frozen=True)
class Term:
    """A loss of one token. `slope` is ∂value/∂logp; `entropy_slope` is ∂value/∂H where the value depends on H."""

    value: Callable[[Objective, Tokens], Tensor]
    slope: Callable[[Objective, Tokens], Tensor] | None
    source: str
    needs: tuple[str, ...] = ()  # inputs without which the term has no value
    reads: tuple[str, ...] = ()  # inputs used where given
    scales_with_advantage: bool = False  # A = 0 gives no gradient
    entropy_slope: Callable[[Objective, Tokens], Tensor] | None = None
    fused: int = 0  # the term's number in row kernels that compute slopes themselves; 0: none of them knows it


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # functional.py has checked `Objective.needs`
    return values


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
    # p log p → 0 as p → 0, which 0 · −inf would not give.
    return -t.logprobs.detach().exp() * t.logprobs.masked_fill(t.logprobs == -torch.inf, 0)


def _dft_slope(o: Objective, t: Tokens) -> Tensor:
    return -t.logprobs.exp()


def _luffy_value(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -_given(t.advantages) * p / (p + o.luffy_gamma)


def _luffy_slope(o: Objective, t: Tokens) -> Tensor:
    p = t.logprobs.exp()
    return -_given(t.advantages) * o.luffy_gamma * p / (p + o.luffy_gamma) ** 2


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
}


# Policy terms ------------------------------------------------------------------------------------------------


def log_ratio(t: Tokens) -> Tensor:
    """log r = logp − old_logp [n]. A token of probability zero has log r = −inf whatever the old probability."""
    old = t.logprobs.detach() if t.old_logprobs is None else t.old_logprobs
    impossible = t.logprobs == -torch.inf
    # Filled before the subtraction: −inf − −inf would leave NaN in its backward.
    difference = t.logprobs.masked_fill(impossible, 0) - old.masked_fill(impossible, 0)
    return difference.masked_fill(impossible, -torch.inf)


def _unclipped_value(o: Objective, t: Tokens) -> Tensor:
    return -log_ratio(t).exp() * _given(t.advantages)


def _unclipped_slope(o: Objective, t: Tokens) -> Tensor:
    return _unclipped_value(o, t)  # d exp(x) = exp(x) dx


def clipped(o: Objective, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Where the clip takes the gradient away [n]: ratio too low (A < 0), too high (A > 0), beyond the dual clip."""
    r, advantages = log_ratio(t).exp(), _given(t.advantages)
    none = torch.zeros_like(t.expert)
    low = none if o.clip_low is None else (advantages < 0) & (r < 1 - o.clip_low)
    high = none if o.clip_high is None else (advantages > 0) & (r > 1 + o.clip_high)
    dual = none if o.dual_clip is None else (advantages < 0) & (r > o.dual_clip)
    return low, high, dual


def _clip_value(o: Objective, t: Tokens) -> Tensor:
    r, advantages = log_ratio(t).exp(), _given(t.advantages)
    low = 0.0 if o.clip_low is None else 1 - o.clip_low
    high = math.inf if o.clip_high is None else 1 + o.clip_high
    loss = -torch.minimum(r * advantages, r.clamp(low, high) * advantages)
    if o.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -o.dual_clip * advantages), loss)
    return loss


def _clip_slope(o: Objective, t: Tokens) -> Tensor:
    low, high, dual = clipped(o, t)
    return _unclipped_value(o, t).masked_fill(low | high | dual, 0)


_POLICY_INPUTS: dict[str, Any] = {
    "needs": ("advantages",),
    "reads": ("old_logprobs",),
    "scales_with_advantage": True,
    "fused": 1,  # unclipped is clip without bounds
}

POLICY_TERMS: dict[str, Term] = {
    "unclipped": Term(
        _unclipped_value, _unclipped_slope, source="importance-weighted policy gradient", **_POLICY_INPUTS
    ),
    "clip": Term(
        _clip_value,
        _clip_slope,
        source="PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729; asymmetric: DAPO, arXiv 2503.14476",
        **_POLICY_INPUTS,
    ),
}


def tis_weight(o: Objective, t: Tokens) -> Tensor:
    """sg(min(π_old / π_rollout, C)) [n]: truncated importance sampling of the engine that sampled the tokens."""
    old = t.logprobs.detach() if t.old_logprobs is None else t.old_logprobs
    return (old - _given(t.rollout_logprobs)).exp().clamp(max=o.tis_cap).detach()


# Terms beside those two --------------------------------------------------------------------------------------


def _k3_value(o: Objective, t: Tokens) -> Tensor:
    difference = _given(t.ref_logprobs) - t.logprobs
    # Beyond 80 the exponential has absorbed the rest; unclamped, inf − inf would be NaN at logp = −inf.
    return torch.expm1(difference) - difference.clamp(max=80)


def _k3_slope(o: Objective, t: Tokens) -> Tensor:
    return -torch.expm1(_given(t.ref_logprobs) - t.logprobs)


K3 = Term(_k3_value, _k3_slope, source="Schulman 2020, 'Approximating KL divergence'", needs=("ref_logprobs",))

ENTROPY = Term(
    lambda o, t: t.entropy,
    None,
    source="Shannon entropy of the whole distribution, in nats",
    entropy_slope=lambda o, t: torch.ones_like(t.entropy),
)


# The objective -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """The loss of a token, as data: an expert term, a policy term and what is added to them.

    Args:
        expert: term on expert-prefix tokens: "trsft", "sft", "dft", "luffy", or None for none.
        alpha: TrSFT's trust region: below this probability the slope is p/α instead of 1. In (0, 1].
        expert_coef: weight of expert tokens against own tokens.
        policy: term on own tokens: "clip", "unclipped", or None for none.
        clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; None = not on that side.
        dual_clip: for A < 0 the loss of a token is at most dual_clip · |A|; above 1, or None.
        entropy_coef: weight of the entropy bonus, on all active tokens (expert tokens too). Nats.
        kl_coef: weight of the k3 estimate of KL(policy ‖ reference), on own tokens.
        tis_cap: cap of the weight π_old / π_rollout on the policy term, or None for no weight.
        luffy_gamma: γ of LUFFY's p/(p + γ).

    Raises:
        ValueError: a field is out of its range; the message names it and what it accepts.
    """

    expert: str | None = "trsft"
    alpha: float = 0.1
    expert_coef: float = 1.0
    policy: str | None = "clip"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    tis_cap: float | None = None
    luffy_gamma: float = 0.1

    def __post_init__(self) -> None:
        self._one_of("expert", EXPERT_TERMS)
        self._one_of("policy", POLICY_TERMS)
        self._number("alpha", "in (0, 1]", lambda x: 0 < x <= 1)
        self._number("expert_coef", "at least 0", lambda x: x >= 0)
        self._number("clip_low", "in [0, 1] or None", lambda x: 0 <= x <= 1, optional=True)
        self._number("clip_high", "at least 0 or None", lambda x: x >= 0, optional=True)
        self._number("dual_clip", "above 1 or None", lambda x: x > 1, optional=True)
        self._number("entropy_coef", "that is finite", lambda x: True)
        self._number("kl_coef", "at least 0", lambda x: x >= 0)
        self._number("tis_cap", "above 0 or None", lambda x: x > 0, optional=True)
        self._number("luffy_gamma", "above 0", lambda x: x > 0)
        for name in ("clip_low", "clip_high", "dual_clip"):
            if self.policy != "clip" and getattr(self, name) is not None:
                raise ValueError(f"Objective: {name} must be None unless policy='clip'; got policy={self.policy!r}")
        if self.policy is None and self.tis_cap is not None:
            raise ValueError("Objective: tis_cap must be None unless there is a policy term; got policy=None")

    def _one_of(self, name: str, table: dict[str, Term]) -> None:
        value = getattr(self, name)
        if value is not None and value not in table:
            accepted = ", ".join(map(repr, table))
            raise ValueError(f"Objective: {name} must be one of {accepted} or None; got {value!r}")

    def _number(self, name: str, accepted: str, ok: Callable[[float], bool], optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and ok(value)):
            raise ValueError(f"Objective: {name} must be a number {accepted}; got {value!r}")

    @property
    def _parts(self) -> list[tuple[str, str, float, Term]]:
        """(region, name, weight, term) of everything with a weight."""
        parts = []
        if self.expert is not None:
            parts.append(("expert", "expert", self.expert_coef, EXPERT_TERMS[self.expert]))
        if self.policy is not None:
            parts.append(("own", "policy", 1.0, POLICY_TERMS[self.policy]))
        parts.append(("own", "kl", self.kl_coef, K3))
        parts.append(("all", "entropy", -self.entropy_coef, ENTROPY))
        return [part for part in parts if part[2] != 0]

    # What it takes

    @property
    def needs(self) -> dict[str, str]:
        """Inputs that must be given (some of advantages, ref_logprobs, rollout_logprobs), each with what needs it."""
        needs: dict[str, str] = {}
        for _, part, _, term in self._parts:
            setting = "kl_coef" if part == "kl" else part
            needs |= {name: f"{setting}={getattr(self, setting)!r}" for name in term.needs}
        if self.tis_cap is not None:
            needs["rollout_logprobs"] = f"tis_cap={self.tis_cap!r}"
        return needs

    @property
    def reads(self) -> frozenset[str]:
        """Names of the inputs that change the loss where given: `needs`, and old_logprobs for a ratio."""
        return frozenset(self.needs) | {name for _, _, _, term in self._parts for name in term.reads}

    @property
    def supervised(self) -> bool:
        """No policy term: without an expert_mask every token is an expert token."""
        return self.policy is None and self.expert is not None

    # What it gives

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        """Weighted loss per token [n] of each part ("expert", "policy", "kl", "entropy"); their sum is the token's
        loss. Differentiable in `tokens.logprobs` and `tokens.entropy`."""
        out = {}
        for region, name, coef, term in self._parts:
            inside = _region(region, tokens)
            seen = tokens.only(inside)
            value = coef * term.value(self, seen)
            if name == "policy" and self.tis_cap is not None:
                value = value * tis_weight(self, seen)
            out[name] = torch.where(inside, value, 0)
        return out

    def slopes(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """(∂loss/∂logp [n], ∂loss/∂H [n]) per token, in closed form; the second is None where no part depends on H."""
        g_lp, g_entropy = torch.zeros_like(tokens.logprobs), None
        for region, name, coef, term in self._parts:
            inside = _region(region, tokens)
            seen = tokens.only(inside)
            weight = tis_weight(self, seen) * coef if name == "policy" and self.tis_cap is not None else coef
            if term.slope is not None:
                g_lp = g_lp + torch.where(inside, weight * term.slope(self, seen), 0)
            if term.entropy_slope is not None:
                part = torch.where(inside, weight * term.entropy_slope(self, seen), 0)
                g_entropy = part if g_entropy is None else g_entropy + part
        return g_lp, g_entropy

    def fused(self) -> FusedTerms | None:
        """This objective as numbers for row kernels that compute slopes themselves; None: they cannot express it."""
        parts = {name: term for _, name, _, term in self._parts}
        numbers = [parts[name].fused if name in parts else None for name in ("expert", "policy")]
        if 0 in numbers:
            return None
        return FusedTerms(
            expert=numbers[0] or 0,
            policy=numbers[1] or 0,
            expert_coef=self.expert_coef,
            alpha=self.alpha,
            luffy_gamma=self.luffy_gamma,
            clip_low=0.0 if self.clip_low is None else 1 - self.clip_low,
            clip_high=math.inf if self.clip_high is None else 1 + self.clip_high,
            dual_clip=math.inf if self.dual_clip is None else self.dual_clip,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
            tis_cap=self.tis_cap or 0.0,
        )

    def has_gradient(self, expert: Tensor, advantages: Tensor | None) -> Tensor:
        """Which tokens can have a gradient at all [n] bool: known before any logit is, so that the others are spared
        the backward. A clipped ratio is not among the reasons: that takes the logprob to know."""
        live = torch.zeros_like(expert)
        for region, _, _, term in self._parts:
            inside = torch.ones_like(expert) if region == "all" else expert if region == "expert" else ~expert
            live |= inside & (_given(advantages) != 0) if term.scales_with_advantage else inside
        return live

    # Named presets: the published loss of a method, nothing of its recipe. No preset sets entropy_coef or kl_coef
    # (TRAPO's and LUFFY's code train with entropy_coef=0.001). Advantages and normaliser are the caller's.

    @classmethod
    def trapo(cls, **overrides: Any) -> Objective:
        """TRAPO (arXiv 2512.17636): TrSFT with α = 0.1 on expert tokens, unclipped policy gradient on own tokens.
        A = R − mean over the group, no std; normaliser: the active tokens of the global batch."""
        return cls(**{"expert": "trsft", "alpha": 0.1, "policy": "clip", **overrides})

    @classmethod
    def grpo(cls, **overrides: Any) -> Objective:
        """GRPO (arXiv 2402.03300): ratio clipped at 1 ± 0.2. A = (R − mean)/(std + 1e-6); normaliser: as published a
        mean over sequences of token means; pass what you use."""
        return cls(**{"expert": None, "policy": "clip", "clip_low": 0.2, "clip_high": 0.2, **overrides})

    @classmethod
    def dr_grpo(cls, **overrides: Any) -> Objective:
        """Dr.GRPO (arXiv 2503.20783): GRPO's clip; A = R − mean, no std; normaliser: sequences × the longest length
        allowed, a constant."""
        return cls.grpo(**overrides)

    @classmethod
    def dapo(cls, **overrides: Any) -> Objective:
        """DAPO (arXiv 2503.14476): clip 0.2 below, 0.28 above; normaliser: the active tokens of the global batch."""
        return cls.grpo(**{"clip_high": 0.28, **overrides})

    @classmethod
    def sft(cls, **overrides: Any) -> Objective:
        """Negative log-likelihood; without an expert_mask on every token. Normaliser: active tokens."""
        return cls(**{"expert": "sft", "policy": None, **overrides})

    @classmethod
    def dft(cls, **overrides: Any) -> Objective:
        """Dynamic Fine-Tuning (arXiv 2508.05629): −sg(p) log p; without an expert_mask on every token."""
        return cls(**{"expert": "dft", "policy": None, **overrides})

    @classmethod
    def luffy(cls, **overrides: Any) -> Objective:
        """LUFFY (arXiv 2504.14945): p/(p + 0.1) shaping on expert tokens, scaled by their advantage; unclipped policy
        gradient on own tokens. A over on- and off-policy rollouts together, no std."""
        return cls(**{"expert": "luffy", "luffy_gamma": 0.1, "policy": "clip", **overrides})


def _region(name: str, tokens: Tokens) -> Tensor:
    if name == "all":
        return torch.ones_like(tokens.expert)
    return tokens.expert if name == "expert" else ~tokens.expert
