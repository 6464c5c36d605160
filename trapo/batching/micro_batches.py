"""Rollouts are cut into micro-batches under a token budget, so that little is padding and beginnings are shared.

Varlen attention pays for each sequence's own square. A block mask pays for the square of the whole row, most of which
it throws away: on a CPU, rows of equal lengths cost less than that, and little of them is padding.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from transformers import PreTrainedModel

from trapo.models import prefix_tree
from trapo.rollouts import Rollout


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds the rollouts of a micro-batch; [] on a rank that has none left for a collective that the others need."""

    rollouts: Sequence[Rollout] = ()
    trees: tuple[int, ...] = ()  # how many of them are in each tree; (): each is a row of its own


def shuffled_parts(rollouts: Sequence[Rollout], count: int, seed: int) -> list[list[Rollout]]:
    """Returns the minibatches of a step: so many equal parts in a random order; one has the rollouts as they are."""
    count, shuffled = min(count, len(rollouts)), list(rollouts)
    if count > 1:
        random.Random(seed).shuffle(shuffled)
    return [shuffled[i::count] for i in range(count)]


def is_packed(model: PreTrainedModel, packing: str) -> bool:
    """Returns what train.packing says of a model; `auto` packs where attention is varlen: a block mask's squares cost
    more than padding does."""
    varlen = "flash" in (model.config._attn_implementation or "")
    return {"always": True, "never": False, "auto": varlen}[packing]


def groups(
    rollouts: Sequence[Rollout], token_budget: int, packed: bool, costs: prefix_tree.Costs | None
) -> list[Group]:
    """Returns micro-batches of at most so many tokens, padding included; a longer sequence goes alone. costs: of trees;
    None: nothing is shared."""
    trees, single = shared(rollouts, token_budget, costs) if costs is not None else ([], rollouts)
    made = []
    for chosen in micro_batches([size for size, _ in trees], token_budget):
        members = [trees[i][1] for i in chosen]
        made.append(Group([r for tree in members for r in tree], tuple(map(len, members))))
    cut = packs if packed else micro_batches
    return made + [Group([single[i] for i in chosen]) for chosen in cut([len(r) for r in single], token_budget)]


def shared(
    rollouts: Sequence[Rollout], token_budget: int, costs: prefix_tree.Costs
) -> tuple[list[tuple[int, list[Rollout]]], list[Rollout]]:
    """Returns (trees of several rollouts with their tokens, rollouts that are cheaper alone, in their order)."""
    sequences = [(r.problem.prompt_ids + r.response_ids)[:-1] for r in rollouts]
    grown = prefix_tree.grow(sequences, token_budget, costs)
    trees = [(prefix_tree.size([sequences[i] for i in tree]), tree) for tree in grown if len(tree) > 1]
    inside = {i for _, tree in trees for i in tree}
    return [(n, [rollouts[i] for i in tree]) for n, tree in trees], [
        r for i, r in enumerate(rollouts) if i not in inside
    ]


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Returns the indices grouped so that (longest length × count) stays within the budget; a longer one goes alone.

    Sorted by length, so that little is padding; longest first, so that a memory limit shows at once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def packs(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Returns the indices grouped so that the lengths of a group add up to at most the budget; a longer one goes alone.

    First fit, longest first.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            groups.append([index])
            room.append(token_budget - lengths[index])
        else:
            groups[place].append(index)
            room[place] -= lengths[index]
    return groups
