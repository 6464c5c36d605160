"""This file describes the tokens of a loss: what a term may read of them, which sequence each belongs to, and the
slopes that come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments.graph import tracing

__all__ = ["Region", "Regions", "Sequences", "Slopes", "Tokens", "given", "sums_of_later"]


@dataclass(frozen=True)
class Sequences:
    """Says which sequence each token belongs to: its number [n], below `rows`. In a sequence, tokens stand in order."""

    row: Tensor  # int64
    rows: int  # at least as many as there are sequences

    @classmethod
    def of(cls, ids: Tensor) -> Sequences:
        """Makes the sequences of ids [n]: tokens with one id are a sequence, in the order in which they stand. Nothing
        waits for a device."""
        ordered, order = ids.sort(stable=True)
        first = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))[: ids.numel()]
        return cls(torch.zeros_like(order).scatter(0, order, first.cumsum(0)), ids.numel())

    @classmethod
    def of_rows(cls, rows: int, length: int, device: torch.device | str = "cpu") -> Sequences:
        """Makes a sequence of each row of [rows, length] tokens."""
        return cls(torch.arange(rows, device=device)[:, None].expand(rows, length).reshape(-1), rows)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sequences:
        """Returns the sequences of those tokens that `fn` takes from a tensor [n]."""
        return replace(self, row=fn(self.row))

    def _sums(self, values: Tensor) -> Tensor:
        """Returns the sum of each sequence [rows]. In a fixed order: on CUDA an accumulating index_put sorts, where
        index_add races."""
        sums = values.new_zeros(self.rows)
        if values.is_cuda:
            return sums.index_put((self.row,), values, accumulate=True)
        return sums.index_add(0, self.row, values)

    def total(self, values: Tensor) -> Tensor:
        """Returns Σ over the tokens of a token's sequence [n]."""
        wide = values if values.device.type == "mps" else values.double()  # thousands of tokens, one by one
        return self._sums(wide)[self.row].to(values.dtype)

    def with_any(self, chosen: Tensor) -> Tensor:
        """Returns how many sequences have a `chosen` token (0-dim)."""
        return (self._sums(chosen.long()) > 0).sum()

    def later(self, values: Tensor) -> Tensor:
        """Returns Σ over the tokens that come later in a token's sequence [n]; no gradient."""
        if tracing():  # the number of steps is one of the lengths that a graph is not for
            found: Tensor = torch.ops.trapo_kernels.sums_of_later(values, self.row)
            return found
        return sums_of_later(values, self.row)


def sums_of_later(values: Tensor, row: Tensor) -> Tensor:
    """Returns Σ of `values` [n] over the later tokens of the same `row` [n], by doubling: log n steps, in a fixed
    order."""
    order = row.argsort(stable=True)
    row, sums, step = row[order], values.detach()[order], 1
    while step < row.numel():
        further = torch.where(row[:-step] == row[step:], sums[step:], 0)
        sums, step = torch.cat([sums[:-step] + further, sums[-step:]]), 2 * step
    after = torch.where(row[:-1] == row[1:], sums[1:], 0)
    after = torch.nn.functional.pad(after, (0, 1))[: row.numel()]
    return torch.zeros_like(after).scatter(0, order, after)


@dataclass(frozen=True)
class Tokens:
    """Holds everything a term may read, one entry per token [n]; `None` where the caller gave nothing."""

    logprobs: Tensor
    entropy: Tensor
    expert: Tensor  # bool: True = expert-prefix token
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    target_logits: Tensor | None = None  # z_y
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # those an objective asks for
    sequences: Sequences | None = None
    own: Tensor | None = None  # bool; None: every token that is not an expert token
    policy_weights: Tensor | None = None  # of the policy term, constants
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # what was found of them

    @property
    def own_tokens(self) -> Tensor:
        return ~self.expert if self.own is None else self.own

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """Returns the same tokens with `fn` applied to every tensor."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        mapped: dict[str, Any] = {name: fn(value) for name, value in given.items() if isinstance(value, Tensor)}
        return replace(self, **mapped, statistics={name: fn(value) for name, value in self.statistics.items()})

    def only(self, region: Tensor, outside: Tensor | None = None) -> Tokens:
        """Puts zeros outside `region`, so that what a caller padded other tokens with can neither give nor poison
        anything: 0 · NaN in a backward would. `outside`: where the region is not, if that is known."""
        outside = ~region if outside is None else outside
        values = self._values
        filled = dict(zip(values, self._stacked.masked_fill(outside, 0), strict=True))
        statistics = {name: filled.pop(name) for name in self.statistics}
        return replace(self, **filled, statistics=statistics)

    @property
    def _values(self) -> dict[str, Tensor]:
        """Returns what a term computes with: all but masks."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        found = {name: t for name, t in own.items() if isinstance(t, Tensor) and t.dtype != torch.bool}
        return {**found, **self.statistics}

    @property
    def _stacked(self) -> Tensor:
        """Returns those [k, n], put together once for all regions: on a GPU each operation is a launch."""
        if "stacked" not in self.memo:
            self.memo["stacked"] = torch.stack(list(self._values.values()))
        found: Tensor = self.memo["stacked"]
        return found


class Region(NamedTuple):
    """Holds some of the tokens: where they are [n] bool and where they are not (None: these are all), and the tokens as
    a term of this region sees them, zero elsewhere."""

    inside: Tensor | None
    outside: Tensor | None
    tokens: Tokens

    def fill(self, values: Tensor) -> Tensor:
        """Returns `values` [n], zero outside."""
        return values if self.outside is None else values.masked_fill(self.outside, 0)


class Regions:
    """Holds the regions of some tokens, "expert", "own" or "all"; each is looked for once, whoever asks."""

    def __init__(self, tokens: Tokens) -> None:
        if "own" not in tokens.memo:
            tokens.memo["own"] = tokens.own_tokens
        self.tokens, self.own = tokens, tokens.memo["own"]
        self._found: dict[str, Region] = tokens.memo.setdefault("regions", {})

    def __getitem__(self, name: str) -> Region:
        if name not in self._found:
            inside, outside = self._sides(name)
            if inside is None:  # not kept: tokens that hold themselves would live until they are collected
                return Region(None, None, self.tokens)
            self._found[name] = Region(inside, outside, self.tokens.only(inside, outside))
        return self._found[name]

    def _sides(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Returns where a region is, and where it is not; None and None: it is everywhere."""
        expert, own = self.tokens.expert, self.own
        if self.tokens.own is None:  # every token is in one of the two
            return {"expert": (expert, own), "own": (own, expert), "all": (None, None)}[name]
        inside = {"expert": expert, "own": own}[name] if name != "all" else expert | own
        return inside, ~inside

    def fill(self, name: str, values: Tensor) -> Tensor:
        """Returns `values` [..., n], zero outside of a region."""
        outside = self._found[name].outside if name in self._found else self._sides(name)[1]
        return values if outside is None else values.masked_fill(outside, 0)


class Slopes(NamedTuple):
    """Holds ∂loss/∂logp, ∂loss/∂H and ∂loss/∂z_y per token [n]; None: there is none."""

    logprobs: Tensor | None
    entropy: Tensor | None = None
    target_logits: Tensor | None = None


def given(values: Tensor | None) -> Tensor:
    """Returns a per-token input that a term needs, which the loss has checked (`Objective.needs`)."""
    assert values is not None
    return values
