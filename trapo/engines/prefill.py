"""This file computes keys and values of contexts, of which some beginnings are known.

Contexts that need about as many new tokens are computed together: the last T of each, T being what the neediest one
needs, so that no row is padded on the right of what it knows. What a row knows beyond that is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from trapo.engines.columns import ColumnCache, Filled, first_tokens, tokens_in
from trapo.engines.kept_prompts import Context
from trapo_kernels.integrations.transformers import decoder_of

TOKENS = {"cpu": 2048}  # of a forward: enough to fill the products, few enough for the caches
TOKENS_OF_OTHERS = 32_768
PADDING = 1.25  # computed tokens for one that is needed


def prefill(
    model: PreTrainedModel, cache_name: str, contexts: Sequence[Context], known: Sequence[Filled | None], pad_id: int
) -> list[Filled]:
    """Returns the keys and values of each context, whole. known: those of a beginning; cache_name: the forward's
    argument."""
    lengths = [0 if k is None else tokens_in(k) for k in known]
    needed = [len(context) - length for context, length in zip(contexts, lengths, strict=True)]
    limit = TOKENS.get(model.device.type, TOKENS_OF_OTHERS)
    found: list[Filled] = [k or [] for k in known]
    for group in _groups(needed, limit):
        parts = [(contexts[i], known[i], needed[i]) for i in group]
        for i, filled in zip(group, _forward(model, cache_name, parts, pad_id), strict=True):
            found[i] = filled
    return found


def _groups(needed: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yields the indices of contexts that are computed together: those that need the most first."""
    group: list[int] = []
    for i in sorted((i for i, n in enumerate(needed) if n), key=lambda i: -needed[i]):
        computed = (len(group) + 1) * needed[(group or [i])[0]]
        if group and (computed > limit or computed > PADDING * sum(needed[j] for j in [*group, i])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _forward(
    model: PreTrainedModel, cache_name: str, parts: Sequence[tuple[Context, Filled | None, int]], pad_id: int
) -> list[Filled]:
    count = max(needed for _, _, needed in parts)
    width = max(len(context) for context, _, _ in parts)
    cache = ColumnCache(model.config, len(parts), width)
    if width > count:
        before: list[Filled] = [
            first_tokens(known, max(len(context) - count, 0)) if known else [None] * len(cache.cache.layers)
            for context, known, _ in parts
        ]
        cache.load(before, 0, width - count)
        cache.length = width - count
    ids = torch.tensor([([pad_id] * count + list(context))[-count:] for context, _, _ in parts], device=model.device)
    starts = torch.tensor([width - len(context) for context, _, _ in parts], device=model.device)
    columns = torch.arange(width, device=model.device)
    mask = (columns >= starts[:, None]).long()
    decoder_of(model)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(columns[-count:] - starts[:, None]).clamp(min=0),
        use_cache=True,
        **{cache_name: cache.cache},
    )
    return [cache.taken(row, len(context)) for row, (context, _, _) in enumerate(parts)]
