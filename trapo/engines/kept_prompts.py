"""This file keeps keys and values of contexts that were prefilled, for later contexts that begin with the same tokens.

The rollouts of a step are drawn in several calls, of the same prompts: one with an expert prefix begins with its
prompt, and a longer prefix with a shorter one. So a context needs only what no kept one has.
"""

from __future__ import annotations

import bisect

from trapo.engines.columns import Filled, copied, first_tokens, size
from trapo.models.prefix_tree import shared_beginning

Context = tuple[int, ...]


class KeptPrompts:
    """Keeps contexts in sorted order: the one that shares the longest beginning with another is next to it there.

    limit: bytes; those that were not used for longest go first. None of the contexts is the beginning of another.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.order: list[Context] = []
        self.kept: dict[Context, Filled] = {}  # least recently used first

    def clear(self) -> None:
        self.bytes = 0
        self.order.clear()
        self.kept.clear()

    def find(self, context: Context) -> Filled | None:
        """Returns the keys and values of the longest beginning that is known, None where not one token is."""
        place = bisect.bisect_left(self.order, context)
        near = self.order[max(place - 1, 0) : place + 1]
        best = max(near, key=lambda other: shared_beginning(context, other), default=())
        count = shared_beginning(context, best)
        if not count:
            return None
        self.kept[best] = self.kept.pop(best)
        return first_tokens(self.kept[best], count)

    def add(self, context: Context, filled: Filled) -> None:
        """Keep a copy, in place of a context that this one begins with."""
        place = bisect.bisect_left(self.order, context)
        if place < len(self.order) and shared_beginning(context, self.order[place]) == len(context):
            return
        before = self.order[place - 1] if place else ()
        if before and shared_beginning(context, before) == len(before):
            self._drop(before)
        if size(filled) > self.limit:
            return
        self.kept[context] = copied(filled)
        bisect.insort(self.order, context)
        self.bytes += size(filled)
        while self.bytes > self.limit:
            self._drop(next(iter(self.kept)))

    def _drop(self, context: Context) -> None:
        self.bytes -= size(self.kept.pop(context))
        del self.order[bisect.bisect_left(self.order, context)]
