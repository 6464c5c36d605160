"""This file is AMFT (arXiv 2508.06944, experimental), which learns how much imitation there is beside RL.

    θ' = θ − lr · [(1 − μ) ∇L_RL + μ ∇L_SFT]           dJ(θ')/dμ = lr · ∇L_RL(θ') · (∇L_SFT(θ) − ∇L_RL(θ))
    μ ← clip(μ + meta_lr · cos(∇L_RL(θ'), ∇L_SFT(θ) − ∇L_RL(θ)) + entropy_lr · (H* − H), low, high)

θ' are the weights of the next step, whose prompts nothing has learnt from yet: they are the validation set, and its
gradient is there anyway. The product is a cosine, so that meta_lr says how far μ moves; as it stands, times lr = 1e-6
and the authors' 1e-4, it would move nothing. H* is the entropy of own tokens in the first step. docs/modes.md says
what the evidence is worth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import trapo_kernels as tk
from trapo.guidance import ALWAYS, NEVER
from trapo.modes.building import group_size, make_phase, one_update, replace_groups
from trapo.modes.hybrids import ends
from trapo.modes.mixing import combined, inner, minus
from trapo.modes.phase import Phase
from trapo.modes.registry import mode

if TYPE_CHECKING:
    from trapo.config import Config
    from trapo.data.encode import EncodedProblem
    from trapo.learner import Learner, Update
    from trapo.models.optimizer import Gradients
    from trapo.rollouts import Rollout
    from trapo.tools.timing import StepTimer


@mode(
    "Experimental: (1 − μ) · GRPO + μ · NLL of a trace of each prompt; μ follows its meta-gradient and the entropy.",
    one_update,
    keys=("high", "low", "mix", "meta_lr", "entropy_lr"),
)
def amft(config: Config) -> list[Phase]:
    own = config.hybrid
    with_trace = replace_groups(config, [(group_size(config), 0.0, NEVER), (1, 1.0, ALWAYS)])
    phase = make_phase(config, "amft", with_trace, tk.Objective.grpo, {"expert": "sft"}, std=True)
    high, low = ends(config, 0.95, 0.05)
    balance = Balance(
        mu=min(max(0.8 if own.mix is None else own.mix, low), high),
        low=low,
        high=high,
        meta_lr=0.02 if own.meta_lr is None else own.meta_lr,
        entropy_lr=5e-4 if own.entropy_lr is None else own.entropy_lr,
    )
    return [dataclasses.replace(phase, learns=balance, memory=balance, grouping="unguided")]


@dataclasses.dataclass
class Balance:
    """Holds μ, and the direction in which more of it would have moved the weights of the last step."""

    mu: float
    low: float
    high: float
    meta_lr: float
    entropy_lr: float
    target: float | None = None  # H*
    direction: list[torch.Tensor | None] | None = None  # ∇L_SFT − ∇L_RL
    shown: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        rollouts: Sequence[Rollout],
        phase: Phase,
        learner: Learner,
        seed: int,
        timer: StepTimer,
        again: Callable[[], list[Rollout]],
    ) -> Update:
        entropy = _entropy([r for r in rollouts if r.own_ids], learner)
        if self.target is None:
            self.target = entropy
        below = 0.0 if self.target is None or entropy is None else self.target - entropy
        mix = functools.partial(self._mix, below)
        return learner.update(rollouts, phase.objective, seed=seed, timer=timer, mix=mix)

    def _mix(self, below: float, gradients: Gradients) -> Gradients:
        """Moves μ, then mixes by it. below: the nats by which the entropy is below H*."""
        of_sft, of_rl = gradients.get("expert"), gradients.get("own")
        meta = 0.0
        if self.direction is not None and of_rl is not None:
            scale = (inner(of_rl, of_rl) * inner(self.direction, self.direction)) ** 0.5
            meta = inner(of_rl, self.direction) / scale if scale > 0 else 0.0
        self.mu = min(max(self.mu + self.meta_lr * meta + self.entropy_lr * below, self.low), self.high)
        self.shown = {"mu": self.mu, "meta_gradient": meta}
        self.direction = minus(of_sft, of_rl)
        mixed = combined((1 - self.mu, of_rl), (self.mu, of_sft))
        return {} if mixed is None else {"own": mixed}

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        return self.shown

    def state_dict(self) -> dict[str, Any]:
        return {"mu": self.mu, "target": self.target, "direction": self.direction}

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        self.mu, self.target, self.direction = state["mu"], state["target"], state["direction"]


def _entropy(rollouts: Sequence[Rollout], learner: Learner) -> float | None:
    """Returns the mean entropy of own tokens, in nats; None where there are none."""
    found = [row[-len(r.own_ids) :] for r, row in zip(rollouts, learner.entropies(rollouts), strict=True)]
    return float(torch.cat(found).double().mean()) if found else None
