"""This file draws a generation batch with expert prefixes: TRAPO's micro-groups for trainers that draw all rollouts of
a batch at once.

Knows no trainer: what generates and what scores are two functions.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trapo.data.encode import Trace, prefix_of
from trapo.guidance import Schedule, open_micro_group

__all__ = ["Guided", "GuidedRollouts", "draw_guided", "with_every_row"]

# token ids to continue -> (own token ids, their logprobs or None)
Generate = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
# (rows of the batch, their whole responses) -> their rewards
Score = Callable[[list[int], list[list[int]]], Sequence[float]]


@dataclass(frozen=True)
class Guided:
    """Is a prompt, of which nothing but the traces decides its prefixes."""

    traces: Sequence[Trace]

    def prefix(self, schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
        return prefix_of(self.traces, schedule, micro_group, rng)


@dataclass
class GuidedRollouts:
    """Holds the batch's responses, row by row: an expert prefix (maybe empty), then the model's own tokens (maybe
    none)."""

    responses: list[list[int]]
    prefix_lengths: list[int]
    supervised: list[bool]  # the prefix carries the expert term
    logprobs: list[list[float]] | None  # NaN at prefix tokens
    order: list[int] = field(default_factory=list)  # rows in the order in which they were scored


def with_every_row(schedule: Schedule) -> Schedule:
    """Returns the schedule without what leaves rollouts out: batches of other trainers have every row."""
    groups = tuple(dataclasses.replace(group, guided_only=False) for group in schedule.micro_groups)
    return dataclasses.replace(schedule, micro_groups=groups, stop_decided=False)


def draw_guided(
    schedule: Schedule,
    prompts: Sequence[Sequence[int]],
    traces: Sequence[Sequence[Trace]],
    *,
    generate: Generate,
    score: Score,
    max_tokens: int,
    rng: random.Random,
    always_generate: bool = False,
) -> GuidedRollouts:
    """Draws the rows micro-group after micro-group, each for all prompts at once.

    Rows stand in groups of `schedule.rollouts_per_prompt`, one prompt and its traces each. Rows of a micro-group share
    their prefix. A whole trace gets no own tokens, a response at most max_tokens.

    always_generate: call `generate` even for nothing, where other ranks wait in it.
    """
    schedule = with_every_row(schedule)
    size = schedule.rollouts_per_prompt
    groups = [Guided(own) for own in traces[::size]]
    found = GuidedRollouts([[] for _ in prompts], [0] * len(prompts), [False] * len(prompts), None)
    rewards: list[list[float]] = [[] for _ in groups]
    logprobs: dict[int, list[float]] = {}
    offset = 0
    for level, micro_group in enumerate(schedule.micro_groups):
        rows = [group * size + offset + i for group in range(len(groups)) for i in range(micro_group.size)]
        offset += micro_group.size
        finished = set()
        opened = open_micro_group(schedule, level, groups, rewards, max_tokens, rng)
        for row, opening in zip(rows, opened, strict=True):
            found.responses[row], found.prefix_lengths[row] = list(opening.prefix_ids), len(opening.prefix_ids)
            found.supervised[row] = opening.supervised
            if opening.whole or len(opening.prefix_ids) == max_tokens:
                finished.add(row)
        open_rows = [row for row in rows if row not in finished]
        asked = open_rows or (rows[:1] if always_generate else [])
        own_ids, own_logprobs = generate([[*prompts[r], *found.responses[r]] for r in asked]) if asked else ([], None)
        for i, row in enumerate(open_rows):
            room = max_tokens - found.prefix_lengths[row]
            found.responses[row] = found.responses[row] + own_ids[i][:room]
            if own_logprobs is not None:
                logprobs[row] = own_logprobs[i][:room]
        for row, reward in zip(rows, score(rows, [found.responses[r] for r in rows]), strict=True):
            rewards[row // size].append(reward)
        found.order += rows
    if logprobs:
        nan = float("nan")
        found.logprobs = [[nan] * n + logprobs.get(row, []) for row, n in enumerate(found.prefix_lengths)]
    return found


def unlogged(values: list[Any], order: Sequence[int]) -> list[Any]:
    """Returns the values that were collected in scoring order, in the order of the rows."""
    out = list(values)
    for row, value in zip(order, values, strict=True):
        out[row] = value
    return out
