"""This file draws the rollouts of one step, micro-group after micro-group, each for the whole batch of prompts at
once, and then their group-relative advantages."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from trapo.data.encode import EncodedProblem
from trapo.engines.protocol import Completion, Engine, Request
from trapo.errors import TrapoError
from trapo.guidance import Opening, Schedule, open_micro_group
from trapo.rewards import Reward, Status
from trapo.tools.timing import StepTimer

STD_EPS = 1e-6  # GRPO's

# Answers of the rollouts given (their full text is decoded by the scorer), in order.
Scorer = Callable[[Sequence["Rollout"]], list[Reward]]


@dataclasses.dataclass
class Rollout:
    """Is one response to one prompt: an expert prefix (maybe empty), then the model's own tokens (maybe none)."""

    problem: EncodedProblem
    group: int  # which prompt of the step
    level: int  # which micro-group, counted from 0: the guidance level
    ratio: float  # of the expert trace that was given; 0: unguided
    prefix_ids: tuple[int, ...]
    own_ids: tuple[int, ...]
    supervised: bool  # the prefix carries the expert term
    finished: bool
    reward: float = 0.0
    status: Status = "ok"
    advantage: float = 0.0
    trained: bool = True  # False: it says something of the prompt, and is in no loss
    prefix_advantages: tuple[float, ...] | None = None  # of the prefix tokens, where they are not the rollout's
    detail: str = ""  # what went wrong, where the status is another one
    # Log-probabilities that the trained model's are compared with.
    rollout_logprobs: tuple[float, ...] | None = None  # the engine's of own_ids, as sampled; None: it gives none
    supports: tuple[tuple[int, ...], ...] | None = None  # the ids that own_ids were sampled from; None: from all
    behind: bool = False  # sampled before the last update; its ratios are to rollout_logprobs
    old_logprobs: torch.Tensor | None = None  # [len − 1] fp32 of all targets, before the update; set by Learner.update
    ref_logprobs: torch.Tensor | None = None  # [len − 1] fp32, the reference model's; set by Learner.update

    @property
    def guided(self) -> bool:
        return self.ratio > 0

    @property
    def response_ids(self) -> tuple[int, ...]:
        return self.prefix_ids + self.own_ids

    def __len__(self) -> int:
        """Returns the tokens of prompt and response."""
        return len(self.problem.prompt_ids) + len(self.prefix_ids) + len(self.own_ids)


def collect(
    problems: Sequence[EncodedProblem],
    schedule: Schedule,
    engine: Engine,
    score: Scorer | None,
    *,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    timer: StepTimer | None = None,
) -> list[Rollout]:
    """Draws all rollouts of a step, ordered by prompt and then by micro-group. A micro-group is one call of the engine
    for all prompts that still want rollouts.

    score=None leaves rewards at 0 (objectives without advantages), so no later micro-group can depend on them.
    """
    rng, timer = random.Random(seed), timer or StepTimer()
    by_prompt: list[list[Rollout]] = [[] for _ in problems]
    for level in range(len(schedule.micro_groups)):
        rewards_so_far = [[r.reward for r in earlier] for earlier in by_prompt]
        drawn = [
            _begun(problems[o.prompt], o, level, in_prompt=schedule.instruction is not None)
            for o in open_micro_group(schedule, level, problems, rewards_so_far, max_response_tokens, rng)
        ]
        with timer.part("generate"):
            later = level + 1 < len(schedule.micro_groups)
            _generate(drawn, engine, temperature, max_response_tokens, seed + level, keep=later)
        if score is not None:
            with timer.part("reward"):
                rewards = score(drawn)
            for rollout, reward in zip(drawn, rewards, strict=True):
                rollout.reward, rollout.status, rollout.detail = reward.value, reward.status, reward.detail
        for rollout in drawn:
            if schedule.micro_groups[level].replaces and rollout.guided:
                for earlier in by_prompt[rollout.group]:
                    earlier.trained = earlier.level == level
            by_prompt[rollout.group].append(rollout)
    return [rollout for group in by_prompt for rollout in group]


def _begun(problem: EncodedProblem, o: Opening, level: int, *, in_prompt: bool) -> Rollout:
    """Returns a rollout of which nothing is generated yet. in_prompt: its prefix is a part of the prompt."""
    prefix = o.prefix_ids
    if in_prompt and prefix:
        problem, prefix = problem.asked_to_continue(prefix), ()
    return Rollout(problem, o.prompt, level, o.ratio, prefix, (), o.supervised, finished=o.whole)


def _generate(
    rollouts: Sequence[Rollout],
    engine: Engine,
    temperature: float,
    max_response_tokens: int,
    seed: int,
    *,
    keep: bool,
) -> None:
    """Fill in own tokens. A prefix that is the whole trace (it ends the sequence) or fills the limit gets none.
    keep: whether later micro-groups begin with these contexts."""
    open_ended = [r for r in rollouts if not r.finished and len(r.prefix_ids) < max_response_tokens]
    requests = [
        Request(r.problem.prompt_ids + r.prefix_ids, max_response_tokens - len(r.prefix_ids), truncated=True, keep=keep)
        for r in open_ended
    ]
    completions: list[Completion] = engine.generate(requests, temperature=temperature, seed=seed) if requests else []
    for rollout, completion in zip(open_ended, completions, strict=True):
        rollout.own_ids, rollout.finished = completion.token_ids, completion.finished
        rollout.rollout_logprobs, rollout.supports = completion.logprobs, completion.supports


def group_advantages(
    rewards: Sequence[float],
    *,
    guided: Sequence[bool],
    own_tokens: Sequence[int],
    baseline: str = "all",
    std: bool = False,
) -> list[float]:
    """Returns A_i = R_i − mean(R over the baseline's rollouts), divided by the group's std + 1e-6 if asked.

    The std is the sample's (n − 1), as in verl and TRL. Equal rewards give exactly 0, so their tokens can be skipped.

    rewards, guided, own_tokens: one entry per rollout of the prompt.
    baseline: `all` rollouts; the `unguided` ones; those that have `own_tokens` (a rollout that is a whole expert trace
    has none: it lifts the mean but has nothing to reward). Falls back to all rollouts where none qualifies.
    """
    chosen = {
        "all": list(rewards),
        "unguided": [r for r, g in zip(rewards, guided, strict=True) if not g],
        "own_tokens": [r for r, n in zip(rewards, own_tokens, strict=True) if n > 0],
    }[baseline] or list(rewards)
    equal = min(chosen) == max(chosen)  # n·r / n need not be r
    mean = chosen[0] if equal else math.fsum(chosen) / len(chosen)
    scale = 1.0
    if std:
        # Of all rollouts, whatever the baseline: that of a few equal ones is 0 and would blow the others up.
        middle = math.fsum(rewards) / len(rewards)
        variance = math.fsum((r - middle) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
        scale = 1.0 / (math.sqrt(variance) + STD_EPS)
    return [(r - mean) * scale for r in rewards]


def assign_advantages(rollouts: Sequence[Rollout], baseline: str, std: bool, grouping: str = "prompt") -> None:
    """Sets `.advantage` of every rollout; rollouts of one prompt must stand side by side, as `collect` gives them.

    grouping: what is compared: all rollouts of a `prompt`; those of one of its micro-groups (`level`), where a prefix
    makes another prompt of it; or the `unguided` ones alone, the others having 0.
    """
    if grouping == "unguided":
        rollouts = [r for r in rollouts if not r.guided]
    for _, members in groupby(rollouts, key=lambda r: (r.group, r.level if grouping == "level" else 0)):
        group = list(members)
        rewards = [r.reward for r in group]
        guided, own_tokens = [r.guided for r in group], [len(r.own_ids) for r in group]
        try:
            advantages = group_advantages(rewards, guided=guided, own_tokens=own_tokens, baseline=baseline, std=std)
        except OverflowError:
            largest = max(rewards, key=abs)
            raise TrapoError(
                f"reward.function: got rewards up to {largest:g}, whose mean or variance is too large for a float; "
                "return ordinary numbers, or scale them by reward.range"
            ) from None
        for rollout, advantage in zip(group, advantages, strict=True):
            rollout.advantage = advantage
