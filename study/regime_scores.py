"""What the regime study measures of a model: accuracy at three temperatures, and what its lines say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from study.evaluate import Samples, draw, graded, packed, sample_problems
from study.loop import passes
from study.settings import Settings
from study.task import Instance, Task, decode
from study.wait import ChainWait, lines

COOL = 0.6  # the temperature of the primary score, the paper's
KINDS = ("known", "suppressed", "missing")


def sampled(model: nn.Module, task: Task, instances: Sequence[Instance], *, samples: int) -> Samples:
    """Returns samples at T = 1."""
    return sample_problems(model, task, instances, samples=samples, temperature=1.0, seed=1)


def score_regime(model: nn.Module, task: ChainWait, settings: Settings, *, with_passes: bool = True) -> dict[str, Any]:
    """Returns the scores on the test problems; `test` is the primary one, and `test_right` of `cool_samples` per
    problem is for intervals."""
    test = task.problems("test", settings.test_problems)
    few = test[: settings.pass_problems]
    count = settings.cool_samples
    cool = sample_problems(model, task, test, samples=count, temperature=COOL, seed=0)
    greedy = sample_problems(model, task, test, samples=1, temperature=0.0, seed=0)
    completions = draw(model, task, few, samples=settings.pass_samples, temperature=1.0, seed=1)
    warm = graded(task, few, completions, settings.pass_samples)
    by_length = {str(n): cool.only([i.length == n for i in test]).accuracy for n in task.lengths}
    return {
        "test": cool.accuracy,
        "test_right": digits(cool.right),
        "test_by_length": by_length,
        "test_finished": cool.finished,
        "test_tokens": cool.mean_tokens,
        "greedy": greedy.accuracy,
        "greedy_right": packed(greedy.right[:, 0]),
        "sampled": warm.accuracy,
        "sampled_right": digits(warm.right),
        "pass_at": passes(warm),
        **written(task, [decode(c.token_ids) for c in completions]),
    }


def written(task: ChainWait, responses: Iterable[str]) -> dict[str, Any]:
    """Returns what the lines of responses at T = 1 say: of each kind of fact how many were written and which share of
    those that stand is right; wrong turns a response, and the share of wrong lines that was taken back."""
    count, right, back = Counter(), Counter(), Counter()
    responses = list(responses)
    for line in (line for response in responses for line in lines(response)):
        kind = task.kind(line.fact)
        back[line.right, line.taken_back] += 1
        if not line.taken_back:
            count[kind] += 1
            right[kind] += line.right
    wrong = back[False, True] + back[False, False]
    return {
        "lines": {kind: count[kind] for kind in KINDS},
        "lines_right": {kind: right[kind] / count[kind] if count[kind] else None for kind in KINDS},
        "wrong_turns": (back[False, True] + back[True, True]) / len(responses),
        "taken_back": back[False, True] / wrong if wrong else None,
    }


def digits(right: np.ndarray) -> str:
    """Returns how many samples of each problem are right, a character each. right: bool [problems, samples < 10]."""
    return "".join(str(int(n)) for n in right.sum(1))


def counts(text: str) -> np.ndarray:
    """Returns what `digits` was given, summed: int [problems]."""
    return np.array([int(c) for c in text])
