"""A divergence has references here: heads on hidden states of their own, or logits that exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arguments import validate
from ..arguments.scalars import number, shown
from ..arguments.temperatures import into_hidden, of_tokens
from ..call import Params

__all__ = ["References", "as_lists", "at_temperatures", "check_reference", "from_lists", "frozen", "references"]
__all__ += ["shares_of"]

# Of each (hidden [..., D'], weight [V, D'], bias [V] or None), or (logits [..., V],)
References = tuple[Params, ...]


def references(caller: str, hidden: Any, weight: Any, bias: Any, logits: Any) -> References:
    """Returns those of a public function's arguments.

    Raises:
        TypeError, ValueError: they are neither, or lists of different lengths.
    """
    if logits is not None:
        if any(t is not None for t in (hidden, weight, bias)):
            raise ValueError(f"{caller}: ref_logits must be None where ref_hidden, ref_weight or ref_bias are given")
        return ((logits,),)
    if not isinstance(hidden, (list, tuple)) and not isinstance(weight, (list, tuple)):
        return (validate.one_dtype(hidden, weight, bias),)
    bias = [None] * len(hidden) if bias is None else bias
    lists = {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)) or len(value) != len(hidden) or not value:
            got = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(f"{caller}: {name} must be a list, one for each of some references; got {got}")
    return tuple(validate.one_dtype(*each) for each in zip(hidden, weight, bias, strict=True))


def at_temperatures(caller: str, refs: References, temperature: Any, softcap: Any) -> tuple[References, Any]:
    """Returns (references, the number that is left of the temperature), with a temperature of each token in their
    hidden states.

    Raises:
        TypeError, ValueError: as `into_hidden`, or a reference has logits instead.
    """
    if of_tokens(temperature) is None:
        return refs, temperature
    if any(len(ref) == 1 for ref in refs):
        raise ValueError(f"{caller}: temperature must be a number for ref_logits; got {shown(temperature)}")
    found = []
    for first, weight, bias in refs:
        first, _ = into_hidden(f"{caller}: ref_hidden", first, temperature, bias, softcap)
        found.append((first, weight, bias))
    return tuple(found), 1.0


def shares_of(caller: str, shares: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Returns the weight of each reference.

    Raises:
        ValueError: not as many numbers as references, or one below 0.
    """
    if shares is None:
        return (1 / count,) * count
    found = [number(share) for share in shares] if isinstance(shares, (list, tuple)) else []
    if len(found) != count or not all(share is not None and 0 <= share < float("inf") for share in found):
        raise ValueError(f"{caller}: ref_shares must be {count} numbers, at least 0, or None; got {shown(shares)}")
    return tuple(float(share) for share in found if share is not None)


def check_reference(caller: str, ref: Params, hidden: Tensor, vocab: int) -> None:
    """Checks that a reference is over the same vocabulary, of the same tokens, on the same device.

    Raises:
        TypeError, ValueError: it is none.
    """
    name = "ref_logits" if len(ref) == 1 else "ref_hidden"
    if len(ref) == 1:
        validate.check_logits(caller, ref[0], name)
        columns, where = ref[0], "ref_logits must be [..., V] with V="
    else:
        validate.check_linear(caller, ref[0], ref[1], ref[2], prefix="ref_")
        columns, where = ref[1], "ref_weight must have V="
    assert columns is not None
    found = columns.shape[-1] if len(ref) == 1 else columns.shape[0]
    if found != vocab:
        raise ValueError(f"{caller}: {where}{vocab}{' as' if len(ref) == 1 else ' rows as'} weight; got {found}")
    first = ref[0]
    assert first is not None
    if first.shape[:-1] != hidden.shape[:-1]:
        tokens, got = list(hidden.shape[:-1]), list(first.shape[:-1])
        raise ValueError(f"{caller}: {name} must be {tokens} tokens as hidden; got {got}")
    if first.device != hidden.device:
        raise ValueError(f"{caller}: {name} must be on the device of hidden, {hidden.device}; got {first.device}")


def frozen(refs: References) -> References:
    """Returns them without gradient, their tokens in one dimension."""
    out = []
    for first, *others in refs:
        assert first is not None
        rest = (None if t is None else t.detach() for t in others)
        out.append((first.detach().reshape(-1, first.shape[-1]), *rest))
    return tuple(out)


def as_lists(refs: References) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns what an operator takes: hidden states or logits, weights, biases; empty tensors where there is none."""
    first = [ref[0] for ref in refs if ref[0] is not None]
    others = [
        [h.new_empty(0) if t is None else t for t in (*ref[1:], None, None)[:2]]
        for h, ref in zip(first, refs, strict=True)
    ]
    return first, [weight for weight, _ in others], [bias for _, bias in others]


def from_lists(first: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> References:
    """Returns what `as_lists` was given."""
    given = zip(first, weights, biases, strict=True)
    return tuple((h, w, b if b.numel() else None) if w.numel() else (h,) for h, w, b in given)
