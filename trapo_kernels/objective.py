"""The objective says which terms a token's loss is made of, as data; what it needs and what it costs.

The loss of a token is

    expert token:   expert_coef · E                                            − entropy_coef · H
    own token:      policy_coef · P · v · sg(min(exp(old − rollout), tis_cap)) − entropy_coef · H  + kl_coef · K

with E an entry of EXPERT_TERMS, P one of POLICY_TERMS (either may be a function of yours), v one of the policy_weights
(else 1) and K the k3 estimate of the KL divergence to the reference, on own tokens alone: it is an estimate from
samples, and expert tokens were not sampled from the policy. The formulas are in terms.py.

The loss of a batch is Σ w_t · loss_t / normalizer, where `reduction` says what w_t and the default normalizer are:

    token_mean      w = 1                                      the number of active tokens
    region_mean     w = 1                                      of own tokens their number, of expert tokens theirs
    sequence_mean   w = 1 / active tokens of the sequence      the number of sequences with an active token
    sum             w = 1                                      1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .arguments.fields import refusing_unknown, show_signatures
from .arguments.scalars import constant, shown
from .backends.base import FusedTerms
from .formulas import pear
from .formulas.explain import explain, shown_setting
from .formulas.ratios import kept_sequences, tis_fields, tis_is_a_cap, tis_weight, weighs_sequences
from .presets import Presets
from .terms import ENTROPY, EXPERT_TERMS, K3, POLICY_TERMS, Term, own_term
from .tokens import Region, Regions, Slopes, Tokens, given

__all__ = ["EXPERT_TERMS", "FIELDS", "POLICY_TERMS", "REDUCTIONS", "Objective", "Term", "Tokens"]

REDUCTIONS = ("token_mean", "region_mean", "sequence_mean", "sum")
_CLIPPED = ("clip", "gspo", "cispo", "dppo_tv", "dppo_kl")
_CHOICES = {
    "reduction": REDUCTIONS,
    "tis_mode": ("clip", "mask"),
    "tis_level": ("token", "sequence"),
    "pear_level": pear.LEVELS,
}


@dataclass(frozen=True)
class Objective(Presets):
    """Is the loss of a token, as data: an expert term, a policy term and what is added to them. `explain()` says what
    it needs and what it costs.

    Args:
        expert: term on expert-prefix tokens: a name in EXPERT_TERMS, a function of yours (`own_term`), or None.
        alpha: TrSFT's trust region: below this probability the slope is p/α instead of 1. In (0, 1].
        expert_coef: weight of expert tokens against own tokens.
        policy: term on own tokens: a name in POLICY_TERMS, a function of yours, or None for none.
        policy_coef: weight of the policy term.
        clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; None = not on that side.
        dual_clip: for A < 0 the loss of a token is at most dual_clip · |A|; above 1, or None.
        entropy_coef: weight of the entropy bonus, on all active tokens (expert tokens too). Nats.
        kl_coef: weight of the k3 estimate of KL(policy ‖ reference), on own tokens.
        tis_cap, tis_low: highest (and lowest, or None) weight π_old / π_rollout on the policy term; tis_cap=None: none.
        tis_mode, tis_level: "clip" (TIS), or "mask" out beyond the bounds (IcePop); by "token" or "sequence".
        off_policy_mask: above this mean of log π_rollout / π (without rollout_logprobs of π_old) over a sequence's own
            tokens, those with A < 0 have no policy term (DeepSeek-V3.2); None: all have.
        reduction: "token_mean", "region_mean", "sequence_mean" or "sum": weights of tokens and the default normalizers.
        luffy_gamma: γ of LUFFY's p/(p + γ).
        sed_coef, sed_k, sed_tau: λ, k and τ of SED-SFT. The authors' code has λ = 1, k = 2 in the loss (10 where it
            computes τ), and for τ a quantile of the data: see `sed_threshold`. k = 20 and τ = 0.9 are ours.
        eaft_power: a of EAFT.
        asft_kl: λ of ASFT, the weight of KL(reference ‖ policy) over the whole vocabulary, on expert tokens.
        pear_gamma, pear_low, pear_high, pear_floor, pear_ceil: γ of PEAR, its clip of log ratios and that of their
            discounted sum.
        pear_level, pear_block: PEAR weighs each "token" by what follows it, each "block" of pear_block tokens by what
            follows the block, or each whole "sequence".
        lco_beta, lco_neg: β of LCO for A > 0, and the factor on it for the others: 1 in the authors' code for rewards
            by rule, 100 in their older variant of the KLD form.
        sapo_tau_pos, sapo_tau_neg: τ of SAPO for A > 0 and for the others.
        dppo_cap: highest ratio in DPPO (None: any), whose clip_low and clip_high bound p − μ, or the KL.

    Raises:
        TypeError, ValueError: a field is out of its range; the message names it and what it accepts.
    """

    expert: str | Callable[..., Tensor] | None = "trsft"
    alpha: float = 0.1
    expert_coef: float = 1.0
    policy: str | Callable[..., Tensor] | None = "clip"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    tis_cap: float | None = None
    luffy_gamma: float = 0.1
    policy_coef: float = 1.0
    reduction: str = "token_mean"
    sed_coef: float = 1.0
    sed_k: int = 20
    sed_tau: float = 0.9
    eaft_power: float = 1.0
    asft_kl: float = 0.05
    pear_gamma: float = 0.999
    pear_low: float = -0.08
    pear_high: float = 0.3
    pear_floor: float = -10.0
    pear_ceil: float = 5.0
    lco_beta: float = 1.0
    lco_neg: float = 1.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    dppo_cap: float | None = 20.0
    tis_low: float | None = None
    tis_mode: str = "clip"
    tis_level: str = "token"
    pear_level: str = "token"
    pear_block: int = 4
    off_policy_mask: float | None = None

    def __post_init__(self) -> None:
        self._one_of("expert", EXPERT_TERMS)
        self._one_of("policy", POLICY_TERMS)
        self._number("alpha", "in (0, 1]", lambda x: 0 < x <= 1)
        self._number("clip_low", "in [0, 1] or None", lambda x: 0 <= x <= 1, optional=True)
        self._number("clip_high", "at least 0 or None", lambda x: x >= 0, optional=True)
        self._number("dual_clip", "above 1 or None", lambda x: x > 1, optional=True)
        self._number("tis_cap", "above 0 or None", lambda x: x > 0, optional=True)
        self._number("tis_low", "in (0, tis_cap] or None", lambda x: 0 < x <= (self.tis_cap or x), optional=True)
        self._number("dppo_cap", "above 0 or None", lambda x: x > 0, optional=True)
        self._number("off_policy_mask", "at least 0 or None", lambda x: x >= 0, optional=True)
        for name in ("entropy_coef", "pear_low", "pear_high", "pear_floor", "pear_ceil"):
            self._number(name, "that is finite", lambda x: True)
        for name in ("expert_coef", "policy_coef", "kl_coef", "sed_coef", "eaft_power", "asft_kl"):
            self._number(name, "at least 0", lambda x: x >= 0)
        for name in ("luffy_gamma", "sed_tau", "pear_gamma", "lco_beta", "lco_neg", "sapo_tau_pos", "sapo_tau_neg"):
            self._number(name, "above 0", lambda x: x > 0)
        for name in ("sed_k", "pear_block"):
            self._number(name, "that is whole and above 0", lambda x: x > 0 and x == int(x))
            object.__setattr__(self, name, int(getattr(self, name)))
        for name, choices in _CHOICES.items():
            if not isinstance(value := getattr(self, name), str) or value not in choices:
                raise ValueError(
                    f"Objective: {name} must be one of {', '.join(map(repr, choices))}; got {shown(value)}"
                )
        self._fits_the_policy_term()

    def _fits_the_policy_term(self) -> None:
        for name, terms in (("clip_low", _CLIPPED), ("clip_high", _CLIPPED), ("dual_clip", _CLIPPED[:1])):
            if self.policy not in terms and getattr(self, name) is not None:
                accepted = " or ".join(f"policy={term!r}" for term in terms)
                raise ValueError(f"Objective: {name} must be None unless {accepted}; got policy={self.policy!r}")
        for name in ("tis_cap", "off_policy_mask"):
            if self.policy is None and getattr(self, name) is not None:
                raise ValueError(f"Objective: {name} must be None unless there is a policy term; got policy=None")

    def _one_of(self, name: str, table: dict[str, Term]) -> None:
        value = getattr(self, name)
        if callable(value):
            own_term(value)
        elif value is not None and not (isinstance(value, str) and value in table):
            accepted = ", ".join(map(repr, table))
            raise ValueError(f"Objective: {name} must be one of {accepted}, a function or None; got {shown(value)}")

    def _number(self, name: str, accepted: str, ok: Callable[[float], bool], optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        found = constant(value)
        if found is None or not (math.isfinite(found) and ok(found)):
            raise ValueError(f"Objective: {name} must be a number {accepted}; got {shown(value)}")
        object.__setattr__(self, name, found)

    def _term(self, name: str, table: dict[str, Term]) -> Term:
        setting = getattr(self, name)
        return own_term(setting) if callable(setting) else table[setting]

    @property
    def parts(self) -> list[tuple[str, str, float, Term]]:
        """Returns (region, name, weight, term) of everything with a weight."""
        parts = []
        if self.expert is not None:
            parts.append(("expert", "expert", self.expert_coef, self._term("expert", EXPERT_TERMS)))
        if self.policy is not None:
            parts.append(("own", "policy", self.policy_coef, self._term("policy", POLICY_TERMS)))
        parts.append(("own", "kl", self.kl_coef, K3))
        parts.append(("all", "entropy", -self.entropy_coef, ENTROPY))
        return [part for part in parts if part[2] != 0]

    # What it takes

    @property
    def needs(self) -> dict[str, str]:
        """Returns inputs that must be given, by name, each with what needs it."""
        needs: dict[str, str] = {}
        for _, part, _, term in self.parts:
            setting = "kl_coef" if part == "kl" else part
            needs |= {name: f"{setting}={shown_setting(getattr(self, setting))}" for name in term.needs}
        if self.tis_cap is not None:
            needs["rollout_logprobs"] = f"tis_cap={self.tis_cap!r}"
        return needs

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns the names of `needs`."""
        names = [name for _, _, _, term in self.parts for name in term.needs]
        return tuple(dict.fromkeys(names if self.tis_cap is None else [*names, "rollout_logprobs"]))

    @property
    def reads(self) -> frozenset[str]:
        """Names of the inputs that change the loss where given: `needs`, and old_logprobs for a ratio."""
        masks = () if self.off_policy_mask is None else ("old_logprobs", "rollout_logprobs")
        return frozenset((*self.needed, *masks)) | {name for _, _, _, term in self.parts for name in term.reads}

    @property
    def effective(self) -> frozenset[str]:
        """Names of the fields that can change the loss; what the others hold makes no difference."""
        found = {"expert", "policy", "entropy_coef", "kl_coef", "reduction"}
        for _, name, _, term in self.parts:
            if name in ("expert", "policy"):
                found |= {f"{name}_coef", *term.fields}
        found |= {f"{name}_coef" for name in ("expert", "policy") if getattr(self, name) is not None}
        return frozenset((found | set(tis_fields(self) if self.has_policy_term else ())) - pear.idle_fields(self))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Returns statistics of a row that the terms read, beside log-probability, log-sum-exp and entropy."""
        return tuple(dict.fromkeys(name for _, _, _, term in self.parts for name in term.statistics(self)))

    @property
    def reads_logit(self) -> bool:
        """Returns whether a term is a function of z_y."""
        return any(term.reads_logit for _, _, _, term in self.parts)

    @property
    def reads_entropy(self) -> str | None:
        """Returns what makes the loss a function of entropies, as a message shows it; None: nothing does."""
        for _, part, _, term in self.parts:
            if term.entropy_slope is not None or (term.own is not None and "entropy" in term.own):
                setting = "entropy_coef" if part == "entropy" else part
                return f"{setting}={shown_setting(getattr(self, setting))}"
        return None

    @property
    def reference_head(self) -> bool:
        """Returns whether a divergence from a reference's whole distribution is part of the loss."""
        return any(term.reference_head for _, _, _, term in self.parts)

    @property
    def coupled(self) -> bool:
        """Returns whether a token's loss depends on others of its sequence: it takes two passes."""
        return weighs_sequences(self) or any(term.coupled for _, _, _, term in self.parts)

    @property
    def needs_sequences(self) -> bool:
        return self.coupled or self.reduction == "sequence_mean"

    @property
    def has_policy_term(self) -> bool:
        """Returns whether there is a policy term with a weight."""
        return self.policy is not None and self.policy_coef != 0

    @property
    def supervised(self) -> bool:
        """Returns whether there is no policy term: without an expert_mask every token is an expert token."""
        return self.policy is None and self.expert is not None

    def explain(self) -> str:
        """Returns what this objective computes, by which path, and at what cost, as text."""
        return explain(self)

    # What it gives

    def losses(self, tokens: Tokens, filled: bool = True) -> dict[str, Tensor]:
        """Returns the weighted loss per token [n] of each part ("expert", "policy", "kl", "entropy"); their sum is the
        token's loss. Differentiable in `tokens.logprobs`, `tokens.entropy` and `tokens.target_logits`. Not
        `filled`: anything finite stands where a part does not count."""
        out, regions = {}, Regions(tokens)
        for name_of_region, name, coef, term in self.parts:
            region, weight = self._seen(regions[name_of_region], name, term)
            value = term.value(self, region.tokens)
            value = value if coef == 1 else coef * value
            value = value if weight is None else value * weight
            out[name] = region.fill(value) if filled else value
        return out

    def all_slopes(self, tokens: Tokens) -> Slopes:
        """Returns ∂loss/∂logp, ∂loss/∂H and ∂loss/∂z_y per token [n]; the last two are None where no part depends on
        them."""
        total: list[Tensor | None] = [torch.zeros_like(tokens.logprobs), None, None]
        regions = Regions(tokens)
        for name_of_region, name, coef, term in self.parts:
            region, weight = self._seen(regions[name_of_region], name, term)
            factor = coef if weight is None else weight * coef
            for i, slope in enumerate(term.slopes(self, region.tokens)):
                if slope is not None:
                    part, before = region.fill(factor * slope), total[i]
                    total[i] = part if before is None else before + part
        return Slopes(*total)

    def _seen(self, region: Region, name: str, term: Term) -> tuple[Region, Tensor | None]:
        """Returns (where a part counts, and the tokens as its term sees them; what multiplies its value, a
        constant)."""
        if name != "policy":
            return region, None
        seen, everyone, weight = region.tokens, region.tokens, region.tokens.policy_weights
        if weight is not None:  # where 0 there is no policy term at all: 0 · ∞ would be NaN
            inside = given(region.inside) & (weight != 0)
            outside = ~inside
            if term.coupled:  # a ratio of the whole sequence is of these tokens too
                seen = replace(seen, advantages=given(seen.advantages).masked_fill(outside, 0))
            else:
                seen = seen.only(inside, outside)
            region, weight = Region(inside, outside, seen), seen.policy_weights
        if self.tis_cap is not None:
            tis = tis_weight(self, seen if self.tis_level == "token" else everyone)
            weight = tis if weight is None else tis * weight
        if self.off_policy_mask is not None:
            kept = kept_sequences(self, everyone)
            weight = kept if weight is None else kept * weight
        return region, weight

    def slopes(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Returns the first two of `all_slopes`."""
        g_lp, g_entropy, _ = self.all_slopes(tokens)
        return given(g_lp), g_entropy

    def fused(self) -> FusedTerms | None:
        """Returns this objective as numbers for kernels that compute slopes; None: they cannot express it."""
        parts = {name: term for _, name, _, term in self.parts}
        numbers = [parts[name].fused if name in parts else None for name in ("expert", "policy")]
        if 0 in numbers or self.policy_coef not in (0, 1) or not tis_is_a_cap(self):
            return None
        return FusedTerms(
            expert=numbers[0] or 0, policy=numbers[1] or 0, expert_coef=self.expert_coef, alpha=self.alpha,
            luffy_gamma=self.luffy_gamma, clip_low=0.0 if self.clip_low is None else 1 - self.clip_low,
            clip_high=math.inf if self.clip_high is None else 1 + self.clip_high, dual_clip=math.inf if self.dual_clip
            is None else self.dual_clip, entropy_coef=self.entropy_coef, kl_coef=self.kl_coef, tis_cap=self.tis_cap or
            0.0,
        )  # fmt: skip

    @property
    def regions(self) -> dict[str, str]:
        """Returns where each part counts: among "expert", "own" or "all" tokens."""
        return {name: region for region, name, _, _ in self.parts}

    def has_gradient(self, expert: Tensor, advantages: Tensor | None, policy_weights: Tensor | None = None) -> Tensor:
        """Returns which tokens can have a gradient at all [n] bool: known before any logit is, so that the others are
        spared the backward. A clipped ratio is not among the reasons: that takes the logprob to know."""
        if self.every_token_has_gradient:
            return torch.ones_like(expert)
        live = torch.zeros_like(expert)
        for region, name, _, term in self.parts:
            inside = expert if region == "expert" else ~expert
            if name == "policy" and policy_weights is not None:
                inside = inside & (policy_weights != 0)
            live |= inside & (given(advantages) != 0) if term.scales_with_advantage else inside
        return live

    @property
    def every_token_has_gradient(self) -> bool:
        return "all" in self.regions.values()


FIELDS = tuple(field.name for field in fields(Objective))
show_signatures(Objective, Presets, FIELDS)
Objective.__init__ = refusing_unknown(Objective.__init__, FIELDS)  # type: ignore[method-assign]
