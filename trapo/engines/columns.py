"""This cache of keys and values lets rows come and go: buffers that are written in place.

A row is a sequence, a column a token. All rows end in the same column, the last one that was filled; a row's tokens are
the columns from its start on, and a mask hides those before. So a step writes one column of all rows, a sequence that
is finished makes room for another, and when the columns run out, all rows move to the left together.

transformers' `DynamicLayer` copies all keys and values to append one column: at 12 rows of 100 tokens that is an eighth
of a decode step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Keys and values of one sequence, [heads, tokens, width] each; None for a layer that uses another one's.
Filled = list["tuple[torch.Tensor, torch.Tensor] | None"]


# What a layer has that keeps nothing of its own, in versions of transformers after 5.19.
NOTHING = getattr(cache_utils, "DummyLayer", None)


class ColumnLayer(DynamicLayer):
    """Holds keys and values [rows, heads, capacity, width] of one layer; `update` returns views of what is filled.

    rows: the most there can be; window: of a sliding layer, which sees the last window - 1 columns and its own.
    """

    def __init__(self, rows: int, capacity: int, window: int | None = None) -> None:
        super().__init__()
        self.rows, self.capacity, self.window = rows, capacity, window
        self.is_sliding = window is not None
        self.sliding_window = window
        self.length = 0
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        # Zeros: what a mask hides is multiplied by 0, and memory that nobody wrote may hold a NaN.
        key, value = (
            t.new_zeros(self.rows, t.shape[1], self.capacity, t.shape[-1]) for t in (key_states, value_states)
        )
        self.buffers = key, value
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns: [B, heads, n, width] each; returns those that attention may see."""
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
        assert self.buffers is not None
        rows, start, count = key_states.shape[0], self.length, key_states.shape[2]
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        end = self.length = start + count
        seen = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            live = buffer.narrow(0, 0, rows)
            live.narrow(2, start, count).copy_(states)
            seen.append(live.narrow(2, first, end - first))
        self.keys, self.values = seen
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns (columns that the next `update` returns, how many there are before them)."""
        first = 0 if self.window is None else max(self.length - self.window + 1, 0)
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.length


class ColumnCache:
    """Holds the layers of a model, `cache` being what its forward takes."""

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int) -> None:
        """Raises TypeError for a model that keeps more than columns of keys and values."""
        self.cache = DynamicCache(config=config)
        self.capacity = capacity
        if not self.cache.layers:
            raise TypeError("its config does not tell the layers of its cache")
        for i, layer in enumerate(self.cache.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, NOTHING):
                raise TypeError(f"its cache has more than columns of keys and values ({type(layer).__name__})")
            if type(layer) is not NOTHING:
                self.cache.layers[i] = ColumnLayer(rows, capacity, getattr(layer, "sliding_window", None))

    @property
    def layers(self) -> list[ColumnLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, ColumnLayer)]

    @property
    def length(self) -> int:
        """Returns how many columns are filled; the next `update` writes behind them."""
        return self.layers[0].length

    @length.setter
    def length(self, columns: int) -> None:
        for layer in self.layers:
            layer.length = columns

    def load(self, filled: Sequence[Filled], first_row: int, end: int) -> None:
        """Write sequences into the rows from first_row on, so that each ends before column `end`."""
        for i, layer in enumerate(self.cache.layers):
            if not isinstance(layer, ColumnLayer):
                continue
            for row, sequence in enumerate(filled, first_row):
                states = sequence[i] if sequence else None
                if states is None or states[0].shape[1] == 0:
                    continue
                if layer.buffers is None:
                    layer.lazy_initialization(states[0][None], states[1][None])
                assert layer.buffers is not None
                for buffer, tensor in zip(layer.buffers, states, strict=True):
                    buffer[row, :, end - tensor.shape[1] : end] = tensor

    def taken(self, row: int, tokens: int) -> Filled:
        """Returns the views of the last `tokens` columns of a row."""
        columns = slice(self.length - tokens, self.length)
        buffers = [layer.buffers if isinstance(layer, ColumnLayer) else None for layer in self.cache.layers]
        return [None if pair is None else (pair[0][row, :, columns], pair[1][row, :, columns]) for pair in buffers]

    def move_rows(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies rows over others, which nobody wants any more: (from, to) each."""
        if not moves:
            return
        for layer in self.layers:
            for buffer in layer.buffers or ():
                for source, target in moves:
                    buffer[target, :, : layer.length] = buffer[source, :, : layer.length]

    def move_columns(self, start: int, end: int, rows: int) -> None:
        """Moves the columns from `start` on, of the first rows, so that they become those that end before column
        `end`."""
        for layer in self.layers:
            for buffer in layer.buffers or ():
                kept = buffer[:rows, :, start : layer.length].clone()
                buffer[:rows, :, end - kept.shape[2] : end] = kept
        self.length = end


def tokens_in(filled: Filled) -> int:
    return next((states[0].shape[1] for states in filled if states is not None), 0)


def first_tokens(filled: Filled, count: int) -> Filled:
    """Returns the views of a sequence's beginning."""
    return [None if states is None else (states[0][:, :count], states[1][:, :count]) for states in filled]


def copied(filled: Filled) -> Filled:
    return [None if states is None else (states[0].clone(), states[1].clone()) for states in filled]


def size(filled: Filled) -> int:
    """Returns the bytes of a sequence's keys and values."""
    return sum(t.numel() * t.element_size() for states in filled if states is not None for t in states)
