"""A prefix tree runs sequences that begin alike through the model at once: what they share is computed once.

The rollouts of a prompt share the prompt, and often an expert prefix. Laid out one below the other they cost the prompt
once each; as a tree it is there once, and each token sees the tokens on its way to the root:

    prompt  a b c        row        a b c d e f g h        d e: the first rollout, f g h: the second
    d e                  positions  0 1 2 3 4 3 4 5
    f g h                f sees     a b c f

The model gives every token the hidden state it has in its own sequence, because nothing else is in its sight, and the
gradient of what is shared is the sum over the sequences: the update is that of separate rows, up to rounding.

A tree's attention is dense, its square costs what the mask throws away, too. So a sequence joins a tree only where that
saves more than it costs (`Costs`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trapo.models.layers import attention_width, layer_configs, sliding_windows
from trapo_kernels.integrations.transformers import decoder_of

TAKE_A_MASK = ("sdpa", "eager")  # implementations of attention that are told by a mask who sees whom
# Lengths beyond which a layer's tokens do not see, counted in columns, which a tree's are not. `sliding_window` is none
# of them: transformers takes the mask of sliding layers from outside.
WINDOWS = ("attention_chunk_size", "window_size", "attention_window_size", "local_attention")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Says what attention costs beside everything else: one pair of tokens in units of one token's other work."""

    pair: float

    def alone(self, length: int) -> float:
        """Returns the cost of a sequence in a causal row: half of its square is left out."""
        return length + self.pair * length * length / 2

    def tree(self, tokens: int) -> float:
        """Returns the cost of a tree, whose square is computed whole."""
        return tokens + self.pair * tokens * tokens


@dataclasses.dataclass(frozen=True)
class Forest:
    """Holds trees as padded rows [B, T], and where the sequences' tokens are in them."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64
    sight: Tensor  # [B, 1, T, T] bool: which tokens (last axis) a token sees
    places: Tensor  # [sum of lengths] int64: of each sequence's tokens, in order, in the flattened [B · T]


def costs_of(model: PreTrainedModel) -> Costs:
    """Computes the costs from the sizes of the model: a token's products are those with the layers' weights, a pair's
    two dot products of a head's width in each head of each layer."""
    decoder = decoder_of(model)
    embedded = cast(Tensor, model.get_input_embeddings().weight).numel()
    weights = max(sum(p.numel() for p in decoder.parameters()) - embedded, 1)
    return Costs(2 * attention_width(model.config) / weights)


def window(model: PreTrainedModel) -> float:
    """Returns the longest sequence that a tree can hold: beyond, some layer's tokens would not see what they see in a
    row."""
    found = {getattr(layer, name, None) for layer in layer_configs(model.config) for name in WINDOWS}
    return min((float(size) for size in found if isinstance(size, int) and size > 0), default=float("inf"))


def attention_mask(model: PreTrainedModel, sight: Tensor, position_ids: Tensor) -> Tensor | dict[str, Tensor]:
    """Returns `Forest.sight` in the form that the model's attention takes: SDPA booleans, eager attention what is
    added.

    Sliding layers see as many positions back as they do in a row; a model that has full ones, too, takes a mask each.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    sliding = next(iter(sliding_windows(model.config)), None)
    full = _as_taken(model, sight)
    if sliding is None or (kinds and "sliding_attention" not in kinds):
        return full
    apart = position_ids[:, None, :, None] - position_ids[:, None, None, :]
    near = _as_taken(model, sight & (apart < sliding))
    return {"full_attention": full, "sliding_attention": near} if "full_attention" in kinds else near


def _as_taken(model: PreTrainedModel, sight: Tensor) -> Tensor:
    if model.config._attn_implementation == "sdpa":
        return sight
    return torch.zeros_like(sight, dtype=torch.float32).masked_fill_(~sight, torch.finfo(torch.float32).min)


def shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many ids both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def grow(sequences: Sequence[Sequence[int]], budget: int, costs: Costs) -> list[list[int]]:
    """Returns the indices of sequences, grouped into trees: those that begin alike together, in order of their ids. A
    tree holds at most `budget` tokens, and is not joined where a row of its own is cheaper."""
    trees: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        own = sequences[index]
        shared = shared_beginning(sequences[trees[-1][-1]], own) if trees else 0
        grown = tokens + len(own) - shared
        alone = len(trees[-1]) == 1 if trees else False
        before = costs.alone(tokens) if alone else costs.tree(tokens)
        if shared and grown <= budget and costs.tree(grown) - before < costs.alone(len(own)):
            trees[-1].append(index)
            tokens = grown
        else:
            trees.append([index])
            tokens = len(own)
    return trees


def size(sequences: Sequence[Sequence[int]]) -> int:
    """Returns the tokens of the tree of these sequences, which are in order of their ids."""
    return sum(map(len, sequences)) - sum(itertools.starmap(shared_beginning, itertools.pairwise(sequences)))


def plant(trees: Sequence[Sequence[Sequence[int]]], pad_id: int) -> Forest:
    """Returns the trees as rows. Each is a list of sequences in order of their ids, so that what a sequence shares with
    all before it, it shares with the last."""
    width = max(size(tree) for tree in trees)
    input_ids = torch.full((len(trees), width), pad_id, dtype=torch.int64)
    position_ids = torch.zeros(len(trees), width, dtype=torch.int64)
    sight = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # padding sees itself: no row is empty
    places = []
    for row, tree in enumerate(trees):
        path, end = torch.empty(0, dtype=torch.int64), 0
        last: Sequence[int] = ()
        for sequence in tree:
            kept = shared_beginning(last, sequence)
            fresh = torch.arange(end, end + len(sequence) - kept)
            path, end, last = torch.cat([path[:kept], fresh]), end + len(fresh), sequence
            input_ids[row, fresh] = torch.tensor(sequence[kept:], dtype=torch.int64)
            position_ids[row, fresh] = torch.arange(kept, len(sequence))
            causal = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()[kept:]
            sight[row, 0, fresh[:, None], path[None, :]] = causal
            places.append(path + row * width)
    return Forest(input_ids, position_ids, sight, torch.cat(places))
