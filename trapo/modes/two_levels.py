"""This file is BRIDGE (arXiv 2509.06948, experimental): imitation learns an adapter w that helps RL on the rest, θ.

    θ ← θ − a · [(1 − λ) ∂L_RL(θ, w)/∂θ + λ ∂L_SFT(θ, w)/∂θ]
    θ̂ ← θ̂ − a · ∂L_RL(θ̂, w)/∂θ̂                                  RL alone, on rollouts of its own
    w ← w − b · ∂[(1 − λ) L_SFT(θ, w) + λ (L_RL(θ, w) − L_RL(θ̂, w))]/∂w

Here θ and w are the two halves of the ranks of one LoRA adapter, which is the sum of two adapters; θ̂ is a copy of θ's
numbers, so that no second model is held. Steps are AdamW's, a = optim.lr and b = optim.expert.lr. docs/modes.md says
what the evidence is worth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER
from trapo.modes.building import group_size, make_phase, one_update, replace_groups, with_expert_optimizer
from trapo.modes.halves import half_of, halves_of, in_place
from trapo.modes.mixing import Gradient, combined, inner, minus
from trapo.modes.phase import Phase
from trapo.modes.registry import mode

if TYPE_CHECKING:
    from trapo.config import Config
    from trapo.data.encode import EncodedProblem
    from trapo.learner import Learner, Update
    from trapo.models.optimizer import Gradients
    from trapo.rollouts import Rollout
    from trapo.tools.timing import StepTimer


def _on_adapters(config: Config) -> None:
    """Raises TrapoError where there are no ranks to halve, or a step has several updates."""
    one_update(config)
    if (rank := config.lora.rank) < 2:
        raise TrapoError(f"lora.rank: mode bridge learns two adapters, half of the ranks each: at least 2, got {rank}")
    if (decay := config.optim.weight_decay) != 0:
        raise TrapoError(f"optim.weight_decay: mode bridge has no place for it in its second level; 0, got {decay}")


@mode(
    "Experimental: half of an adapter learns by GRPO and NLL, the other half to make that better than GRPO alone.",
    _on_adapters,
    keys=("mix",),
)
def bridge(config: Config) -> list[Phase]:
    with_trace = replace_groups(config, [(group_size(config), 0.0, NEVER), (1, 1.0, ALWAYS)])
    optim = with_expert_optimizer(config)
    phase = make_phase(config, "bridge", with_trace, tk.Objective.trapo, {"expert": "sft"}, std=False, optim=optim)
    pair = Pair(0.5 if config.hybrid.mix is None else config.hybrid.mix)
    return [dataclasses.replace(phase, learns=pair, memory=pair, grouping="unguided")]


@dataclasses.dataclass
class Pair:
    """Holds θ̂, what θ would be by RL alone, with its optimizer."""

    share: float  # λ
    alone: list[torch.nn.Parameter] = dataclasses.field(default_factory=list)  # θ̂, as whole tensors of the adapter
    optimizer: torch.optim.AdamW | None = None
    loaded: dict[str, Any] | None = None  # a checkpoint's, until there is a learner
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
        halves = halves_of(learner)
        self._begin(learner)
        of_alone: Gradients = {}
        with in_place(learner.parameters, self.alone, halves):
            # By the same seed: while θ̂ is θ, these are the same rollouts, and nothing is gained.
            drawn = [r for r in again() if not r.guided]
            keep = functools.partial(_keep, of_alone)
            learner.update(drawn, phase.objective, seed=seed, timer=timer, advance=False, mix=keep)
        mix, rate = functools.partial(self._mix, halves, of_alone.get("own")), learner.lr
        update = learner.update(rollouts, phase.objective, seed=seed, timer=timer, mix=mix)
        self._step(learner, rate, halves, of_alone.get("own"))
        together, apart = (_mean_reward([r for r in some if not r.guided]) for some in (rollouts, drawn))
        self.shown = {"reward_alone": apart, "rl_gain": together - apart, **self.shown}
        return update

    def _mix(self, halves: list[torch.Tensor], alone: Gradient | None, gradients: Gradients) -> Gradients:
        of_sft, of_rl = gradients.get("expert"), gradients.get("own")
        theta = combined((1 - self.share, of_rl), (self.share, of_sft))
        w = combined((1 - self.share, of_sft), (self.share, of_rl), (-self.share, alone))
        gain = minus(of_rl, alone)
        self.shown = {"gain_gradient": 0.0 if gain is None else inner(gain, gain) ** 0.5}
        found = {"own": half_of(theta, halves), "expert": half_of(w, [1 - half for half in halves])}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _begin(self, learner: Learner) -> None:
        """Makes θ̂: the checkpoint's, or θ as it is."""
        if self.optimizer is not None:
            return
        values = learner.parameters if self.loaded is None else self.loaded["alone"]
        self.alone = [
            torch.nn.Parameter(v.detach().clone().to(p)) for v, p in zip(values, learner.parameters, strict=True)
        ]
        optim = learner.optim
        self.optimizer = torch.optim.AdamW(self.alone, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
        if self.loaded is not None:
            self.optimizer.load_state_dict(self.loaded["optimizer"])

    def _step(self, learner: Learner, rate: float, halves: list[torch.Tensor], gradient: Gradient | None) -> None:
        if self.optimizer is None or (of_theta := half_of(gradient, halves)) is None:
            return
        for p, g in zip(self.alone, of_theta, strict=True):
            p.grad = g
        if learner.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.alone, learner.optim.grad_clip)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        return self.shown

    def state_dict(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        return {"alone": [p.detach() for p in self.alone], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        self.loaded, self.optimizer = state or None, None


def _keep(found: Gradients, gradients: Gradients) -> Gradients:
    """Takes the gradients, and leaves none to step by."""
    found.update(gradients)
    return {}


def _mean_reward(rollouts: Sequence[Rollout]) -> float:
    return sum(r.reward for r in rollouts) / max(len(rollouts), 1)
