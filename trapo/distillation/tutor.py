"""The tutor is what a learner asks: a teacher, the divergence from it, and what a step says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trapo.batching.counting import loss_tokens
from trapo.distillation.how import Distillation
from trapo.distillation.known import States, TopK, divergence
from trapo.runs.ranks import ALONE, Ranks
from trapo_kernels.integrations.transformers import LinearHead

if TYPE_CHECKING:
    from trapo.data.encode import EncodedProblem
    from trapo.learner import Learner
    from trapo.rollouts import Rollout


class Teacher(Protocol):
    """Knows distributions of the tokens in the loss of rollouts."""

    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Is told of all rollouts of an update before it."""
        ...

    def know(self, rollouts: Sequence[Rollout]) -> States | TopK:
        """Returns what it knows of some of them, rollout after rollout. All ranks ask together, each for its own, which
        may be none."""
        ...

    def rest(self) -> None:
        """Is told that nothing will be asked before the next update: memory that is not needed until then goes."""
        ...


class Tutor:
    """Adds the divergence from a teacher to a learner's loss. temperature: of the rollouts. ranks: the learner's."""

    def __init__(self, how: Distillation, teacher: Teacher, temperature: float, ranks: Ranks = ALONE) -> None:
        self.how, self.teacher, self.temperature, self.ranks = how, teacher, temperature, ranks
        self._seen: list[torch.Tensor] = []  # of each micro-batch: tokens, loss, Σ D, max D, Σ tail

    def loss(
        self,
        hidden: torch.Tensor,
        head: LinearHead,
        rollouts: Sequence[Rollout],
        known: States | TopK,
        *,
        normalizer: float,
        by_sequence: bool,
    ) -> torch.Tensor:
        """Returns the loss of a micro-batch's tokens in the loss, hidden [n, D]. by_sequence: each rollout counts the
        same, however long it is."""
        counts = [loss_tokens(r) for r in rollouts]
        weights = torch.cat([torch.full((n,), 1 / n) for n in counts if n]) if by_sequence and rollouts else None
        device = hidden.device
        if isinstance(known, TopK):
            known = TopK(known.ids.to(device), known.logprobs.to(device))
        found = divergence(
            hidden, head, known, self.how, normalizer=normalizer, temperature=self.temperature,
            weights=None if weights is None else weights.to(device),
        )  # fmt: skip
        if not rollouts:  # a rank that has nothing left to do
            return found.loss
        tail = found.tokens.new_zeros(()) if found.tail is None else found.tail.double().exp().sum()
        of_all = (found.loss.detach(), found.tokens.sum(), found.tokens.amax(), tail)
        self._seen.append(torch.stack([of_all[0].new_tensor(len(hidden)).double(), *(x.double() for x in of_all)]))
        return found.loss

    def take(self) -> dict[str, float]:
        """Returns what a step's line says of all ranks' micro-batches since the last call: {} without one. Its one host
        sync. The teacher may rest then."""
        self.teacher.rest()
        seen, self._seen = self._seen, []
        if self.ranks.world > 1:
            seen = self.ranks.gather([row.cpu() for row in seen])
        if not seen:
            return {}
        tokens, loss, total, _, tail = torch.stack(seen).sum(0).tolist()
        found = {"loss_distill": loss, "divergence": total / tokens, "distilled_tokens": tokens}
        found["divergence_max"] = float(torch.stack(seen)[:, 3].max())
        return found | ({"outside_topk": tail / tokens} if self.how.top else {})


@dataclasses.dataclass
class Afterwards:
    """Measures the divergence on a step's rollouts once more after the update, in each `every`-th step: before and
    after are of the same tokens. 0: never."""

    every: int
    steps: int = 0

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        self.steps += 1
        if not self.every or (self.steps - 1) % self.every:
            return {}
        found = learner.divergence([r for r in rollouts if r.trained])
        return {"divergence_after": found["divergence"]} if found else {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        self.steps = state["steps"]
