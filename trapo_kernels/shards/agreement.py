"""The ranks of a vocabulary-parallel head must have some things in common, which are compared in one gather a call:
whatever changes which collectives follow, or what they mean. A rank whose arguments are refused says so here: the
others do not wait.

Numbers travel as they are, all else as a hash of 64 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..chunks.budget import get_budget_mb

__all__ = ["compare", "shards_of"]

Prepared = TypeVar("Prepared")

# Every call of every function sends all of them, in this order; 0 where it has none.
_NUMBERS = ("the number of tokens", "the memory budget")
_SETTINGS = (
    "functions", "shapes and dtypes", "head options", "backends", "trained parameters", "given inputs", "objectives",
    "statistics", "settings",
)  # fmt: skip
_TENSORS = (
    "targets", "mask", "expert_mask", "advantages and policy_weights", "old_logprobs", "ref_logprobs",
    "rollout_logprobs", "sequence_ids", "normalizer", "gradients", "temperatures",
)  # fmt: skip
_NAMES = (*_NUMBERS, *_SETTINGS, *_TENSORS)

# Of the SplitMix64 generator, as signed integers.
_GOLDEN, _FIRST, _SECOND = (
    0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
)  # fmt: skip


def shards_of(caller: str, group: Any, weight: Any, prepare: Callable[[], tuple[Prepared, Mapping[str, Any]]]) -> Any:
    """Returns (what `prepare` made, the number of rows of the weight on every rank). `prepare` also gives what ranks
    must have in common, by the names above.

    Raises:
        TypeError, ValueError: the group is none, `prepare` raised on this rank or on another, or the ranks differ; on
            every rank at once.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{caller}: group must be a torch.distributed ProcessGroup or None; got {type(group).__name__}")
    made: Prepared | None = None
    facts: Mapping[str, Any] = {}
    error: Exception | None = None
    try:
        made, facts = prepare()
    except Exception as wrong:
        error = wrong
    device = _device(group, weight)
    size = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0
    budget = {"the memory budget": int(get_budget_mb(device.type) * 2**20)}
    found = _gather(caller, group, device, error, size, {"functions": caller, **facts, **budget})
    return made, found


def compare(caller: str, group: Any, device: torch.device, facts: Mapping[str, Any]) -> None:
    """Compares what ranks must have in common, again."""
    _gather(caller, group, device, None, 0, {"functions": f"{caller} backward", **facts})


def _device(group: Any, weight: Any) -> torch.device:
    if isinstance(weight, Tensor):
        return weight.device
    return torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")


@torch.no_grad()
def _gather(
    caller: str, group: Any, device: torch.device, error: Exception | None, size: int, facts: Mapping[str, Any]
) -> list[int]:
    given = {name: None if error else facts.get(name) for name in _NAMES}
    mine = _digests({"size": size, "failed": error is not None, **given}, device)
    everyone = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(everyone.unbind(0)), mine, group=group)
    sizes, failed, *columns = everyone.t().tolist()
    if error is not None:
        raise error
    prefix = f"{caller}: group must have ranks with the same arguments (data-parallel ranks need the whole weight)"
    if any(failed):
        raise ValueError(f"{prefix}; got an error on rank {', '.join(str(r) for r, bad in enumerate(failed) if bad)}")
    for name, column in zip(_NAMES, columns, strict=True):
        if len(set(column)) > 1:
            raise ValueError(f"{prefix}; got {name}: {column if name in _NUMBERS else 'different ones'}")
    return sizes


def _digests(facts: Mapping[str, Any], device: torch.device) -> Tensor:
    """Returns [names]: one number each."""
    plain = [0 if isinstance(value, Tensor) else _number(value) for value in facts.values()]
    out = torch.tensor(plain, dtype=torch.int64, device=device)
    tensors = {i: _bits(value) for i, value in enumerate(facts.values()) if isinstance(value, Tensor)}
    for length in {bits.numel() for bits in tensors.values()}:
        alike = [i for i, bits in tensors.items() if bits.numel() == length]
        for i, digest in zip(alike, _hashes(torch.stack([tensors[i] for i in alike])).unbind(0), strict=True):
            out[i] = digest
    return out


def _number(value: Any) -> int:
    if value is None or isinstance(value, int):
        return int(value or 0)
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _bits(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return flat.to(torch.float64).view(torch.int64) if flat.is_floating_point() else flat.to(torch.int64)


def _hashes(rows: Tensor) -> Tensor:
    """Returns a number of each row [k, n], by which rows that differ anywhere, or in their order, differ: SplitMix64 of
    every element and its place, summed up; all of it wraps around."""
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    mixed = rows ^ (places * _GOLDEN)
    mixed = (mixed ^ (mixed >> 30)) * _FIRST
    mixed = (mixed ^ (mixed >> 27)) * _SECOND
    return (mixed ^ (mixed >> 31)).sum(1)
