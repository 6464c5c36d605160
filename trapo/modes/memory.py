"""This file is what a mode remembers from step to step; it is in the checkpoint."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import trapo_kernels as tk
from trapo.guidance import Schedule, open_micro_group

if TYPE_CHECKING:
    from trapo.data.encode import EncodedProblem
    from trapo.learner import Learner
    from trapo.rollouts import Rollout


class Memory(Protocol):
    """Remembers what a mode needs of earlier steps; it is told of each step's rollouts after the update on them."""

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        """Takes a step in; returns what its line of metrics.jsonl says of it."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        """Takes over what `state_dict` gave. problems: of data.train, by id."""
        ...


@dataclasses.dataclass
class TraceQueue:
    """Holds prompts of which no rollout was right; `size` of them are one SFT step on their traces, by the optimizer of
    expert tokens, after the RL step (ReLIFT, arXiv 2506.07527)."""

    schedule: Schedule  # a whole trace
    objective: tk.Objective
    size: int
    max_tokens: int
    waiting: list[EncodedProblem] = dataclasses.field(default_factory=list)

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        right = {r.group for r in rollouts if r.reward >= 1}
        failed = {r.group: r.problem for r in rollouts if r.group not in right and r.problem.traces}
        self.waiting += failed.values()
        steps = 0
        while len(self.waiting) >= self.size:
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            learner.update(self._traces(batch, rollouts[0], seed + steps), self.objective, seed=seed, advance=False)
            steps += 1
        return {"queued": float(len(self.waiting)), "sft_updates": float(steps)}

    def _traces(self, problems: Sequence[EncodedProblem], like: Rollout, seed: int) -> list[Rollout]:
        rng = random.Random(seed)
        opened = open_micro_group(self.schedule, 0, problems, [[] for _ in problems], self.max_tokens, rng)
        blank = dataclasses.replace(
            like, own_ids=(), rollout_logprobs=None, supports=None, old_logprobs=None, ref_logprobs=None
        )
        made = [
            dataclasses.replace(
                blank, problem=problems[o.prompt], group=o.prompt, level=0, ratio=o.ratio, prefix_ids=o.prefix_ids,
                supervised=o.supervised, finished=o.whole, reward=0.0, advantage=0.0,
            )
            for o in opened
        ]  # fmt: skip
        return [r for r in made if r.prefix_ids]

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": [problem.problem.id for problem in self.waiting]}

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        self.waiting = [problems[name] for name in state["waiting"]]


@dataclasses.dataclass
class ShortestPrefixes:
    """Finds how much of its trace each prompt needs, by bisection over the epochs: all its guided rollouts wrong, a
    longer prefix; all right, a shorter one (BREAD's rule; POPE's shortest prefix from which a model is ever right)."""

    bounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # by problem id: too short, long enough

    def __call__(self, prompt: Any, rng: random.Random) -> float:
        low, high = self.bounds.get(prompt.name, (0.0, 1.0))
        return (low + high) / 2

    def after(self, rollouts: Sequence[Rollout], learner: Learner, seed: int) -> dict[str, float]:
        guided: dict[str, list[float]] = {}
        for r in rollouts:
            if r.guided:
                guided.setdefault(r.problem.name, []).append(r.reward)
        for name, rewards in guided.items():
            low, high = self.bounds.get(name, (0.0, 1.0))
            if max(rewards) < 1:
                self.bounds[name] = [(low + high) / 2, high]
            elif min(rewards) >= 1:
                self.bounds[name] = [low, (low + high) / 2]
        found = [sum(pair) / 2 for pair in self.bounds.values()]
        return {"prefix_share": sum(found) / len(found)} if found else {}

    def state_dict(self) -> dict[str, Any]:
        return {"bounds": self.bounds}

    def load_state_dict(self, state: dict[str, Any], problems: Mapping[str, EncodedProblem]) -> None:
        self.bounds = dict(state["bounds"])
