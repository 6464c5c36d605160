"""A function of the user's becomes a term here: what it reads, how it is called, and its slopes by autograd.

The one place that needs private names of torch: autograd has to work inside an operator (ops.py), which runs below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..statistics import is_statistic
from ..tokens import Slopes, Tokens, given

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = ["OwnFunction", "autograd_on", "function_name", "slopes_by_autograd"]

_INPUTS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
_DIFFERENTIABLE = ("logprobs", "entropy", "target_logits")


def function_name(fn: Any) -> str:
    """Returns how messages call a function of the user's."""
    return getattr(fn, "__name__", None) or function_name(getattr(fn, "func", type(fn)))


def _is_constant(p: inspect.Parameter) -> bool:
    number = isinstance(p.default, (int, float))
    return number and p.name not in _INPUTS and p.name not in _DIFFERENTIABLE and not is_statistic(p.name)


@torch.compiler.assume_constant_result
def _read_by(fn: Callable[..., Tensor]) -> str:
    """Returns what a function reads, as text, which a compiler can hold: names, with "?" after those that have a
    default; after "!" a parameter that may not be one."""
    parameters = [p for p in inspect.signature(fn).parameters.values() if not _is_constant(p)]
    for p in parameters:
        known = p.name in _INPUTS or p.name in _DIFFERENTIABLE or is_statistic(p.name)
        if not known or p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            return f"!{p}"
    return " ".join(p.name if p.default is p.empty else f"{p.name}?" for p in parameters)


@dataclass(frozen=True)
class OwnFunction:
    """Is a function of per-token tensors [n]: the names that it reads, and those without which it has no value."""

    fn: Callable[..., Tensor]
    names: tuple[str, ...]
    needs: tuple[str, ...]

    @classmethod
    def of(cls, fn: Callable[..., Tensor]) -> OwnFunction:
        """
        Raises:
            TypeError: a parameter is no name that a loss knows.
        """
        read = _read_by(fn)
        if read.startswith("!"):
            accepted = ", ".join((*_DIFFERENTIABLE, *_INPUTS, "statistics of a row"))
            raise TypeError(
                f"{function_name(fn)}: parameters must be among {accepted}, or have a number as default; got {read[1:]}"
            )
        names = tuple(n.removesuffix("?") for n in read.split())
        return cls(fn, names, tuple(n for n in read.split() if n in _INPUTS))

    @property
    def reads(self) -> tuple[str, ...]:
        """Returns the inputs that are used where given."""
        return tuple(sorted({n for n in self.names if n in _INPUTS} - set(self.needs)))

    @property
    def statistics(self) -> tuple[str, ...]:
        return tuple(n for n in self.names if is_statistic(n))

    @property
    def differentiable(self) -> frozenset[str]:
        """Returns which of log-probability, entropy and logit the value depends on."""
        return frozenset(n for n in self.names if n in _DIFFERENTIABLE)

    def value(self, t: Tokens) -> Tensor:
        """Returns the loss of each token [n]."""
        inputs = {n: t.statistics[n] if is_statistic(n) else getattr(t, n) for n in self.names}
        # A default stands for what the caller did not give.
        loss = self.fn(**{n: v for n, v in inputs.items() if v is not None or n in self.needs})
        if not isinstance(loss, Tensor) or loss.shape != t.logprobs.shape:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            name = function_name(self.fn)
            raise ValueError(f"{name}: must return a loss per token, {list(t.logprobs.shape)}; got {got}")
        return loss.to(t.logprobs.dtype)


def slopes_by_autograd(
    value: Callable[[Objective, Tokens], Tensor], depends_on: Iterable[str], o: Objective, t: Tokens
) -> Slopes:
    """Returns the slopes of a value that has none in closed form, in those of log-probability, entropy and logit it
    depends on."""
    names = tuple(n for n in _DIFFERENTIABLE if n in depends_on)
    if not names:
        return Slopes(None)
    with autograd_on():
        inputs: dict[str, Any] = {n: given(getattr(t, n)).detach().requires_grad_() for n in names}
        loss = value(o, replace(t, **inputs))
        if not loss.requires_grad:
            return Slopes(None)
        found = torch.autograd.grad(loss.sum(), list(inputs.values()), allow_unused=True)
    slopes = dict(zip(names, found, strict=True))
    return Slopes(*(slopes.get(n) for n in _DIFFERENTIABLE))


@contextmanager
def autograd_on() -> Iterator[None]:
    """Turns autograd on, where it is off, and inside an operator (ops.py) too, which runs below autograd: its dispatch
    keys are excluded there. torch.func would be public, but does not go together with the dispatch modes of
    torch.compile."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield
