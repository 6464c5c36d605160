"""A run and an evaluation ask for rewards here: the pool of a configuration, and what is said when rewards fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.rewards import Reward, RewardPool
from trapo.rewards.worker import within
from trapo.runs.ranks import Scorer
from trapo.settings.groups import RewardConfig


def make_pool(reward: RewardConfig) -> RewardPool:
    """Returns the pool of `reward.*`. Raises TrapoError, in one line, for a function that cannot be imported or
    called."""
    bounds = (reward.range[0], reward.range[1]) if reward.range else None
    return RewardPool(reward.function, workers=reward.workers, timeout=reward.timeout, bounds=bounds)


def score_texts(pool: Scorer, texts: Sequence[str], problems: Sequence[Problem]) -> list[Reward]:
    """Returns a reward for each text; functions that look at more than text and answer get the problem's other
    columns."""
    if not getattr(pool, "wants_row", False):
        return pool.score([(text, problem.answer) for text, problem in zip(texts, problems, strict=True)])
    return pool.score([(text, problem.answer, _row(problem)) for text, problem in zip(texts, problems, strict=True)])


def _row(problem: Problem) -> dict[str, Any]:
    own = {"prompt": [dict(message) for message in problem.prompt], "id": problem.id, "source": problem.source}
    return {**problem.row, **own}


class NoRewards(TrapoError):
    """Says that no reward could be had: what was answered is worth nothing."""


class FailureNotes:
    """Says the first reason of each kind of failure, and stops a run whose first rewards all fail, or are no shares of
    1."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.seen: set[str] = set()
        self.worked = False  # whether any reward has been had

    def check(self, rewards: Sequence[Reward], where: str) -> None:
        """Takes the rewards of a whole step or evaluation. Raises TrapoError when all failed and none has worked
        before, and for one that is no share of 1."""
        refuse_outside(rewards, where)
        failed = [r for r in rewards if r.status != "ok"]
        for reward in failed:
            if reward.status not in self.seen:
                self.seen.add(reward.status)
                self.note(
                    f"a reward failed in {where} and scores 0 ({reward.status}: {reward.detail}); others are counted"
                )
        if len(failed) < len(rewards) or not rewards:
            self.worked = self.worked or bool(rewards)
            return
        counts = ", ".join(f"{n} x {status}" for status, n in Counter(r.status for r in failed).items())
        first = (
            f"reward.function: all {len(rewards)} rewards of {where} failed ({counts}); the first: {failed[0].detail}"
        )
        if not self.worked:
            raise NoRewards(first)
        self.note(f"WARNING: {first}; they score 0 and training goes on")


def refuse_outside(rewards: Sequence[Reward], where: str) -> None:
    """Raises TrapoError, in one line, for a reward that is no share of 1: nothing that is compared with a threshold or
    shown as an accuracy would mean what it says."""
    outside = next((r.value for r in rewards if within(r.value, 0.0, 1.0) is None), None)
    if outside is not None:
        raise NoRewards(
            f"reward.function: got a reward of {outside:g} in {where}; accepted: 0 to 1, for guidance thresholds and "
            "accuracies take rewards for shares of 1; reward.range=[LOW,HIGH] says what yours are, and scales them"
        )
