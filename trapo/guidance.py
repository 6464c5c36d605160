"""This file decides when a rollout gets an expert prefix, and how much of it: TRAPO's micro-groups as pure functions.

The rollouts of one prompt are drawn in micro-groups, one after the other. A micro-group is guided, that is, its
rollouts continue a prefix of an expert trace, while the mean reward of all earlier rollouts of that prompt is below
the micro-group's threshold (arXiv 2512.17636; the two presets are the two columns of docs/methods.md).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Protocol

from trapo.errors import TrapoError

NEVER = -1.0  # thresholds: rewards are >= 0, so a mean is never below NEVER ...
ALWAYS = float("inf")  # ... and always below ALWAYS


class Draw(Protocol):
    """Decides how much of its trace a prompt is given."""

    def __call__(self, prompt: Any, rng: random.Random) -> float:
        """Returns the ratio."""
        ...


@dataclasses.dataclass(frozen=True)
class MicroGroup:
    size: int  # rollouts
    ratio: float  # of the expert trace that becomes the prefix
    threshold: float  # guided while the mean reward so far is below
    draw: Draw | None = None  # of the ratio, for each prompt; None: `ratio`
    guided_only: bool = False  # where it is not guided, it has no rollouts
    replaces: bool = False  # where it is guided, the prompt's earlier rollouts are not trained on


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Holds the micro-groups of one prompt, in the order in which they are drawn."""

    micro_groups: tuple[MicroGroup, ...]
    cut: str = "token"  # token: int(len * ratio); blank_line: at the next step of the trace, if one is near
    traces: str = "random"  # random: one of the prompt's traces; in_order: see trace_index
    trace_part: str = "full"  # full; thinking: up to </think>, without the final answer
    supervise: str = "every"  # every prefix carries the expert term; one_per_prefix: one of those that share it; none
    stop_decided: bool = False  # draw no more of a prompt once is_decided
    instruction: str | None = None  # the prefix stands in the prompt, in this text; None: it begins the response

    def __post_init__(self) -> None:
        for group in self.micro_groups:
            if group.size < 1:
                raise TrapoError(f"guidance.sizes: got {group.size}; every micro-group needs at least 1 rollout")
            if not 0.0 <= group.ratio <= 1.0:
                raise TrapoError(f"guidance.ratios: got {group.ratio}; accepted: 0 to 1")
        if not self.micro_groups:
            raise TrapoError("guidance.sizes: got no micro-group; at least one is needed")

    @property
    def rollouts_per_prompt(self) -> int:
        return sum(group.size for group in self.micro_groups)

    def at_ratio(self, level: int, ratio: float) -> Schedule:
        """Returns the schedule with another ratio in micro-group `level`."""
        group = self.micro_groups[level]
        if group.ratio == ratio:
            return self
        groups = [*self.micro_groups]
        groups[level] = dataclasses.replace(group, ratio=ratio)
        return dataclasses.replace(self, micro_groups=tuple(groups))

    @property
    def guides(self) -> bool:
        """Returns whether any rollout can get an expert prefix."""
        return any(g.ratio > 0 and g.threshold > NEVER for g in self.micro_groups)

    @property
    def generates(self) -> bool:
        """Returns whether any rollout can have tokens of the model's own."""
        return any(g.ratio < 1 or g.threshold < ALWAYS for g in self.micro_groups)


def schedule(sizes: Sequence[int], ratios: Sequence[float], thresholds: Sequence[float], **options: Any) -> Schedule:
    """Makes a Schedule from its columns; all three must have one entry per micro-group."""
    if not len(sizes) == len(ratios) == len(thresholds):
        raise TrapoError(
            f"guidance: sizes, ratios and thresholds need one entry per micro-group each; "
            f"got {len(sizes)}, {len(ratios)} and {len(thresholds)}"
        )
    groups = tuple(MicroGroup(*columns) for columns in zip(sizes, ratios, thresholds, strict=True))
    return Schedule(groups, **options)


def split_group(size: int, shares: Sequence[int]) -> list[int]:
    """Returns `size` rollouts split over micro-groups in these shares, each at least 1; what is left goes where most is
    missing. Raises TrapoError for fewer rollouts than micro-groups."""
    if size < len(shares):
        raise TrapoError(f"guidance.group_size: got {size}; at least {len(shares)}, one for each micro-group")
    wanted = [size * share / sum(shares) for share in shares]
    sizes = [max(int(number), 1) for number in wanted]
    while (missing := size - sum(sizes)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, number in enumerate(sizes) if step > 0 or number > 1]
        sizes[max(able, key=lambda i: step * (wanted[i] - sizes[i]))] += step
    return sizes


PAPER = schedule([4, 2, 1, 1], [0.0, 0.2, 0.5, 1.0], [NEVER, 0.5, 0.7, 0.9])

# The authors' code asks for reward sums < 2 of 4, < 4 of 6, < 7 of 7: for 0/1 rewards the paper's thresholds but for
# 4 right of 6, which the paper guides and the code does not.
OFFICIAL = schedule(
    [4, 2, 1, 1],
    [0.0, 0.25, 0.5, 1.0],
    [NEVER, 2 / 4, 4 / 6, 7 / 7],
    cut="blank_line",
    traces="in_order",
    trace_part="thinking",
    supervise="one_per_prefix",
)

PRESETS = {"paper": PAPER, "official": OFFICIAL}


class Prompt(Protocol):
    """Is a prompt that can be guided."""

    @property
    def traces(self) -> Sequence[Any]:
        """Returns its expert traces, each with `token_ids`."""
        ...

    def prefix(self, schedule: Schedule, micro_group: int, rng: random.Random) -> tuple[int, ...]:
        """Returns the prefix that a guided micro-group (counted from 0) continues; () without traces."""
        ...


@dataclasses.dataclass(frozen=True)
class Opening:
    """Says how a rollout begins, before anything is generated."""

    prompt: int  # which one of the batch
    ratio: float  # of the expert trace that is given; 0: unguided
    prefix_ids: tuple[int, ...]
    supervised: bool  # the prefix carries the expert term
    whole: bool  # the prefix is a whole trace, which ends the response: nothing is generated


def open_micro_group(
    schedule: Schedule,
    level: int,
    prompts: Sequence[Prompt],
    rewards: Sequence[Sequence[float]],
    max_tokens: int,
    rng: random.Random,
) -> list[Opening]:
    """Returns the rollouts of micro-group `level` (counted from 0) of all prompts that still want rollouts, prompt by
    prompt.

    Those of one prompt share their prefix. `rewards`: of each prompt's earlier rollouts. A prefix has at most
    `max_tokens`; a whole trace that is longer is not given.
    """
    group, opened = schedule.micro_groups[level], []
    for number, (prompt, earlier) in enumerate(zip(prompts, rewards, strict=True)):
        if schedule.stop_decided and is_decided(schedule.micro_groups[level:], earlier):
            continue
        guided = is_guided(group, earlier)
        ratio = group.draw(prompt, rng) if group.draw is not None and guided else group.ratio
        prefix = prompt.prefix(schedule.at_ratio(level, ratio), level, rng) if guided else ()
        if len(prefix) > max_tokens:  # a whole trace without its end would teach the model never to stop
            prefix = () if ratio >= 1.0 else prefix[:max_tokens]
        if group.guided_only and not prefix:
            continue
        whole = any(prefix == trace.token_ids for trace in prompt.traces)
        ratio = _shown(group, ratio) if prefix else 0.0
        for index in range(group.size):
            supervised = bool(prefix) and carries_expert_term(schedule.supervise, index)
            opened.append(Opening(number, ratio, prefix, supervised, whole))
    return opened


def _shown(group: MicroGroup, ratio: float) -> float:
    """Returns the ratio as metrics count it: one that is drawn to a tenth, and never as none."""
    return ratio if group.draw is None else max(round(ratio, 1), 0.1)


def is_guided(group: MicroGroup, rewards_so_far: Sequence[float]) -> bool:
    """Returns whether this micro-group's rollouts get a prefix, given the rewards of all earlier rollouts of the
    prompt."""
    mean = sum(rewards_so_far) / len(rewards_so_far) if rewards_so_far else 0.0
    return group.ratio > 0 and mean < group.threshold


def is_decided(remaining: Sequence[MicroGroup], rewards_so_far: Sequence[float]) -> bool:
    """Returns whether a prompt needs no more rollouts: those so far got the full reward, 1, and no micro-group that
    remains would be guided after them.

    Such a prompt has no advantage to learn from, unless one of the remaining rollouts failed: with k right ones so far
    that is the rarer the larger k is. Leaving them out saves their generation and gives up that chance, which is why it
    is off by default.
    """
    solved = bool(rewards_so_far) and min(rewards_so_far) >= 1.0
    return solved and not any(is_guided(group, rewards_so_far) for group in remaining)


def prefix_length(trace_length: int, ratio: float, cut: str, blank_lines: Sequence[int] = ()) -> int:
    """Returns how many tokens of a trace become the prefix.

    `blank_lines` are the positions of the trace's tokens that hold a blank line. With cut="blank_line" the prefix ends
    with the first of them strictly after position int(n * ratio), if that one comes before n * (ratio + 0.3); else, and
    with cut="token", after int(n * ratio) tokens. So does the authors' code, also where the token at int(n * ratio)
    holds a blank line itself: the prefix goes on to the next one, or ends before it.
    """
    if ratio >= 1.0:
        return trace_length
    start = int(trace_length * ratio)
    if cut == "blank_line":
        step_end = next((i for i in blank_lines if i > start), None)
        if step_end is not None and step_end < trace_length * (ratio + 0.3):
            return step_end + 1
    return start


def trace_index(rule: str, n_traces: int, micro_group: int, rng: random.Random) -> int:
    """Returns which of a prompt's traces a micro-group (counted from 0) uses.

    in_order: the first one, and the second one (where there is one) for the fourth micro-group and later.
    """
    if rule == "random":
        return rng.randrange(n_traces)
    return min(1, n_traces - 1) if micro_group >= 3 else 0


def carries_expert_term(supervise: str, index_in_group: int) -> bool:
    """Returns whether the prefix of a micro-group's rollout (counted from 0) is trained on."""
    return supervise == "every" or (supervise == "one_per_prefix" and index_in_group == 0)


def thinking_part(trace: str) -> str:
    """Returns the trace up to and including its `</think>`; all of it where there is none."""
    head, mark, _ = trace.partition("</think>")
    return head + mark
