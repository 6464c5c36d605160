"""This file checks a call's head and what it is applied to: which kernel does it, and which parameters have a
gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import validate
from .arguments.graph import refuse_in_graph, tracing
from .arguments.low_rank import check_lora, side_by_side
from .backends.base import RowKernel, stats_dtype
from .backends.dispatch import backend_name, pick
from .head import Head
from .shards import vocab_parallel
from .shards.agreement import shards_of

__all__ = ["Call", "Named", "Params", "call_of_head", "call_of_linear", "call_of_logits", "in_one_dtype", "over_shards"]
__all__ += ["pick_kernel", "wanted", "with_adapter"]

# (hidden [N, D], weight [V, D], bias [V] or None), after which A [r, D] and B [V, r] may stand; or (logits [N, V],)
Params = tuple[Tensor | None, ...]

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Named:
    """Stands for a row kernel inside a compiled graph, which holds no Python object: the name of its backend."""

    name: str


@dataclass(frozen=True)
class Call:
    """Holds a head, its kernel and its parameters. `kernel` None: the logits are materialised."""

    head: Head
    backend: str  # its name
    kernel: RowKernel | Named | None
    params: Params
    weight_grad: Tensor | None = None  # where the gradient of the weight is added; None: it is handed over

    @property
    def first(self) -> Tensor:
        """Returns the hidden states, or the logits."""
        assert self.params[0] is not None
        return self.params[0]

    @property
    def stats_dtype(self) -> torch.dtype:
        return stats_dtype(self.first.dtype)

    @property
    def columns(self) -> int:
        """Returns how many logits a token has here: of a sharded vocabulary those of this rank."""
        weight = self.params[1] if len(self.params) > 1 else None
        return self.first.shape[1] if weight is None else weight.shape[0]

    @property
    def vocab(self) -> int:
        if isinstance(self.kernel, RowKernel) and self.kernel.shard is not None:
            return self.kernel.shard.vocab
        return self.columns

    def facts(self, targets: Tensor, settings: Any, given: Any = None, **others: Any) -> dict[str, Any]:
        """Returns what the ranks of a group must have in common, by agreement.py's names."""
        hidden, weight, bias = self.params
        assert hidden is not None
        assert weight is not None
        return {
            "the number of tokens": targets.numel(),
            "shapes and dtypes": (targets.shape, hidden.shape, hidden.dtype, weight.shape[1], bias is None),
            "head options": (self.head.options, self.head.ignore_index),
            "backends": self.backend,
            "trained parameters": wanted(self.params),
            "given inputs": given,
            "targets": targets,
            "settings": settings,
            **others,
        }

    def sharded(self, group: Any, sizes: list[int]) -> Call:
        """Returns the head of the group of whose weight this rank has a part."""
        shard = vocab_parallel.shard_of(group, sizes)
        if self.kernel is not None:
            assert isinstance(self.kernel, RowKernel)
            return replace(self, kernel=vocab_parallel.sharded(self.kernel, shard))
        hidden, weight, bias = self.params
        assert weight is not None
        whole = vocab_parallel.gather(weight, shard)
        return replace(self, params=(hidden, whole, None if bias is None else vocab_parallel.gather(bias, shard)))


def call_of_linear(
    caller: str,
    head: Head,
    hidden: Any,
    weight: Any,
    bias: Any,
    targets: Any,
    backend: str | None,
    group: Any = None,
    weight_grad: Any = None,
    adapter: Params = (),
) -> Call:
    """Makes the call of a linear head on hidden states that have targets; with the `adapter` (A, B) that is apart.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is wrong; one line names it.
    """

    def check(hidden: Tensor) -> None:
        validate.check_targets(caller, targets, "hidden", hidden)

    call = call_of_head(caller, head, hidden, weight, bias, backend, group, check)
    into = validate.weight_grad(caller, weight_grad, weight, call.stats_dtype)
    return replace(call, weight_grad=into, params=(*call.params, *adapter))


def call_of_head(
    caller: str,
    head: Head,
    hidden: Any,
    weight: Any,
    bias: Any,
    backend: str | None,
    group: Any = None,
    check: Callable[[Tensor], None] = lambda hidden: None,
) -> Call:
    """Makes the call of a linear head on hidden states; `check` looks at what else there is of their tokens.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is wrong; one line names it.
    """
    hidden, weight, bias = validate.under_autocast(hidden, weight, bias)
    validate.check_linear(caller, hidden, weight, bias, sharded=group is not None)
    check(hidden)
    return Call(
        head, *pick_kernel(backend, caller, hidden.device), (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    )


def with_adapter(
    caller: str,
    lora: Any,
    hidden: Any,
    weight: Any,
    backend: str | None,
    support: Any,
    objective: Any = None,
    **others: Any,
) -> tuple[Any, Any, Params]:
    """Returns (hidden states, weight, the adapter (scale · A, B) that is beside them); where nothing streams, or
    there is a support or a reference head, the adapter is in the first two. `others`: what there may not be with it."""
    if lora is None:
        return hidden, weight, ()
    a, b = check_lora(caller, lora, hidden, weight, **others)
    whole = support is not None or getattr(objective, "reference_head", False)
    if not whole and isinstance(pick_kernel(backend, caller, hidden.device)[1], RowKernel):
        return hidden, weight, (a, b)
    return *side_by_side(hidden, weight, a, b), ()


def call_of_logits(caller: str, head: Head, logits: Any, targets: Any, backend: str | None) -> Call:
    """Makes the call of a head whose logits exist.

    Raises:
        TypeError, ValueError: an argument is wrong; one line names it.
    """
    validate.check_logits(caller, logits)
    validate.check_targets(caller, targets, "logits", logits)
    return Call(head, *pick_kernel(backend, caller, logits.device), (logits.reshape(-1, logits.shape[-1]),))


def over_shards(
    caller: str, group: Any, weight: Any, prepare: Callable[[], tuple[Prepared, Mapping[str, Any]]]
) -> tuple[Prepared, list[int]]:
    """Returns (what `prepare` made, the rows of the weight on each rank of `group`); without a group no rank is
    asked."""
    if group is None:
        return prepare()[0], []
    refuse_in_graph(caller, "group", group)
    made, sizes = shards_of(caller, group, weight, prepare)
    return made, sizes


def pick_kernel(backend: str | None, caller: str, device: torch.device) -> tuple[str, RowKernel | Named | None]:
    """Returns the name of a call's backend, and its kernel."""
    if not tracing():
        found = pick(backend, caller, device)
        return found.name, found.kernel
    name = backend_name(backend, caller, device)
    return name, None if name == "reference" else Named(name)


def in_one_dtype(params: Params) -> Params:
    """Returns the hidden states, weight and bias in the dtype of the products, that of the hidden states."""
    hidden, *of_head = params
    assert hidden is not None
    return hidden, *(None if t is None else t.to(hidden.dtype) for t in of_head)


def wanted(params: Params) -> tuple[bool, ...]:
    """Returns which of hidden states, weight and bias there is a gradient of."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in params)
