"""Named presets of an `Objective` are here: the published loss of a method, nothing of its recipe.

No preset sets entropy_coef or kl_coef (TRAPO's and LUFFY's code train with entropy_coef=0.001). Advantages and
normaliser are the caller's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments.fields import Overrides, refuse_unknown
from .arguments.scalars import constant, shown

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Presets"]

_GRPO: dict[str, Any] = {"expert": None, "policy": "clip", "clip_low": 0.2, "clip_high": 0.2}


class Presets:
    """Makes objectives by the names of their methods; `Objective` inherits it."""

    @classmethod
    def _made(cls, given: Any, **defaults: Any) -> Self:
        refuse_unknown("Objective", given, Overrides.__annotations__)
        return cls(**{**defaults, **given})

    @classmethod
    def trapo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes TRAPO's loss (arXiv 2512.17636): TrSFT with α = 0.1 on expert tokens, unclipped policy gradient on own
        tokens. A = R − mean over the group, no std; normaliser: the active tokens of the global batch."""
        return cls._made(overrides, expert="trsft", alpha=0.1, policy="clip")

    @classmethod
    def grpo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes GRPO's loss (arXiv 2402.03300): ratio clipped at 1 ± 0.2. A = (R − mean)/(std + 1e-6); normaliser: as
        published a mean over sequences of token means; pass what you use."""
        return cls._made(overrides, **_GRPO)

    @classmethod
    def dr_grpo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes Dr.GRPO's loss (arXiv 2503.20783): GRPO's clip; A = R − mean, no std; normaliser: sequences × the
        longest length allowed, a constant."""
        return cls._made(overrides, **_GRPO)

    @classmethod
    def dapo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes DAPO's loss (arXiv 2503.14476): clip 0.2 below, 0.28 above; normaliser: the active tokens of the global
        batch."""
        return cls._made(overrides, **{**_GRPO, "clip_high": 0.28})

    @classmethod
    def sft(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes the negative log-likelihood; without an expert_mask on every token. Normaliser: active tokens."""
        return cls._made(overrides, expert="sft", policy=None)

    @classmethod
    def dft(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes the loss of Dynamic Fine-Tuning (arXiv 2508.05629): −sg(p) log p; without an expert_mask on every
        token."""
        return cls._made(overrides, expert="dft", policy=None)

    @classmethod
    def luffy(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes LUFFY's loss (arXiv 2504.14945): p/(p + 0.1) shaping on expert tokens, scaled by their advantage;
        unclipped policy gradient on own tokens. A over on- and off-policy rollouts together, no std."""
        return cls._made(overrides, expert="luffy", luffy_gamma=0.1, policy="clip")

    @classmethod
    def chord(cls, mu: float = 0.1, **overrides: Unpack[Overrides]) -> Self:
        """Makes CHORD-φ's loss (arXiv 2508.11408): μ · (−sg(p(1−p)) log p) on expert tokens, (1 − μ) · GRPO on own
        tokens, each a mean over its own tokens, as in Trinity-RFT and ms-swift. The schedule of μ is the caller's: an
        objective per step."""
        share = constant(mu)
        if share is None or not 0 <= share <= 1:
            raise ValueError(f"Objective.chord: mu must be a number in [0, 1]; got {shown(mu)}")
        mixed = {"expert": "chord", "expert_coef": share, "policy_coef": 1 - share, "reduction": "region_mean"}
        return cls._made(overrides, **{**_GRPO, **mixed})

    @classmethod
    def sed(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes SED-SFT's loss: −log p + λ (p − ½)² where the k likeliest classes hold less than τ."""
        return cls._made(overrides, expert="sed", policy=None)

    @classmethod
    def eaft(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes EAFT's loss: −log p weighted by the entropy of the 20 likeliest classes, over 3."""
        return cls._made(overrides, expert="eaft", policy=None)

    @classmethod
    def asft(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes ASFT's loss: DFT anchored by 0.05 · KL(reference ‖ policy) over the whole vocabulary; the loss takes
        ref_hidden and ref_weight."""
        return cls._made(overrides, expert="asft", policy=None)

    @classmethod
    def pear(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes PEAR's loss (arXiv 2602.01058): old_logprobs are those of the behaviour policy. By token;
        pear_level has its forms by block and by sequence. Two passes."""
        return cls._made(overrides, expert="pear", policy=None)

    @classmethod
    def lco(cls, loss: str = "mse", **overrides: Unpack[Overrides]) -> Self:
        """Makes LCO's loss (arXiv 2603.00963): the target's logit is moved towards z_y + A/β', by a regression on it
        ("mse", "logcosh") or by the KL divergence from the distribution it would have ("kld", with β = 0.1 and 10)."""
        if loss not in ("mse", "logcosh", "kld"):
            raise ValueError(f"Objective.lco: loss must be 'mse', 'logcosh' or 'kld'; got {shown(loss)}")
        defaults = {"lco_beta": 0.1, "lco_neg": 100.0} if loss == "kld" else {}
        return cls._made(overrides, expert=f"lco_{loss}", policy=None, **defaults)

    @classmethod
    def gspo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes GSPO's loss (arXiv 2507.18071): the sequence's ratio clipped at 1 − 3e-4, 1 + 4e-4; mean over sequences
        of token means. Two passes."""
        defaults = {"policy": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence_mean"}
        return cls._made(overrides, expert=None, **defaults)

    @classmethod
    def cispo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes CISPO's loss (arXiv 2506.13585): −sg(clip r)·A·log p, clipped above alone, at a tuned value."""
        return cls._made(overrides, expert=None, policy="cispo", clip_high=0.28)

    @classmethod
    def dppo(cls, divergence: str = "tv", **overrides: Unpack[Overrides]) -> Self:
        """Makes DPPO's loss (arXiv 2602.04879): −sg(min(r, 20))·A·log p where the probability has moved by at most 0.2
        ("tv"; "kl" bounds the binary KL) away from the old one. With dppo_cap=None it is the policy term of prime-rl's
        default loss, whose old_logprobs are the engine's."""
        if divergence not in ("tv", "kl"):
            raise ValueError(f"Objective.dppo: divergence must be 'tv' or 'kl'; got {shown(divergence)}")
        return cls._made(overrides, expert=None, policy=f"dppo_{divergence}", clip_low=0.2, clip_high=0.2)

    @classmethod
    def sapo(cls, **overrides: Unpack[Overrides]) -> Self:
        """Makes SAPO's loss: a soft gate for the clip, τ = 1 for A > 0, else 1.05; mean over sequences."""
        return cls._made(overrides, expert=None, policy="sapo", reduction="sequence_mean")
